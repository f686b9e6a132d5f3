"""A folder to put models into, with something in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kitty_nb.catalog import write_demo_model
from kitty_nb.config import ServerConfig
from kitty_nb.errors import ModelFileError

if TYPE_CHECKING:
    from pathlib import Path

_DEMO_NAME = "kitty-demo.gguf"


def furnish(folder: Path) -> str | None:
    """Write a small demo model into an empty models folder; the default one is made for it.

    Returns:
        What was done, for the user to know; None when the folder has something in it.

    Raises:
        ModelFileError: The folder is not there, or cannot be written to.
    """
    try:
        hidden = [path.name.startswith(".") for path in folder.iterdir()]
    except FileNotFoundError:
        if folder != ServerConfig.model_fields["models_dir"].default:
            raise ModelFileError(
                f"There is no folder {folder}. Create it, or correct LLAMACPP_MODELS_DIR and press"
                " Rescan."
            ) from None
        hidden = []
    except OSError as error:
        raise ModelFileError(
            f"{folder} cannot be looked into ({error.strerror}). Correct LLAMACPP_MODELS_DIR, or"
            " its rights, and press Rescan."
        ) from error
    if not all(hidden):
        return None
    write_demo_model(folder / _DEMO_NAME)
    return f"There were no models in {folder}, so a small demo model was written."
