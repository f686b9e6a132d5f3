"""ServerConfig: one server's settings, validated and frozen; nothing here reads the disk."""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import shlex
import sys
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self, cast
from urllib.parse import urlsplit

import platformdirs
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    SerializationInfo,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from kitty_nb.config.env_file import read_env
from kitty_nb.config.flags import FLAG_PREFIX, spelled, value_of
from kitty_nb.errors import ConfigError, Problem
from kitty_nb.safe_files import NO_HOME, user_folder

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from kitty_nb.config.env_file import EnvFile


NO_KEY = "none"
_VARIABLE = "LLAMA_API_KEY"  # read by llama-server and by the embedded engine


def task_by_flags(words: Sequence[str]) -> Task | None:
    """Return the task that flags ask for; None if they leave it to the model."""
    flags = {spelled(word) for word in words}
    if flags & {"--rerank", "--reranking"} or value_of(words, {"--pooling"}) == "rank":
        return Task.RANK
    return Task.EMBED if flags & {"--embedding", "--embeddings"} else None


def choose_api_key(config: ServerConfig) -> SecretStr | None:
    """Return the configured key, a generated one, or None if the server should have none."""
    if config.api_key is None:
        return SecretStr(secrets.token_urlsafe())
    return None if goes_without_key(config) else config.api_key


def goes_without_key(config: ServerConfig) -> bool:
    """Return whether the server should answer requests without a key."""
    return config.api_key is not None and config.api_key.get_secret_value() == NO_KEY


def server_environment(api_key: SecretStr | None) -> dict[str, str]:
    """Return the environment for a new server: ours, with its key and no other.

    A command line can be read by every user of the machine, an environment only by its owner.
    `LLAMA_ARG_…` variables are left out: they would contradict what is previewed and shown.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != _VARIABLE and not name.startswith(FLAG_PREFIX)
    }
    return environment | ({_VARIABLE: api_key.get_secret_value()} if api_key else {})


def user_variables(names: Iterable[str]) -> dict[str, str]:
    """Return the given environment variables that are set."""
    return {name: value for name in names if (value := os.environ.get(name))}


ROLES = ("primary", "coder", "q4", "f16", "summary", "vision")
PREFIX = "LLAMACPP_"
_FIRST_PORT = 8082

_DATA = user_folder(platformdirs.user_data_path)
_STATE = user_folder(platformdirs.user_state_path)
_HOST_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_KEY = re.compile(r"[!-+\--~]+")
_NUL = "it contains a NUL character"
_TRUE, _FALSE = {"1", "true", "yes", "y", "on"}, {"0", "false", "no", "n", "off"}


class FlashAttention(StrEnum):
    """The use of flash attention; `auto` lets llama-server decide."""

    ON = "on"
    OFF = "off"
    AUTO = "auto"


class Task(StrEnum):
    """The use of a model: to answer, to turn texts into vectors, or to rank documents."""

    CHAT = "chat"
    EMBED = "embed"
    RANK = "rank"


class Speculation(StrEnum):
    """The source of the tokens that are guessed ahead and checked together.

    `ngram` guesses what followed the same words before, `draft` asks a smaller model.
    """

    OFF = "off"
    NGRAM = "ngram"
    DRAFT = "draft"


class OnKernelExit(StrEnum):
    """The server's fate when the notebook's kernel ends."""

    KEEP = "keep"
    STOP = "stop"


class Env(NamedTuple):
    """The form of a field in `.env`."""

    expected: str  # what to write there, in words; the end of every error about the value
    # What follows `LLAMACPP_` or `LLAMACPP_<PROFILE>_`; the field's name if not given.
    suffix: str = ""


class _Source(NamedTuple):
    """The source of values, so that an error names the key as the user wrote it."""

    name: str
    folder: Path
    keys: Mapping[str, str]


_NO_SOURCE = _Source("", Path(), {})
_DEPENDS = "default_factory_not_called"  # of a default that depends on a wrong value

SHOW_SECRETS = {"show_secrets": True}  # context of a dump to a file that only this user can read


def _dump_secret(secret: SecretStr, info: SerializationInfo) -> str:
    return secret.get_secret_value() if info.context == SHOW_SECRETS else str(secret)


Secret = Annotated[SecretStr, PlainSerializer(_dump_secret, when_used="json-unless-none")]


def default_port(profile: str) -> int:
    """Return the port of a profile without one: each role has its own, so that all can run."""
    role = profile.lower()
    return _FIRST_PORT + (ROLES.index(role) if role in ROLES else 0)


def _flash_attention(value: object) -> object:
    word = str(value).strip().lower()
    return "on" if word in _TRUE else "off" if word in _FALSE else word


def _speculation(value: object) -> object:
    word = str(value).strip().lower().replace("-", "")
    return "off" if word in _FALSE else word.removesuffix(" model")


def _key(value: SecretStr) -> SecretStr:
    """Check that a key fits into an HTTP header; to llama-server, commas separate keys."""
    if not _KEY.fullmatch(value.get_secret_value()):
        raise ValueError("it can't be sent in an HTTP header")
    return value


def _host(value: str) -> str:
    """Check an address or a name, both without a port."""
    if ":" in value or value.rpartition(".")[2].isdigit():
        ipaddress.ip_address(value)
    elif not _HOST_NAME.fullmatch(value):
        raise ValueError("not a valid host name")
    return value


def _url(value: str, info: ValidationInfo) -> str:
    """Return a server's address, without the `/v1` that clients of OpenAI's protocol append."""
    if info.data.get("ssh"):
        raise ValueError("SSH is set for this profile, too", "Unset one of the two.")
    address = value.strip()
    parts = urlsplit(address)
    port = parts.port  # raises a ValueError if it is not one
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
        raise ValueError("it is not the address of a server")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "it contains a user name or a password", "Write the key as API_KEY instead."
        )
    if parts.query or parts.fragment or not address.isascii() or not address.isprintable():
        raise ValueError("it contains more than a host, a port and a path")
    _host(parts.hostname)
    return address.rstrip("/").removesuffix("/v1").rstrip("/")


def _words(value: object) -> object:
    words = shlex.split(value) if isinstance(value, str) else value
    if not isinstance(words, list | tuple):
        return words
    if any("\0" in str(word) for word in words):
        raise ValueError(_NUL)
    return tuple(spelled(word) if isinstance(word, str) else word for word in words)


def _listed(value: object) -> object:
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


def _folder(value: object, info: ValidationInfo) -> object:
    """Resolve a path as a person writes it: with `~`, or relative to the folder of the `.env`."""
    if value is None or _is_elsewhere(info):
        return value
    source = cast("_Source", info.context or _NO_SOURCE)
    return _absolute(source.folder.absolute(), value)


def _absolute(folder: Path, value: object) -> str:
    """Return a path in a folder as an absolute one.

    Raises:
        ValueError: The locale can't encode it, so the file could not be opened.
    """
    path = str(folder / os.path.expanduser(str(value)))  # noqa: PTH111 (keeps ~name if there is no such user)
    if "\0" in path:
        raise ValueError(_NUL)
    encoding = sys.getfilesystemencoding()
    if "utf" not in encoding and not path.isascii():
        reason = f"It contains characters that this program's locale ({encoding}) can't encode."
        raise ValueError(reason, "Set LC_ALL=C.UTF-8, or PYTHONUTF8=1, and start it again.")
    return path


def _is_elsewhere(info: ValidationInfo) -> bool:
    """Return whether a path is another machine's, which stays as written."""
    return info.data.get("ssh") is not None and info.field_name != "ssh_config"


def _there_is_a_home(path: Path, info: ValidationInfo) -> Path:
    if path.is_relative_to(NO_HOME) and not _is_elsewhere(info):
        key = PREFIX + env_settings()[str(info.field_name)].suffix
        reason = "Its default is in the home folder, and this user has none."
        raise ValueError(reason, f"Set {key}, or HOME.", key)
    return path


def _in_models_dir(value: object, info: ValidationInfo) -> object:
    """Resolve a path as a person writes it, relative to the models folder."""
    folder = info.data.get("models_dir")  # missing if it is wrong itself
    return _absolute(folder, value) if folder and not _is_elsewhere(info) else value


def _auto(value: object, info: ValidationInfo) -> object:
    """Resolve a path in the models folder; None for the word auto."""
    unset = value is None or str(value).strip().lower() == "auto"
    return None if unset else _in_models_dir(value, info)


def _mmproj(value: object, info: ValidationInfo) -> object:
    off = str(value).strip().lower() in _FALSE
    return "off" if off else _auto(value, info)


_Name = Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"^[^,\x00]+$")]
# Not an option of ssh, and nothing that its configuration could pass to a shell.
_Destination = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_\[][\w.@:%+/\[\]\\-]*$")]
_Lender = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][\w.@-]*(:[0-9]{1,5})?$")]
_Folder = Annotated[Path, BeforeValidator(_folder)]
_InHome = Annotated[_Folder, AfterValidator(_there_is_a_home), Field(validate_default=True)]
_InModels = Annotated[Path, BeforeValidator(_in_models_dir)]
_Url = Annotated[str, AfterValidator(_url)]
_Key = Annotated[Secret, AfterValidator(_key)]
_Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
_Tokens = Annotated[PositiveInt | None, Env("a number of tokens, 1 or more")]
_Seconds = Annotated[NonNegativeFloat, Env("a number of seconds")]


class ServerConfig(BaseModel):
    """Settings of one profile. `None` leaves a setting to llama-server's own default.

    Build it with `from_env` or by keywords; change it with `replace`. All three raise
    `ConfigError`, which lists every wrong value at once.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    profile: Annotated[str, StringConstraints(to_lower=True)] = Field(
        default="primary", pattern=r"^[A-Za-z][A-Za-z0-9_]*$"
    )
    # The machine that it runs on, if not this one; its paths are that machine's.
    ssh: Annotated[_Destination | None, Env("user@host, or a name from your ssh configuration")] = (
        None
    )
    ssh_bin: Annotated[str | None, Env("the path of kitty-nb on the other machine")] = None
    ssh_config: Annotated[_Folder | None, Env("the path of an ssh configuration file")] = None
    models_dir: Annotated[_InHome, Env("a folder with .gguf files")] = _DATA / "models"
    allow_absolute_paths: Annotated[bool, Env("1 or 0; 1 allows models in any folder")] = False
    other_stores: Annotated[bool, Env("1 or 0; 0 leaves out the models of other programs")] = True
    model: Annotated[_InModels | None, Env("the path of a .gguf file in the models folder")] = None
    models: Annotated[
        tuple[Annotated[str, StringConstraints(to_lower=True)], ...] | None,
        BeforeValidator(_listed),
        Env("all, or names of profiles"),
    ] = None
    # The `.env` file with the profiles in `models`.
    env: Path | None = None
    router_memory_gb: Annotated[
        PositiveFloat | None, Env("a size in gigabytes above 0", "MEMORY_GB")
    ] = None
    pinned: Annotated[bool, Env("1 or 0")] = False
    # The model's name in its store. `resolve_model` finds it.
    known_as: str | None = None
    alias: Annotated[_Name | None, Env("one name, without commas")] = None
    binary: Annotated[_Folder | None, Env("the path of a llama-server program", "BIN")] = None
    host: Annotated[
        str, AfterValidator(_host), Env("an address or a host name, without a port")
    ] = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535), Env("a whole number from 1 to 65535")] = Field(
        default_factory=lambda values: default_port(values.get("profile", ""))
    )
    # An existing server, which is used instead of starting one.
    url: Annotated[_Url | None, Env("an address such as https://gpu.example:8080/v1")] = None
    api_key: Annotated[
        _Key | None, Env("letters, digits and punctuation without spaces or commas, or none")
    ] = None
    context_size: Annotated[
        NonNegativeInt | None, Env("a number of tokens, or 0 for the model's own", "CTX")
    ] = None
    n_predict: Annotated[int | None, Field(ge=-2), Env("a number of tokens; -1 is no limit")] = None
    temperature: Annotated[NonNegativeFloat | None, Env("a number of 0 or more")] = None
    top_p: Annotated[float | None, Field(ge=0, le=1), Env("a number from 0 to 1")] = None
    repeat_penalty: Annotated[PositiveFloat | None, Env("a number above 0; 1 is off")] = None
    n_gpu_layers: Annotated[
        int | None, Field(ge=-1), Env("a number of layers; 999 is all of them")
    ] = None
    threads: Annotated[PositiveInt | None, Env("a number of threads, 1 or more")] = None
    batch_size: _Tokens = None
    ubatch_size: _Tokens = None
    parallel: Annotated[PositiveInt | None, Env("a number of requests served at once")] = None
    flash_attention: Annotated[
        Annotated[FlashAttention, BeforeValidator(_flash_attention)] | None,
        Env("on, off or auto", "FLASH_ATTN"),
    ] = None
    tool_calling: Annotated[bool | None, Env("1 or 0")] = None
    speculation: Annotated[
        Annotated[Speculation, BeforeValidator(_speculation)] | None, Env("off, ngram or draft")
    ] = None
    draft_model: Annotated[
        Path | None, BeforeValidator(_auto), Env("auto, or the path of a .gguf file")
    ] = None
    # The file that `draft_model` stands for with this model. `resolve_model` finds it.
    drafter: Path | None = None
    # Machines whose devices are borrowed, through a ggml-rpc-server that ssh starts on each.
    rpc_hosts: Annotated[
        tuple[_Lender, ...],
        BeforeValidator(_listed),
        Env("machines as ssh knows them, host or host:port, separated by commas"),
    ] = ()
    rpc_command: Annotated[_Words, Env("a command, quoted as in a shell")] = ()
    # Hidden: it may contain a secret, until a start rejects it.
    extra_args: Annotated[_Words, Env("flags of llama-server, quoted as in a shell")] = Field(
        default=(), repr=False
    )
    mmproj: Annotated[
        Path | Literal["off"] | None,
        BeforeValidator(_mmproj),
        Env("auto, off, or the path of the model's mmproj file"),
    ] = None
    # The file that `mmproj` stands for with this model. `resolve_model` finds it.
    projector: Path | None = None
    # The model's task, by its header and `extra_args`. `resolve_model` finds it.
    task: Task = Task.CHAT
    log_dir: Annotated[_InHome, Env("a folder for the server's log")] = _STATE / "logs"
    log_max_mb: Annotated[PositiveFloat, Env("a size in megabytes above 0")] = 16.0
    log_keep: Annotated[PositiveInt, Env("a number of older logs, 1 or more")] = 3
    history: Annotated[_InHome, Env("a file for the history of loads")] = _STATE / "history.sqlite3"
    keep_prompts: Annotated[bool, Env("on or off")] = True
    keep_prompts_gb: Annotated[PositiveFloat, Env("a size in gigabytes above 0")] = 8.0
    health_max_attempts: Annotated[PositiveInt, Env("a number of checks, 1 or more")] = 120
    stall_seconds: Annotated[PositiveFloat, Env("a number of seconds above 0")] = 120.0
    on_kernel_exit: Annotated[OnKernelExit, Env("keep or stop")] = OnKernelExit.KEEP
    idle_shutdown_seconds: Annotated[PositiveInt | None, Env("a number of seconds, 1 or more")] = (
        None
    )
    restart_max: Annotated[NonNegativeInt, Env("a number of restarts; 0 is never")] = 3
    restart_delay_seconds: _Seconds = 5.0
    restart_delay_max_seconds: _Seconds = 60.0
    restart_stable_seconds: _Seconds = 60.0
    stop_grace_seconds: _Seconds = 10.0

    @classmethod
    def from_env(cls, path: str | Path = ".env", profile: str = "primary") -> Self:
        """Read the settings of a profile from a `.env` file.

        `LLAMACPP_<PROFILE>_<NAME>` overrides `LLAMACPP_<NAME>`; an empty value counts as unset.
        The process environment is neither read for these keys nor changed.

        Args:
            path: The file. Plain `.env` is looked for here and in the folders above, and may be
                missing: then every setting has its default. Any other file must exist.
            profile: The named set of settings to read.

        Raises:
            ConfigError: Lists every bad line and value with its reason and fix.
        """
        return cls.from_file(read_env(path), profile)

    @classmethod
    def from_file(
        cls, env: EnvFile, profile: str = "primary", ignore: Collection[str] = ()
    ) -> Self:
        """Like `from_env`, but from a file that has been read already.

        Args:
            env: The file.
            profile: The named set of settings to read.
            ignore: Keys to treat as unset, such as those that a `ConfigError` lists.
        """
        keys = setting_keys(env, profile, ignore)
        if not _written_for(keys.get("api_key"), keys.get("url")):
            del keys["api_key"]
        values = {"profile": profile} | {name: env.values[key] for name, key in keys.items()}
        if "models" in keys:
            values["env"] = str(env.path)
        return cls.model_validate(values, context=_Source(str(env.path), env.path.parent, keys))

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some settings changed, validated like the original.

        Anything that `resolve_model` found is dropped: the files must be looked up again.

        Raises:
            ConfigError: A changed value is wrong.
        """
        found = {"known_as": None, "projector": None, "task": Task.CHAT, "drafter": None}
        given = {**dict(self), **found, **changes}
        config = type(self).model_validate(given)
        if isinstance(self.mmproj, Path) and self.model not in {None, config.model}:
            # A projector belongs to the model that it was set for.
            return config if "mmproj" in changes else config.replace(mmproj=None)
        return config

    def require_model(self) -> Path:
        """Return the chosen model.

        Raises:
            ConfigError: No model is chosen.
        """
        if self.model is None:
            key = f"{PREFIX}{self.profile.upper()}_MODEL"
            fix = f"Choose one, or set {key}."
            raise ConfigError("", (Problem(key, "", "No model is chosen.", fix),))
        return self.model

    @property
    def served_alias(self) -> str:
        """The name that the server answers to: the alias, else the model's own name."""
        name = self.alias or self.known_as or (self.model.stem if self.model else "")
        # To llama-server, commas separate names, and spaces around a name are not part of it.
        return name.replace(",", "_").strip() or ("model" if name else "")

    @property
    def endpoint(self) -> str:
        """The server's address as a client on this machine uses it."""
        if self.url:
            return self.url
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def local_only(self) -> bool:
        """True if only this machine can reach the server that would be started."""
        return _is_loopback(self.host)

    @property
    def key_in_the_clear(self) -> bool:
        """True if a key would travel to another machine without encryption."""
        key = self.api_key is not None and not goes_without_key(self)
        return key and self.url is not None and sends_in_the_clear(self.url)

    @property
    def log_path(self) -> Path:
        """The file for the server's output."""
        return self.log_dir / f"{self.profile}.log"

    @property
    def prompts_dir(self) -> Path:
        """The folder of kept prompts, shared by profiles with the same log folder."""
        return self.log_dir / "prompts"

    @model_validator(mode="wrap")
    @classmethod
    def _report_all(
        cls, data: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo
    ) -> Self:
        try:
            return handler(data)
        except ValidationError as invalid:
            source = info.context or _NO_SOURCE
            problems = tuple(
                _problem(dict(error), source)
                for error in invalid.errors()
                if error["type"] != _DEPENDS
            )
            raise ConfigError(source.name, problems) from None


def sends_in_the_clear(url: str) -> bool:
    """Return whether data sent to an address travels unencrypted to another machine."""
    parts = urlsplit(url)
    return parts.scheme == "http" and not _is_loopback(parts.hostname or "")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def _written_for(key: str | None, url: str | None) -> bool:
    """Return whether the setting of a key was written for the setting of a profile's address.

    A key for all profiles is for the servers started here, and must not be sent elsewhere.
    """
    shared = key == f"{PREFIX}API_KEY"
    return not shared or url in {None, f"{PREFIX}URL"}


def env_settings() -> dict[str, Env]:
    """Return every field that a `.env` file can set, with its name there."""
    return {
        name: entry._replace(suffix=entry.suffix or name.upper())
        for name, field in ServerConfig.model_fields.items()
        for entry in field.metadata
        if isinstance(entry, Env)
    }


def setting_keys(env: EnvFile, profile: str, ignore: Collection[str] = ()) -> dict[str, str]:
    """Return the `.env` key that sets each field for a profile; fields without one are left out."""
    keys = {}
    for name, setting in env_settings().items():
        own, shared = f"{PREFIX}{profile.upper()}_{setting.suffix}", PREFIX + setting.suffix
        if key := next((k for k in (own, shared) if env.values.get(k) and k not in ignore), None):
            keys[name] = key
    return keys


def shown(name: str, value: object) -> str:
    """Return a field's value for an error message, with possible secrets hidden."""
    # The words of extra_args may include a key.
    secret = name in {"api_key", "extra_args"} or (name == "url" and "@" in str(value))
    return "(hidden)" if secret else str(value)


def _no_setting(name: str) -> str:
    if name == "profile":
        return "Use a letter, then letters, digits and underscores."
    near = get_close_matches(name, ServerConfig.model_fields, n=1)
    return f"There is no such setting.{f' Did you mean {near[0]}?' if near else ''}"


def _problem(error: dict[str, Any], source: _Source) -> Problem:
    name = str(error["loc"][0])
    setting = env_settings().get(name)
    # Our own validators raise a ValueError with a reason and, if not the usual ones, a fix and key.
    said: tuple[str, ...] = getattr(error.get("ctx", {}).get("error"), "args", ())
    reason, fix, key, *_ = *said, "", "", ""
    reason = (reason or "it is not valid").rstrip(".")
    return Problem(
        key or source.keys.get(name, name),
        "" if key else shown(name, error["input"]),
        f"{reason[0].upper()}{reason[1:]}.",
        fix or (f"Write {setting.expected}." if setting else _no_setting(name)),
    )
