"""Profiles leave for other programs and come back; what those files say is run."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from conftest import demo_config, eventually, unused_port
from model_files import write_projector
from terminal import run

from kitty_nb import ServerConfig, write_demo_model
from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.config import FlashAttention, Speculation
from kitty_nb.config.profiles import add_profiles, configured_profiles
from kitty_nb.engine.command_line import portable_arguments
from kitty_nb.engine.embedded import help_text
from kitty_nb.engine.locate import Engine, EngineKind, parse_help
from kitty_nb.errors import ConfigError, KittyError
from kitty_nb.formats import Format
from kitty_nb.formats.exports import export
from kitty_nb.formats.imports import Imported, import_profiles

EMBEDDED = (sys.executable, "-P", "-m", "kitty_nb.engine.embedded")
FLAGS = ("--hf-token TOKEN", "--chat-template-kwargs STRING", "--override-kv KEY=TYPE:VALUE")
DIALECT = parse_help("\n".join((help_text(), *FLAGS)))
ENGINE = Engine(EngineKind.EMBEDDED, EMBEDDED, "1", DIALECT)


def some_settings(seed: int, model: Path, profile: str) -> ServerConfig:
    """Settings as anybody might have them, with words that each format has to quote."""
    dice = random.Random(seed)
    some: dict[str, list[Any]] = {
        "alias": [None, None, profile, 'it\'s "the" demo', "100%"],
        "context_size": [None, 0, 512],
        "n_predict": [None, -1, 64],
        "temperature": [None, 0.0, 0.7],
        "top_p": [None, 0.9],
        "repeat_penalty": [None, 1.1],
        "n_gpu_layers": [None, 0, 999],
        "threads": [None, 1],
        "batch_size": [None, 64],
        "ubatch_size": [None, 64],
        "parallel": [None, 2],
        "flash_attention": [None, *FlashAttention],
        "tool_calling": [None, True, False],
        "speculation": [None, Speculation.OFF, Speculation.NGRAM],
        "idle_shutdown_seconds": [None, 60],
        "api_key": [None, "none"],
        "extra_args": [
            (),
            ("--seed", "-1", "--no-warmup"),
            ("--override-kv", "a.b=str:two words", "--metrics"),
            ("--chat-template-kwargs", '{"thinking": false, "price": "$1"}'),
        ],
    }
    chosen = {name: dice.choice(values) for name, values in some.items()}
    chosen["port"] = dice.randint(2000, 60000)
    return ServerConfig(profile=profile, model=model, models_dir=model.parent, **chosen)


def compared(config: ServerConfig, *but: str) -> dict[str, object]:
    """The settings, without secrets and found facts, and without where models are looked for."""
    return {
        name: value
        for name, value in config.replace()
        if name not in {"models_dir", "allow_absolute_paths", "api_key", *but}
    }


def come_back(text: str, file: Path, models_dir: Path, **more: Any) -> Imported:
    """Import a file into an empty `.env`, and read what was written there."""
    file.write_text(text)
    env = file.with_name("new.env")
    env.write_text(f"LLAMACPP_MODELS_DIR='{models_dir}'\n")
    found = import_profiles(file, env, dialect=DIALECT, **more)
    add_profiles(found.configs, env)
    read = tuple(ServerConfig.from_env(env, config.profile) for config in found.configs)
    assert [compared(one) for one in read] == [compared(one) for one in found.configs]
    return replace(found, configs=read)


def test_what_left_as_presets_or_for_llama_swap_comes_back(
    demo_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "my models"
    models = [write_demo_model(folder / "two words.gguf"), folder / "demo.gguf"]
    shutil.copy(demo_model, models[1])
    for seed in range(20):
        configs = [
            some_settings(2 * seed + number, model, profile)
            for number, (model, profile) in enumerate(zip(models, ("primary", "mine"), strict=True))
        ]
        resolved = [resolve_model(config) for config in configs]
        # One name can't stand for two models.
        alike = len({config.served_alias for config in resolved}) == 1
        names = {config.profile for config in configs} & {one.served_alias for one in resolved}
        but = ("alias",) if alike or names else ()
        wanted = [compared(config, *but) for config in configs]
        presets = export(Format.ROUTER, resolved).text
        back = come_back(presets, tmp_path / "presets.ini", folder)
        assert [compared(config, *but) for config in back.configs] == wanted, (seed, presets)
        swap = export(Format.LLAMA_SWAP, resolved, ENGINE).text
        back = come_back(swap, tmp_path / "swap.yaml", folder)
        # llama-swap chooses its ports.
        wanted = [compared(config, "port", *but) for config in configs]
        assert [compared(config, "port", *but) for config in back.configs] == wanted, (seed, swap)


def test_llama_swap_finds_no_macro_in_a_path(tmp_path: Path) -> None:
    model = write_demo_model(tmp_path / "it's ${PORT}" / "${x}.gguf")
    config = ServerConfig(models_dir=model.parent, model=model, alias="mine")
    (served,) = yaml.safe_load(export(Format.LLAMA_SWAP, [config], ENGINE).text)["models"].values()
    assert re.findall(r"\$\{.*?\}", served["cmd"]) == ["${PORT}"]
    assert str(model) in shlex.split(served["cmd"])


def test_what_kitty_nb_finds_by_itself_is_left_to_it(tmp_path: Path) -> None:
    """A projector beside the model: its command line names it."""
    model = write_demo_model(tmp_path / "vision" / "seer.gguf")
    projector = write_projector(model.with_name("mmproj-seer-F16.gguf"), 320)
    for mmproj in (None, "off", projector):
        config = ServerConfig(models_dir=tmp_path, model=model, mmproj=mmproj)
        text = export(Format.ROUTER, [resolve_model(config)]).text
        assert (f"mmproj = {projector}" in text) is (mmproj != "off")
        (back,) = come_back(text, tmp_path / "p.ini", tmp_path).configs
        assert back.mmproj == ("off" if mmproj == "off" else None)


def unit_words(line: str) -> list[str]:
    """The words of a line as systemd reads it: `systemd.syntax(7)`, `systemd.service(5)`."""
    words = []
    for found in re.finditer(r'"((?:\\.|[^"\\])*)"|(\S+)', line):
        text = found[2] if found[1] is None else re.sub(r"\\(.)", r"\1", found[1])
        words.append(text.replace("%%", "%").replace("$$", "$"))
    return words


def words_in(form: Format, text: str, port: int) -> list[str]:
    """The command line in a file, as its program would run it here."""
    keys = dict(line.partition("=")[::2] for line in text.splitlines())
    match form:
        case Format.SYSTEMD:
            return unit_words(keys["ExecStart"])
        case Format.QUADLET:
            return [*EMBEDDED, *unit_words(keys["Exec"])]
        case Format.COMPOSE:
            (service,) = yaml.safe_load(text)["services"].values()
            return [*EMBEDDED, *(word.replace("$$", "$") for word in service["command"])]
        case _:
            (model,) = yaml.safe_load(text)["models"].values()
            return shlex.split(model["cmd"].replace("${PORT}", str(port)))


@contextmanager
def running(command: list[str], port: int, key: str) -> Iterator[httpx.Client]:
    environment = os.environ | {"LLAMA_API_KEY": key}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:

                def answers() -> bool:
                    assert process.poll() is None
                    try:
                        return client.get("/health").is_success
                    except httpx.TransportError:
                        return False

                eventually(answers)
                yield client
        finally:
            process.terminate()


@pytest.mark.parametrize("form", [form for form in Format if form is not Format.ROUTER])
def test_the_command_line_in_a_file_serves(form: Format, tmp_path: Path) -> None:
    model = write_demo_model(tmp_path / "a $HOME 100% folder" / "it's.gguf")
    config = demo_config(model, tmp_path, unused_port())
    config = config.replace(alias='a "name" $1 50%', extra_args=("--seed", "-1"))
    text = export(form, [resolve_model(config)], ENGINE).text
    with running(words_in(form, text, config.port), config.port, "sesame") as client:
        assert client.get("/v1/chat/completions").status_code in {401, 404}
        headers = {"Authorization": "Bearer sesame"}
        served = client.get("/v1/models", headers=headers).json()["data"][0]
        assert served["id"] == config.alias
        assert served["meta"]["n_ctx_train"]


def test_a_unit_is_one_that_systemd_takes(
    tmp_path: Path, config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = shutil.which("systemd-analyze")
    if not verify:
        pytest.skip("no systemd-analyze")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    config = resolve_model(config.replace(alias='a "name" $1 50%'))
    text = export(Format.SYSTEMD, [config], ENGINE).text
    for name, changed in (("good", text), ("bad", text.replace("RestartSec", "Restarts"))):
        unit = tmp_path / f"{name}.service"
        unit.write_text(changed)
        command = [verify, "--user", "verify", unit]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ("Unknown key" in done.stderr) is (name == "bad"), done.stderr
        assert name == "bad" or unit.name not in done.stderr


def test_a_container_is_one_that_quadlet_takes(tmp_path: Path, config: ServerConfig) -> None:
    places = os.environ["PATH"], "/usr/libexec/podman", "/usr/lib/podman"
    quadlet = shutil.which("quadlet", path=os.pathsep.join(places))
    if not quadlet:
        pytest.skip("no quadlet, which podman has from 4.4 on")
    config = resolve_model(config.replace(alias='a "name" $1 50%', extra_args=("--seed", "-1")))
    unit = tmp_path / "llama-primary.container"
    unit.write_text(export(Format.QUADLET, [config], image="docker.io/library/mine:1").text)
    done = subprocess.run(
        [quadlet, "-dryrun", "-user"],
        env=os.environ | {"QUADLET_UNIT_DIRS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (start,) = re.findall(r"^ExecStart=(.*)", done.stdout, re.MULTILINE)
    assert unit_words(start)[-len(portable := portable_words(config)) :] == portable


def portable_words(config: ServerConfig) -> list[str]:
    """What a container is to run, where it is reached from outside of it."""
    words = list(portable_arguments(config))
    words[words.index("--host") + 1] = "0.0.0.0"
    return words


def test_containers_get_the_files_and_an_address(
    demo_model: Path, tmp_path: Path, config: ServerConfig
) -> None:
    """Also where the model is a link, as in the Hub's cache."""
    link = tmp_path / "linked" / "demo.gguf"
    link.parent.mkdir()
    link.symlink_to(demo_model)
    template = tmp_path / "chat.jinja"
    template.write_text("")
    extra = ("--chat-template-file", str(template))
    config = resolve_model(config.replace(model=link, host="::1", extra_args=extra))
    compose = yaml.safe_load(export(Format.COMPOSE, [config], image="mine").text)
    service = compose["services"]["primary"]
    assert service["image"] == "mine"
    assert service["ports"] == [f"[::1]:{config.port}:{config.port}"]
    folders = {str(link.parent), str(demo_model.parent), str(tmp_path)}
    assert {one["source"] for one in service["volumes"] if one["read_only"]} == folders
    by_name = export(Format.COMPOSE, [config.model_copy(update={"host": "localhost"})]).text
    assert f"- 127.0.0.1:{config.port}:{config.port}" in by_name
    quadlet = export(Format.QUADLET, [config], image="mine").text
    assert {f"Volume={one}:{one}:ro" for one in folders} <= set(quadlet.splitlines())


def test_no_secret_leaves_or_comes_in(
    tmp_path: Path, config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hunter2"
    servers = json.dumps({"search": {"env": {"KEY": secret}}})
    extra = ("--hf-token", secret, "--mcp-servers-json", servers, "--metrics")
    config = resolve_model(config.replace(api_key=secret, extra_args=extra))
    for form in Format:
        exported = export(form, [config], ENGINE)
        assert secret not in exported.text
        assert {"--hf-token", "--mcp-servers-json"} <= set(" ".join(exported.notes).split())
        assert "metrics" in exported.text
        assert "API_KEY" in exported.text + " ".join(exported.notes)
    foreign = f"[m]\nmodel = {config.model}\napi-key = {secret}\nhf-token = {secret}\n"
    back = come_back(foreign, tmp_path / "f.ini", config.models_dir)
    assert secret not in (tmp_path / "new.env").read_text() + " ".join(back.notes)
    assert "--api-key is left out: set LLAMACPP_API_KEY" in " ".join(back.notes)
    assert "--hf-token is left out: set LLAMACPP_EXTRA_ARGS" in " ".join(back.notes)
    odd = f"[m]\nmodel = {config.model}\nHF_TOKEN = {secret}\nAPI-KEY = {secret}\n"
    back = come_back(odd, tmp_path / "o.ini", config.models_dir)
    assert secret not in (tmp_path / "new.env").read_text() + " ".join(back.notes)
    monkeypatch.setenv("MY_TOKEN", secret)
    command = (
        f"env LLAMA_API_KEY={secret} llama-server -m {config.model} --api-key={secret}"
        f" --header ${{env.MY_TOKEN}} -mu https://me:{secret}@hub.example/m.gguf"
    )
    back = come_back(f"models: {{m: {{cmd: {command!r}}}}}", tmp_path / "o.yaml", tmp_path)
    assert secret not in (tmp_path / "new.env").read_text() + " ".join(back.notes)
    assert "left out: env" in " ".join(back.notes)
    assert "${env.MY_TOKEN} may be a secret" in " ".join(back.notes)


def test_what_a_format_cannot_hold_is_said(config: ServerConfig) -> None:
    config = resolve_model(
        config.replace(log_max_mb=3, restart_max=7, stop_grace_seconds=3, extra_args=["-ot", "a;b"])
    )
    notes = {form: " ".join(export(form, [config], ENGINE).notes) for form in Format}
    assert all("LLAMACPP_PRIMARY_LOG_MAX_MB=3.0" in note for note in notes.values())
    assert {form for form in Format if "RESTART_MAX" in notes[form]} == {
        Format.LLAMA_SWAP,
        Format.ROUTER,
    }
    assert "-ot 'a;b' is left out" in notes[Format.ROUTER]
    odd = config.model_copy(update={"profile": "odd", "model": Path("/x;y.gguf")})
    presets = export(Format.ROUTER, [config, odd])
    assert "odd is left out: in presets, ';' and '#' begin a comment" in " ".join(presets.notes)
    assert "[odd]" not in presets.text
    twice = [config, config.model_copy(update={"profile": "mine"})]
    assert "demo names another profile, too" in " ".join(export(Format.ROUTER, twice).notes)
    with pytest.raises(KittyError, match="holds one profile"):
        export(Format.SYSTEMD, twice, ENGINE)


def test_llama_swap_files_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_demo_model(tmp_path / "models" / "big.gguf")
    monkeypatch.setenv("MY_MODELS", str(tmp_path / "models"))
    text = """
apiKeys: [sk-1]
groups: {all: {members: [gpt-big]}}
globalTTL: 90
macros:
  dir: ${env.MY_MODELS}
  server: >
    /usr/bin/env llama-server --port ${PORT} -ngl all
  args: "-c ${ctx} -fa"
  ctx: 1
models:
  gpt-big:
    macros: {ctx: 4096}
    cmd: |
      # the large one
      ${server} \\
      -m ${dir}/big.gguf
      ${args} --jinja --alias upstream --mlock
    aliases: [gpt-4o]
    filters: {stripParams: temperature}
  small:
    cmd: llama-server -hf ggml-org/tiny-GGUF:Q8_0 -t 4 --port 9001
    ttl: 0
  other:
    cmd: docker run -p 1:2 vllm/vllm-openai
"""
    back = come_back(text, tmp_path / "config.yaml", tmp_path)
    big, small = back.configs
    assert (big.profile, big.model, big.alias) == (
        "gpt_big",
        tmp_path / "models" / "big.gguf",
        "upstream",
    )
    assert (big.context_size, big.flash_attention, big.tool_calling) == (4096, "on", True)
    assert (big.n_gpu_layers, big.extra_args, big.idle_shutdown_seconds) == (999, ("--mlock",), 90)
    assert (small.threads, small.port, small.idle_shutdown_seconds) == (4, 9001, None)
    assert big.port != small.port
    notes = "\n".join(back.notes)
    for told in (
        "apiKeys are left out",
        "'groups' of llama-swap is left out",
        "left out: filters.",
        "kitty-nb download ggml-org/tiny-GGUF:Q8_0",
        "other: its command starts no llama-server",
        "small: it names no model: set LLAMACPP_SMALL_MODEL",
        "clients can ask for upstream only, no longer for gpt-4o, gpt-big",
    ):
        assert told in notes, notes
    assert "sk-1" not in notes


def test_presets_of_others(tmp_path: Path) -> None:
    model = write_demo_model(tmp_path / "a.gguf")
    text = f"""version = 1
[*]
c = 2048 ; for all
LLAMA_ARG_N_GPU_LAYERS = 8
[my-org/a:Q8]
model = {model}
no-mmap = true
flash-attn = on
jinja = false
mlock = 1
cont-batching = off
load-on-startup = true
stop-timeout = 30
[draft]
hf-repo = my-org/b
c = 0
"""
    first, second = (back := come_back(text, tmp_path / "x.ini", tmp_path)).configs
    assert (first.profile, first.alias, first.context_size) == ("my_org_a_q8", "my-org/a:Q8", 2048)
    assert (first.n_gpu_layers, first.tool_calling, first.stop_grace_seconds) == (8, False, 30)
    assert first.extra_args == ("--no-mmap", "--mlock", "--no-cont-batching")
    assert (first.flash_attention, first.model, first.pinned) == ("on", model, True)
    # LLAMACPP_DRAFT_MODEL is a setting of all profiles.
    assert (second.profile, second.context_size) == ("draft2", 0)
    assert "kitty-nb download my-org/b" in " ".join(back.notes)


def test_modelfiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = write_demo_model(tmp_path / "ollama" / "blobs" / f"sha256-{'a' * 64}")
    manifest = tmp_path / "ollama" / "manifests/registry.ollama.ai/library/llama3.2/latest"
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{'a' * 64}"}
    manifest.write_text(json.dumps({"layers": [layer]}))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    text = '''# mine
from llama3.2
PARAMETER temperature 0.3
PARAMETER num_ctx 4096
parameter num_gpu -1
PARAMETER top_k 20
PARAMETER use_mmap false
PARAMETER stop "<|eot|>"
SYSTEM """You are
FROM nowhere
"""
LICENSE """
Free
"""
'''
    back = come_back(text, tmp_path / "Modelfile", tmp_path)
    (config,) = back.configs
    assert (config.profile, config.model, config.alias) == ("llama3_2", blob, "llama3.2")
    assert (config.temperature, config.context_size, config.n_gpu_layers) == (0.3, 4096, -1)
    assert config.extra_args == ("--top-k", "20", "--no-mmap")
    assert "left out: PARAMETER stop, SYSTEM." in " ".join(back.notes)
    file = write_demo_model(tmp_path / "mine.gguf")
    back = come_back("FROM ./mine.gguf", tmp_path / "Modelfile.coder", tmp_path)
    assert [(one.profile, one.model) for one in back.configs] == [("coder", file)]
    back = come_back("FROM qwen3:4b", tmp_path / "Modelfile", tmp_path, name="mine")
    assert back.configs[0].profile == "mine"
    assert "ollama pull qwen3:4b" in " ".join(back.notes)


def test_presets_of_lm_studio(tmp_path: Path) -> None:
    fields = {
        "llm.prediction.temperature": 0.3,
        "llm.prediction.topPSampling": {"checked": True, "value": 0.9},
        "llm.prediction.minPSampling": {"checked": False, "value": 0.5},
        "llm.prediction.systemPrompt": "You are a cat.",
        "llm.prediction.stopStrings": [],
    }
    loads = {
        "llm.load.contextLength": 8192,
        "llm.load.llama.acceleration.offloadRatio": "max",
        "llm.load.llama.flashAttention": True,
        "llm.load.llama.tryMmap": False,
        "llm.load.llama.kCacheQuantizationType": {"checked": True, "value": "q8_0"},
    }

    def listed(given: dict[str, Any]) -> dict[str, Any]:
        return {"fields": [{"key": key, "value": value} for key, value in given.items()]}

    model = write_demo_model(tmp_path / "models" / "me" / "cat" / "cat.gguf")
    kept = tmp_path / ".internal/user-concrete-model-default-config/me/cat/cat.gguf.json"
    kept.parent.mkdir(parents=True)
    preset = {"name": "My Cat", "operation": listed(fields), "load": listed(loads)}
    back = come_back(json.dumps(preset), kept, tmp_path)
    (config,) = back.configs
    assert (config.profile, config.model, config.alias) == ("my_cat", model, "My Cat")
    assert (config.temperature, config.top_p, config.context_size) == (0.3, 0.9, 8192)
    assert (config.n_gpu_layers, config.flash_attention) == (999, "on")
    assert config.extra_args == ("--no-mmap", "--cache-type-k", "q8_0")
    assert "left out: llm.prediction.systemPrompt." in " ".join(back.notes)
    old = {"name": "old", "load_params": {"n_ctx": 1024}, "inference_params": {"temp": 0.5}}
    back = come_back(json.dumps(old), tmp_path / "o.preset.json", tmp_path, model=model)
    (config,) = back.configs
    assert (config.context_size, config.temperature, config.model) == (1024, 0.5, model)


# Each line is several times the one before.
BOMB = "b0: &b0 [x]\n" + "".join(f"b{n}: &b{n} [*b{n - 1}, *b{n - 1}]\n" for n in range(1, 41))
MACROS = "m0: x, " + ", ".join(f"m{n}: '${{m{n - 1}}}${{m{n - 1}}}'" for n in range(1, 41))


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.yaml", "models: [", "Can't read"),
        ("a.yaml", "- 1", "Can't read"),
        ("a.yaml", "models: {a: {cmd: python x.py}}", "holds no profile"),
        ("a.ini", "nonsense", "Can't read"),
        ("a.json", "{", "Can't read"),
        ("a.json", "[]", "Can't read"),
        ("a.txt", "hello", "--from"),
        ("Modelfile", "FROM\n", "--from"),
        ("a.yaml", "models: {a: b}", "unexpected form"),
        ("a.yaml", "[" * 5000, "unexpected form"),
        ("a.json", "[" * 200_000, "unexpected form"),
        ("a.json", '{"fields": [{}]}', "unexpected form"),
        ("a.yaml", "models: {a: {cmd: llama-server 'x}}", "command of a can't be split"),
        ("a.yaml", f"{BOMB}models: {{a: {{cmd: *b40}}}}", "unexpected form"),
        ("a.yaml", f"{BOMB}models: {{a: {{cmd: llama-server, ttl: *b40}}}}", "unexpected form"),
        ("a.yaml", f"macros: {{{MACROS}}}\nmodels: {{a: {{cmd: '${{m40}}'}}}}", "without end"),
        ("a.yaml", "#" * 1_000_001, "larger than"),
        ("a.yaml", 'models: {a: {cmd: "llama-server -m /x.gguf -x \\0"}}', "NUL"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    (tmp_path / "none.env").touch()
    with pytest.raises(KittyError, match=told):
        import_profiles(tmp_path / name, tmp_path / "none.env")


def test_a_profile_is_not_taken_for_a_setting_of_another(tmp_path: Path) -> None:
    file = tmp_path / "presets.ini"
    file.write_text("[qwen]\nmodel = q.gguf\n[qwen-draft]\nmodel = d.gguf\n")
    env = tmp_path / "new.env"
    env.write_text("")
    add_profiles(import_profiles(file, env).configs, env)
    assert configured_profiles(env) == ("qwen", "qwen_draft2")
    assert ServerConfig.from_env(env, "qwen").draft_model is None


def test_the_terminal_exports_and_imports(tmp_path: Path) -> None:
    write_demo_model(tmp_path / "models" / "demo.gguf")
    env = tmp_path / "old.env"
    settings = (
        "LLAMACPP_MODELS_DIR=models\nLLAMACPP_PRIMARY_MODEL=demo.gguf\nLLAMACPP_PRIMARY_CTX=512\n"
        "LLAMACPP_MINE_MODEL=demo.gguf\nLLAMACPP_MINE_PORT=9000\nLLAMACPP_MINE_API_KEY=hunter2\n"
    )
    env.write_text(settings)
    done = run("export", "router", "--all", "--env", env)
    assert done.exit_code == 0, done.output
    assert "hunter2" not in done.output
    assert "LLAMA_API_KEY" in done.stderr
    presets = tmp_path / "presets.ini"
    presets.write_text(done.stdout)
    refused = run("import", presets, "--env", env)
    assert refused.exit_code == 1
    assert "already" in refused.stderr
    assert "add --replace" in refused.stderr
    assert env.read_text() == settings
    new = tmp_path / "new.env"
    new.write_text("LLAMACPP_MODELS_DIR=models\n")
    printed = run("import", presets, "--env", new, "--print")
    assert "LLAMACPP_MINE_PORT=9000" in printed.stdout
    assert "LLAMACPP_PRIMARY_MODEL=demo.gguf" in printed.stdout
    assert new.read_text().count("\n") == 1
    done = run("import", presets, "--env", new)
    assert "Saved to" in done.stdout
    assert new.read_text() == f"LLAMACPP_MODELS_DIR=models\n{printed.stdout}"
    for profile in ("primary", "mine"):
        there = ServerConfig.from_env(new, profile)
        assert compared(there, "alias") == compared(ServerConfig.from_env(env, profile), "alias")
    presets.write_text(presets.read_text().replace("9000", "9001"))
    assert run("import", presets, "--env", new, "--replace").exit_code == 0
    assert ServerConfig.from_env(new, "mine").port == 9001
    with pytest.raises(ConfigError, match=r"already.* with --profile"):
        add_profiles([there], new)
    preset = tmp_path / "old.preset.json"
    preset.write_text('{"load_params": {"n_ctx": 256}}')
    done = run("import", preset, "--env", new, "--print", "--model", "demo.gguf")
    assert "LLAMACPP_OLD_MODEL=demo.gguf" in done.stdout
    assert done.stderr == ""


def test_profiles_that_no_other_program_can_run_do_not_keep_the_rest_from_it(
    tmp_path: Path,
) -> None:
    write_demo_model(tmp_path / "models" / "demo.gguf")
    env = tmp_path / "all.env"
    env.write_text(
        "LLAMACPP_MODELS_DIR=models\nLLAMACPP_PRIMARY_MODEL=demo.gguf\n"
        "LLAMACPP_FAR_SSH=red\nLLAMACPP_FAR_MODEL=other.gguf\nLLAMACPP_FRONT_MODELS=all\n"
    )
    done = run("export", "router", "--all", "--env", env)
    assert done.exit_code == 0, done.output
    assert "[primary]" in done.stdout
    assert "[far]" not in done.stdout
    for left_out in ("far runs on red", "front is a router"):
        assert left_out in done.stderr
    nobody = f"LLAMACPP_GPU_URL=http://127.0.0.1:{unused_port()}\n"
    env.write_text(env.read_text() + nobody)
    assert "set LLAMACPP_GPU_ALIAS" not in run("export", "router", "--all", "--env", env).stderr
    done = run("export", "llama-swap", "--all", "--env", env)
    assert [*yaml.safe_load(done.stdout)["models"]] == ["primary"]
    assert "gpu is left out: http" in done.stderr
    assert "set LLAMACPP_GPU_ALIAS" in done.stderr
    env.write_text(nobody + nobody.replace("GPU", "TPU"))
    assert "no profile to export" in run("export", "llama-swap", "--all", "--env", env).stderr
    env.write_text("LLAMACPP_FAR_SSH=red\nLLAMACPP_FAR_MODEL=other.gguf\n")
    assert "no profile to export" in run("export", "router", "--all", "--env", env).stderr


def test_every_file_says_how_to_use_it(config: ServerConfig) -> None:
    for form in Format:
        first = export(form, [resolve_model(config)], ENGINE).text.splitlines()[0]
        assert first[0] in "#;"
