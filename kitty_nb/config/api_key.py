"""The key that a server asks its clients for, and the environment in which it learns it."""

from __future__ import annotations

import os
from base64 import urlsafe_b64encode
from typing import TYPE_CHECKING

from pydantic import SecretStr

if TYPE_CHECKING:
    from kitty_nb.config.server_config import ServerConfig

NO_KEY = "none"
_VARIABLE = "LLAMA_API_KEY"  # read by llama-server and by the embedded engine
FLAG_PREFIX = "LLAMA_ARG_"  # llama-server reads each flag that is missing from such a variable
_BYTES = 32


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
