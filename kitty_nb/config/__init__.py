"""`.env` text becomes a validated, frozen `ServerConfig`, one per profile."""

from kitty_nb.config.api_key import (
    FLAG_PREFIX,
    choose_api_key,
    goes_without_key,
    server_environment,
)
from kitty_nb.config.env_warnings import env_warnings
from kitty_nb.config.env_writer import SavedEnv, env_lines, salvage_settings, save_settings
from kitty_nb.config.server_config import (
    PROJECTOR,
    RECORDED,
    Env,
    FlashAttention,
    OnKernelExit,
    ServerConfig,
    configured_profiles,
    env_settings,
    spelled,
    takes_secret,
    value_of,
)

__all__ = [
    "FLAG_PREFIX",
    "PROJECTOR",
    "RECORDED",
    "Env",
    "FlashAttention",
    "OnKernelExit",
    "SavedEnv",
    "ServerConfig",
    "choose_api_key",
    "configured_profiles",
    "env_lines",
    "env_settings",
    "env_warnings",
    "goes_without_key",
    "salvage_settings",
    "save_settings",
    "server_environment",
    "spelled",
    "takes_secret",
    "value_of",
]
