"""`.env` text becomes a validated, frozen `ServerConfig`, one per profile."""

from kitty_nb.config.places import Places as Places
from kitty_nb.config.places import as_written as as_written
from kitty_nb.config.profiles import add_profiles as add_profiles
from kitty_nb.config.profiles import configured_profiles as configured_profiles
from kitty_nb.config.profiles import env_lines as env_lines
from kitty_nb.config.profiles import env_warnings as env_warnings
from kitty_nb.config.profiles import load_lenient as load_lenient
from kitty_nb.config.profiles import save_settings as save_settings
from kitty_nb.config.server_config import FLAG_PREFIX as FLAG_PREFIX
from kitty_nb.config.server_config import PROJECTOR as PROJECTOR
from kitty_nb.config.server_config import SHOW_SECRETS as SHOW_SECRETS
from kitty_nb.config.server_config import FlashAttention as FlashAttention
from kitty_nb.config.server_config import OnKernelExit as OnKernelExit
from kitty_nb.config.server_config import Secret as Secret
from kitty_nb.config.server_config import ServerConfig as ServerConfig
from kitty_nb.config.server_config import Speculation as Speculation
from kitty_nb.config.server_config import Task as Task
from kitty_nb.config.server_config import choose_api_key as choose_api_key
from kitty_nb.config.server_config import env_settings as env_settings
from kitty_nb.config.server_config import goes_without_key as goes_without_key
from kitty_nb.config.server_config import server_environment as server_environment
from kitty_nb.config.server_config import spelled as spelled
from kitty_nb.config.server_config import takes_secret as takes_secret
from kitty_nb.config.server_config import task_by_flags as task_by_flags
from kitty_nb.config.server_config import user_variables as user_variables
from kitty_nb.config.server_config import value_of as value_of
