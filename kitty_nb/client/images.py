"""Pictures in a message, in the form of OpenAI's protocol."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kitty_nb.errors import KittyError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Savable(Protocol):
    """A picture of Pillow's, or one like it."""

    def save(self, fp: BytesIO, format: str) -> object:  # noqa: A002 (Pillow's name)
        """Write the picture to a file."""


Image = str | Path | bytes | Savable
# How the formats that llama.cpp reads begin.
_BEGINNINGS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"BM": "bmp"}


def data_url(image: Image) -> str:
    """Return a picture as a data URL.

    Args:
        image: A path, the bytes of a file, a picture of Pillow's, or a data URL.

    Raises:
        KittyError: The file cannot be read, or holds no picture that llama.cpp reads.
    """
    if isinstance(image, str) and image.startswith("data:"):
        return image
    if isinstance(image, str | Path):
        try:
            data = Path(image).read_bytes()
        except OSError as error:
            raise KittyError(f"Can't read the picture {image} ({error.strerror}).") from None
        name = str(image)
    elif isinstance(image, bytes):
        data, name = image, "The bytes"
    else:
        buffer = BytesIO()
        image.save(buffer, "PNG")
        data, name = buffer.getvalue(), "The picture"
    kind = next((kind for start, kind in _BEGINNINGS.items() if data.startswith(start)), None)
    if kind is None:
        raise KittyError(f"{name} is no PNG, JPEG, GIF or BMP picture. Convert it first.")
    return f"data:image/{kind};base64,{b64encode(data).decode()}"


def with_images(
    messages: Sequence[dict[str, Any]], images: Sequence[Image]
) -> list[dict[str, Any]]:
    """Return messages with pictures in the last one, before its words.

    Raises:
        KittyError: There is no message to put them in, or one of them is no picture.
    """
    if not images:
        return [*messages]
    if not messages:
        raise KittyError("Pictures need a message to go with: say what to do with them.")
    *before, last = messages
    said = last.get("content") or []
    parts = [{"type": "text", "text": said}] if isinstance(said, str) else [*said]
    pictures = [{"type": "image_url", "image_url": {"url": data_url(one)}} for one in images]
    return [*before, {**last, "content": [*pictures, *parts]}]
