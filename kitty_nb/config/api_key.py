"""The key that a server asks its clients for, and how the server itself learns it."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

from pydantic import SecretStr

if TYPE_CHECKING:
    from kitty_nb.config.server_config import ServerConfig

NO_KEY = "none"
_VARIABLE = "LLAMA_API_KEY"  # read by llama-server and by the embedded engine
_BYTES = 32


def choose_api_key(config: ServerConfig) -> SecretStr | None:
    """Return the configured key, one made up for this server, or None when none is wanted."""
    if config.api_key is None:
        return SecretStr(secrets.token_urlsafe(_BYTES))
    return None if config.api_key.get_secret_value() == NO_KEY else config.api_key


def server_environment(api_key: SecretStr | None) -> dict[str, str]:
    """Return the environment to start a server in: ours, with its key and no other.

    A command line can be read by every user of the machine, an environment only by its owner.
    """
    environment = {name: value for name, value in os.environ.items() if name != _VARIABLE}
    return environment | ({_VARIABLE: api_key.get_secret_value()} if api_key else {})
