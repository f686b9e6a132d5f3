"""What a user writes to name a repository, or one of its models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import unquote

from kitty_nb.errors import HubError

__all__ = ["HubReference"]

_HOST = re.compile(r"(?:hf://|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)", re.IGNORECASE)
_REPOSITORY = r"(?P<repository>[\w.-]+/[\w.-]+)"
_PAGE = re.compile(
    rf"{_REPOSITORY}/(?:tree|blob|resolve)/(?P<revision>[^/]+)(?:/(?P<wanted>.+))?", re.ASCII
)
_SHORT = re.compile(rf"{_REPOSITORY}(?::(?P<tag>.+)|/(?P<file>.+\.gguf))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository on the Hub, and what is wanted of it.

    Attributes:
        repository: `owner/name`.
        wanted: A quantization, or a file or folder in the repository; None to choose later.
        revision: The branch, tag or commit.
    """

    repository: str
    wanted: str | None = None
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `owner/name`, `owner/name:Q4_K_M`, `owner/name/file.gguf` or a page's address.

        Raises:
            HubError: It is none of these.
        """
        name = re.split(r"[?#]", _HOST.sub("", text.strip(), count=1), maxsplit=1)[0].rstrip("/")
        if page := _PAGE.fullmatch(name):
            wanted = unquote(page["wanted"]) if page["wanted"] else None
            return cls(page["repository"], wanted, unquote(page["revision"]))
        if short := _SHORT.fullmatch(name):
            return cls(short["repository"], short["tag"] or short["file"])
        raise HubError(
            f"{text!r} does not name a repository on the Hub. Write it as owner/name, such as"
            " ggml-org/gemma-3-4b-it-GGUF, or paste the address of its page."
        )
