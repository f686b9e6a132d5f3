from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from dotenv import dotenv_values

from kitty_nb.catalog.resolve import load_profile, resolve_model
from kitty_nb.config import FlashAttention, ServerConfig, env_settings
from kitty_nb.config.env_file import read_env
from kitty_nb.config.profiles import configured_profiles
from kitty_nb.errors import ConfigError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    for name in (
        "Qwen-Coder-GGUF/qwen-coder-32b-q8_0.gguf",
        "tiny.gguf",
        "big/big-00001-of-00003.gguf",
        "big/big-00003-of-00003.gguf",
        "whole/whole-00001-of-00002.gguf",
        "whole/whole-00002-of-00002.gguf",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"GGUF")
    return folder


def write_env(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / ".env"
    path.write_text("\n".join(("LLAMACPP_MODELS_DIR=models", *lines)) + "\n")
    return path


def problems(path: Path, profile: str = "primary") -> dict[str, str]:
    _, complaint = load_profile(path, profile)
    assert complaint
    assert all(str(problem) in str(complaint) for problem in complaint.problems)
    return {problem.key: f"{problem.reason} {problem.fix}" for problem in complaint.problems}


def test_every_setting_of_the_example_is_a_field_and_every_field_is_in_the_example() -> None:
    documented = set(dotenv_values(ROOT / ".env.example"))
    suffixes = {setting.suffix for setting in env_settings().values()}
    whose = dict.fromkeys(("MODEL", "ALIAS", "SSH", "URL", "PINNED"), "PRIMARY_")
    whose |= dict.fromkeys(("MODELS", "MEMORY_GB"), "ROUTER_")
    assert documented == {f"LLAMACPP_{whose.get(suffix, '')}{suffix}" for suffix in suffixes}


def test_the_example_read_as_it_is_gives_the_defaults() -> None:
    assert ServerConfig.from_env(ROOT / ".env.example") == ServerConfig()


def test_reads_every_kind_of_value(tmp_path: Path, models: Path) -> None:
    before = dict(os.environ)
    config = ServerConfig.from_env(
        write_env(
            tmp_path,
            "LLAMACPP_PRIMARY_MODEL=tiny.gguf",
            "LLAMACPP_PRIMARY_ALIAS=kitty-primary",
            "LLAMACPP_PORT=9000",
            "LLAMACPP_CTX=8192",
            "LLAMACPP_TEMPERATURE=0.7",
            "LLAMACPP_N_GPU_LAYERS=999",
            "LLAMACPP_FLASH_ATTN=1",
            "LLAMACPP_TOOL_CALLING=true",
            "LLAMACPP_EXTRA_ARGS=\"--metrics --chat-template 'a b'\"",
            "LLAMACPP_THREADS=",
        )
    )
    assert config.model == models / "tiny.gguf"
    assert (config.served_alias, config.port, config.context_size) == ("kitty-primary", 9000, 8192)
    assert (config.temperature, config.n_gpu_layers) == (0.7, 999)
    assert config.flash_attention is FlashAttention.ON
    assert config.tool_calling is True
    assert config.extra_args == ("--metrics", "--chat-template", "a b")
    assert config.threads is None
    assert dict(os.environ) == before


def test_a_profile_overrides_the_global_value(tmp_path: Path, models: Path) -> None:
    path = write_env(
        tmp_path,
        "LLAMACPP_PORT=9000",
        "LLAMACPP_CODER_PORT=9001",
        "LLAMACPP_CTX=4096",
        "LLAMACPP_CODER_MODEL=tiny.gguf",
    )
    primary, coder = ServerConfig.from_env(path), ServerConfig.from_env(path, "coder")
    assert (primary.port, primary.context_size, primary.model) == (9000, 4096, None)
    assert (coder.port, coder.context_size, coder.model) == (9001, 4096, models / "tiny.gguf")
    assert coder.served_alias == "tiny"
    assert ServerConfig.from_env(path, "CODER") == coder


def test_all_bad_keys_are_reported_at_once_with_value_reason_and_fix(
    tmp_path: Path, models: Path
) -> None:
    found = problems(
        write_env(
            tmp_path,
            "LLAMACPP_PRIMARY_MODEL=nope.gguf",
            "LLAMACPP_PRIMARY_PORT=99999",
            "LLAMACPP_CTX=lots",
            "LLAMACPP_FLASH_ATTN=maybe",
            "LLAMACPP_EXTRA_ARGS='--x \"open'",
        )
    )
    assert set(found) == {
        "LLAMACPP_PRIMARY_MODEL",
        "LLAMACPP_PRIMARY_PORT",
        "LLAMACPP_CTX",
        "LLAMACPP_FLASH_ATTN",
        "LLAMACPP_EXTRA_ARGS",
    }
    assert "1 to 65535" in found["LLAMACPP_PRIMARY_PORT"]
    assert "on, off or auto" in found["LLAMACPP_FLASH_ATTN"]


def test_bad_keys_can_be_ignored_to_go_on_with_the_rest(tmp_path: Path, models: Path) -> None:
    path = write_env(tmp_path, "LLAMACPP_PORT=0", "LLAMACPP_CTX=4096")
    config = ServerConfig.from_file(read_env(path), ignore=problems(path))
    assert (config.port, config.context_size) == (8082, 4096)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("Qwen-Coder-GGUF/qwen-coder-32b-q8_0", "does not end in .gguf"),
        (
            "Qwen-Coder-GGUF/qwen-coder-32b-q8_0",
            "Did you mean Qwen-Coder-GGUF/qwen-coder-32b-q8_0.gguf?",
        ),
        ("Qwen-Coder-GGUF", "is a folder"),
        ("Qwen-Coder-GGUF", "Did you mean Qwen-Coder-GGUF/qwen-coder-32b-q8_0.gguf?"),
        ("tinny.gguf", "There is no such file (looked in {models})"),
        ("tinny.gguf", "Did you mean tiny.gguf?"),
        ("~nosuchuser/tiny.gguf", "There is no such file (looked in {models}/~nosuchuser)"),
        ("zzz.gguf", "Models in {models}: Qwen-Coder-GGUF/qwen-coder-32b-q8_0.gguf"),
        (
            "Qwen/Qwen2.5-72B-Instruct-GGUF",
            "hf download Qwen/Qwen2.5-72B-Instruct-GGUF --include '*.gguf'",
        ),
        (
            "Qwen2.5-72B-Instruct-GGUF/qwen2.5-72b-instruct-q8_0.gguf",
            "hf download OWNER/Qwen2.5-72B-Instruct-GGUF"
            " --include '*qwen2.5-72b-instruct-q8_0*.gguf'",
        ),
        (
            "Qwen2.5-72B-Instruct-GGUF/qwen2.5-72b-instruct-q8_0.gguf",
            "To download it: kitty-nb download OWNER/Qwen2.5-72B-Instruct-GGUF:Q8_0 (or: hf",
        ),
        ("Qwen/Qwen2.5-72B-Instruct-GGUF", "kitty-nb download Qwen/Qwen2.5-72B-Instruct-GGUF (or"),
        ("whole/whole-00002-of-00002.gguf", "Write whole/whole-00001-of-00002.gguf."),
        ("big/big-00001-of-00003.gguf", "1 of its 3 shards are missing"),
        ("big/big-00001-of-00003.gguf", "big-00002-of-00003.gguf"),
    ],
)
def test_a_bad_model_path_is_explained(tmp_path: Path, models: Path, value: str, said: str) -> None:
    found = problems(write_env(tmp_path, f"LLAMACPP_PRIMARY_MODEL={value}"))
    assert found.keys() == {"LLAMACPP_PRIMARY_MODEL"}
    assert said.format(models=models) in found["LLAMACPP_PRIMARY_MODEL"]


def test_a_complete_split_model_is_accepted(tmp_path: Path, models: Path) -> None:
    path = write_env(tmp_path, "LLAMACPP_PRIMARY_MODEL=whole/whole-00001-of-00002.gguf")
    config = resolve_model(ServerConfig.from_env(path))
    assert config.model == models / "whole/whole-00001-of-00002.gguf"


def test_a_name_that_is_no_text_is_to_be_changed(models: Path) -> None:
    path = models / os.fsdecode(b"mod\xff.gguf")
    try:
        path.touch()
    except OSError:
        pytest.skip("this system has no such names")
    with pytest.raises(ConfigError, match="not valid UTF-8"):
        resolve_model(ServerConfig(models_dir=models, model=path))


def test_a_comma_in_a_models_name_is_not_in_its_alias(models: Path) -> None:
    (models / "one,two.gguf").touch()  # to llama-server, two names
    assert ServerConfig(models_dir=models, model="one,two.gguf").served_alias == "one_two"


@pytest.mark.parametrize(
    ("file", "alias", "served"),
    [
        (" trailing .gguf", None, "trailing"),
        ("tiny.gguf", " my model ", "my model"),
        (" .gguf", None, "model"),
        ("Big\tOne\u3000.gguf", None, "Big\tOne"),
    ],
)
def test_spaces_around_a_name_are_none_of_it(
    models: Path, file: str, alias: str | None, served: str
) -> None:
    (models / file).touch()
    assert ServerConfig(models_dir=models, model=file, alias=alias).served_alias == served


def test_an_alias_of_spaces_is_refused(models: Path) -> None:
    with pytest.raises(ConfigError, match="one name, without commas"):
        ServerConfig(models_dir=models, alias="  ")


@pytest.mark.parametrize("value", ["../outside.gguf", "{outside}", "whole/../../outside.gguf"])
def test_a_model_outside_the_models_folder_must_be_allowed(
    tmp_path: Path, models: Path, value: str
) -> None:
    outside = tmp_path / "outside.gguf"
    outside.write_bytes(b"GGUF")
    line = f"LLAMACPP_PRIMARY_MODEL={value.format(outside=outside)}"
    said = problems(write_env(tmp_path, line))["LLAMACPP_PRIMARY_MODEL"]
    assert f"outside the models folder, {models}." in said
    assert "LLAMACPP_ALLOW_ABSOLUTE_PATHS=1" in said
    path = write_env(tmp_path, line, "LLAMACPP_ALLOW_ABSOLUTE_PATHS=1")
    model = resolve_model(ServerConfig.from_env(path)).model
    assert model
    assert model.samefile(outside)


def test_a_model_in_the_models_folder_may_be_named_in_any_way(tmp_path: Path, models: Path) -> None:
    (tmp_path / "cache.gguf").write_bytes(b"GGUF")
    (models / "linked.gguf").symlink_to(tmp_path / "cache.gguf")
    (tmp_path / "short").symlink_to(models)
    for value in (
        models / "tiny.gguf",
        "whole/../tiny.gguf",
        "linked.gguf",
        tmp_path / "short/tiny.gguf",
    ):
        path = write_env(tmp_path, f"LLAMACPP_PRIMARY_MODEL={value}")
        assert resolve_model(ServerConfig.from_env(path)).model == models / value


def test_an_unreadable_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("LLAMACPP_PORT=1\nLLAMACPP_CTX='open\n")
    with pytest.raises(ConfigError, match=r"line 2.*close every quote"):
        ServerConfig.from_env(path)


def test_a_named_file_must_exist_but_plain_dot_env_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ServerConfig.from_env() == ServerConfig()
    mine = tmp_path / "my.env"
    with pytest.raises(ConfigError, match=r"Can't read it .*\. Copy \.env\.example there"):
        ServerConfig.from_env(mine)
    mine.write_bytes("# für mich".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"Can't read it .*\. Save it as UTF-8\."):
        ServerConfig.from_env(mine)


def test_plain_dot_env_is_found_in_a_folder_above(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_env(tmp_path, "LLAMACPP_PORT=9005")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    config = ServerConfig.from_env()
    assert (config.port, config.models_dir) == (9005, models)


def test_a_sweep_or_script_hears_of_a_wrong_model_under_the_name_of_its_field(
    models: Path,
) -> None:
    config = ServerConfig(models_dir=models, model="tinny.gguf", mmproj="nope.gguf")
    with pytest.raises(ConfigError, match=r"(?s)model='tinny.gguf'.*mmproj='nope.gguf'"):
        resolve_model(config)
    with pytest.raises(ConfigError, match=r"No model is chosen.*Models in"):
        resolve_model(config.replace(model=None))


def test_replace_validates_like_the_original() -> None:
    config = ServerConfig()
    assert config.replace(context_size="4096").context_size == 4096
    with pytest.raises(ConfigError, match=r"(?s)context_size.*threads") as caught:
        config.replace(context_size="much", threads=0)
    assert [problem.key for problem in caught.value.problems] == ["context_size", "threads"]
    with pytest.raises(ConfigError, match="prot"):
        config.replace(prot=1)


def test_a_config_is_frozen_and_hashable_by_value() -> None:
    assert ServerConfig(port=9000) == ServerConfig().replace(port=9000)
    with pytest.raises(Exception, match="frozen"):
        ServerConfig().port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("host", "endpoint"),
    [
        ("127.0.0.1", "http://127.0.0.1:8082"),
        ("0.0.0.0", "http://127.0.0.1:8082"),
        ("::1", "http://[::1]:8082"),
    ],
)
def test_the_endpoint_is_how_a_client_here_reaches_it(host: str, endpoint: str) -> None:
    assert ServerConfig(host=host).endpoint == endpoint


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8082", "192.168.1.300", "localhost:8082", "my host", "http://here", "1"]
)
def test_a_host_is_an_address_or_a_name_without_a_port(host: str) -> None:
    with pytest.raises(ConfigError, match="Write an address or a host name, without a port"):
        ServerConfig(host=host)


@pytest.mark.parametrize("key", ["log_max_mb", "stall_seconds", "restart_stable_seconds"])
def test_no_number_is_endless(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        ServerConfig(**{key: math.inf})


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ((), ("primary",)),
        (("LLAMACPP_MODEL=a.gguf", "LLAMACPP_CODER_CTX=1"), ("primary", "coder")),
        (("LLAMACPP_VISION_PORT=1", "LLAMACPP_Q4_MODEL=b.gguf"), ("q4", "vision")),
        (
            ("LLAMACPP_ZOO_MODEL=a.gguf", "LLAMACPP_MY_OWN_MODEL=b.gguf", "LLAMACPP_F16_CTX=1"),
            ("f16", "zoo", "my_own"),
        ),
        (("LLAMACPP_PRIMARY_MODEL=", "LLAMACPP_SUMMARY_N_GPU_LAYERS=9"), ("summary",)),
        (("LLAMACPP_ZOO_PORT=1", "LLAMACPP_STOP_GRACE_SECONDS=1", "OTHER_MODEL=x"), ("primary",)),
    ],
)
def test_the_profiles_of_a_file(
    tmp_path: Path, lines: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    assert configured_profiles(write_env(tmp_path, *lines)) == expected


def test_each_role_has_a_port_of_its_own_unless_one_is_written(tmp_path: Path) -> None:
    roles = ("primary", "coder", "q4", "f16", "summary", "vision", "mine")
    path = write_env(tmp_path)
    ports = [ServerConfig.from_env(path, role).port for role in roles]
    assert ports == [8082, 8083, 8084, 8085, 8086, 8087, 8082]
    assert ServerConfig(profile="Coder").port == 8083
    path = write_env(tmp_path, "LLAMACPP_PORT=9000", "LLAMACPP_Q4_PORT=9004")
    assert [ServerConfig.from_env(path, role).port for role in roles[:3]] == [9000, 9000, 9004]
