"""The words and the environment that a llama-server is started with, and its key."""

from __future__ import annotations

import os
import re
from base64 import urlsafe_b64encode
from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import SecretStr

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from kitty_nb.config.server_config import ServerConfig

NO_KEY = "none"
_VARIABLE = "LLAMA_API_KEY"  # read by llama-server and by the embedded engine
FLAG_PREFIX = "LLAMA_ARG_"  # llama-server reads each flag that is missing from such a variable
_BYTES = 32
_SECRET = re.compile(r"-hft|--?[\w-]*(?:key|token|password|secret)")
PROJECTOR = frozenset({"-mm", "--mmproj"})


def spelled(word: str) -> str:
    """Write a long flag with hyphens: llama-server reads `--ctx_size` as `--ctx-size`."""
    return word.replace("_", "-") if word.startswith("--") else word


def takes_secret(word: str) -> bool:
    """Tell whether a word is a flag whose value is a secret itself, rather than in a file."""
    return _SECRET.fullmatch(spelled(word)) is not None


def value_of(words: Sequence[str], flags: Collection[str]) -> str | None:
    """Return what follows the last of some flags, which is what llama-server takes."""
    values = [value for flag, value in pairwise(words) if spelled(flag) in flags]
    return values[-1] if values else None


def choose_api_key(config: ServerConfig) -> SecretStr | None:
    """Return the configured key, one made up for this server, or None when none is wanted."""
    if config.api_key is None:
        return SecretStr(urlsafe_b64encode(os.urandom(_BYTES)).decode().rstrip("="))
    return None if goes_without_key(config) else config.api_key


def goes_without_key(config: ServerConfig) -> bool:
    """Tell whether the server is to answer whoever asks."""
    return config.api_key is not None and config.api_key.get_secret_value() == NO_KEY


def server_environment(api_key: SecretStr | None) -> dict[str, str]:
    """Return the environment to start a server in: ours, with its key and no other.

    A command line can be read by every user of the machine, an environment only by its owner.
    Flags in it are left out: they would change what is previewed, measured and shown.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != _VARIABLE and not name.startswith(FLAG_PREFIX)
    }
    return environment | ({_VARIABLE: api_key.get_secret_value()} if api_key else {})


def user_variables(names: Iterable[str]) -> dict[str, str]:
    """Return those of some variables of this program's environment that are set."""
    return {name: value for name in names if (value := os.environ.get(name))}
