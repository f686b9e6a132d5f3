"""`.env` text becomes a validated, frozen `ServerConfig`, one per profile."""

from kitty_nb.config.profiles import (
    configured_profiles,
    env_lines,
    env_warnings,
    load_lenient,
    save_settings,
)
from kitty_nb.config.server_config import (
    FLAG_PREFIX,
    PROJECTOR,
    SHOW_SECRETS,
    FlashAttention,
    OnKernelExit,
    Secret,
    ServerConfig,
    choose_api_key,
    env_settings,
    goes_without_key,
    server_environment,
    spelled,
    takes_secret,
    user_variables,
    value_of,
)

__all__ = [
    "FLAG_PREFIX",
    "PROJECTOR",
    "SHOW_SECRETS",
    "FlashAttention",
    "OnKernelExit",
    "Secret",
    "ServerConfig",
    "choose_api_key",
    "configured_profiles",
    "env_lines",
    "env_settings",
    "env_warnings",
    "goes_without_key",
    "load_lenient",
    "save_settings",
    "server_environment",
    "spelled",
    "takes_secret",
    "user_variables",
    "value_of",
]
