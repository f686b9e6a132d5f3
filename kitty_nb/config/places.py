"""The places of another machine: the paths of a profile that runs there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict

from kitty_nb.config.profiles import load_lenient
from kitty_nb.config.server_config import ServerConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

FOLDERS = frozenset({"models_dir", "log_dir", "history", "binary"})
_IN_MODELS = ("model", "mmproj", "draft_model")


class Places(BaseModel):
    """The folders and files of a machine that its own `.env`, or else a default, names."""

    model_config = ConfigDict(frozen=True)

    home: Path
    models_dir: Path
    log_dir: Path  # the folder for logs and records
    history: Path
    binary: Path | None = None  # the llama-server program; None for the one that is found

    @classmethod
    def of_this_machine(cls, profile: str) -> Self:
        """Read those of this machine, for a profile that is to run here.

        Raises:
            ConfigError: The `.env` file cannot be read.
        """
        config, _ = load_lenient(".env", profile)
        return cls(home=Path.home(), **{name: getattr(config, name) for name in FOLDERS})

    def settle(self, config: ServerConfig) -> ServerConfig:
        """Return a profile's settings with all paths as they are on that machine.

        What the settings leave to the default, that machine decides.
        """
        found: dict[str, Path | None] = {
            name: own if value == _DEFAULTS[name] else _absolute(self.home, value)
            for name in FOLDERS
            for own, value in [(getattr(self, name), getattr(config, name))]
        }
        models = found["models_dir"] or self.models_dir
        for name in _IN_MODELS:
            value = getattr(config, name)
            if isinstance(value, Path):
                found[name] = self._in(models, value)
        return config.model_copy(update=found)

    def _in(self, models: Path, path: Path) -> Path:
        return _absolute(self.home if path.parts[:1] == ("~",) else models, path)


def as_written(config: ServerConfig) -> ServerConfig:
    """Return the settings of another machine with models as a `.env` file names them."""
    folder = config.models_dir
    short: Mapping[str, object] = {
        name: value.relative_to(folder)
        for name in _IN_MODELS
        if isinstance(value := getattr(config, name), Path) and value.is_relative_to(folder)
    }
    return config.model_copy(update=short)


def _absolute(folder: Path, path: Path) -> Path:
    home, *rest = path.parts or ("",)
    return folder.joinpath(*rest) if home == "~" else folder / path


_DEFAULTS = {name: ServerConfig.model_fields[name].default for name in FOLDERS}
