"""The engine inside the wheel behaves as llama-server does."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import pytest
from conftest import LOCAL, eventually

from kitty_nb.config import FlashAttention
from kitty_nb.engine import embedded
from kitty_nb.engine.command_line import build_command
from kitty_nb.engine.locate import locate_engine, parse_help

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from kitty_nb.config import ServerConfig
    from kitty_nb.engine.locate import Option

xllamacpp = pytest.importorskip("xllamacpp")

COMMAND = (sys.executable, "-P", "-m", embedded.__name__)
DIALECT = parse_help(embedded.help_text())


def set_up(*words: str) -> Any:
    """The parameters that a command line ends up as."""
    params = xllamacpp.CommonParams()
    for flag, value in embedded.read_arguments(words):
        embedded.set_option(params, flag, value)
    return params


def test_help_reads_back_as_the_table() -> None:
    heads = ["-h, --help, --usage", "--version", "--list-devices", *embedded.OPTIONS]

    for option, head in zip(DIALECT.options, heads, strict=True):
        names, value = re.fullmatch(r"((?:-\S+, )*-\S+)(?: (.*))?", head).groups()
        assert option.flags == tuple(names.split(", "))
        assert option.values == bool(value)


@pytest.mark.parametrize("option", DIALECT.options[3:], ids=lambda option: option.flags[-1])
def test_every_option_is_one_that_the_wheel_has(option: Option, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("{}")
    samples = {
        **dict.fromkeys(re.findall(r"--\S+-file", " ".join(option.flags)), str(file)),
        "--chat-template-kwargs": '{"name": 1}',
        **dict.fromkeys(re.findall(r"--cpu-range\S*", " ".join(option.flags)), "0-1"),
        "--device-draft": "none",
        "--json-schema": '{"type": "string"}',
        "--lora-scaled": "adapter.gguf:0.5",
        "--media-path": str(tmp_path),
        "--override-tensor": "ffn=CPU",
        "--override-tensor-draft": "ffn=CPU",
        "--samplers": "top_k;temperature",
        "--sampling-seq": "kt",
        "--slot-save-path": str(tmp_path),
        "--spec-type": "ngram-mod,draft-simple",
    }

    for flag in option.flags:
        for value in option.choices or (samples.get(option.flags[-1], "1"),):
            set_up(flag, *[value] * option.values)


def test_a_target_is_written_down_only_where_the_name_does_not_tell() -> None:
    params = xllamacpp.CommonParams()

    for head, target in embedded.OPTIONS.items():
        names = [name.partition(" ")[0] for name in head.split(", ")]
        derived = embedded.attribute_of(params, names)
        assert target != derived if target else derived, head


@pytest.mark.native
def test_every_option_of_llama_server_is_there_or_has_a_reason(native_engine: Path) -> None:
    """A native build's options, those that the wheel does and those that it cannot do."""
    done = subprocess.run([native_engine, "--help"], capture_output=True, text=True, check=True)
    without = [row.removeprefix("without ") for row in embedded.TABLE if row.startswith("without ")]
    explained = {
        flag: reason
        for names, _, reason in (one.partition("  ") for one in without)
        for flag in names.split(", ")
    }

    known = parse_help(done.stdout).options
    missing = [flag for option in known for flag in option.flags if not DIALECT.option(flag)]

    assert [flag for flag in missing if not explained.get(flag)] == []
    assert [flag for flag in explained if DIALECT.option(flag)] == []
    for option in known:
        if ours := DIALECT.option(option.flags[0]):
            assert ours.values == option.values, option.flags


def test_values_arrive() -> None:
    params = set_up(
        *("--ctx_size", "4096", "-fa", "off", "--no-jinja", "-nkvo", "--load-mode", "mmap+mlock"),
        *("-ngl", "all", "--alias", "a, b", "--seed", "-1", "--reasoning", "off", "-ctk", "q8_0"),
        *("--chat-template-kwargs", '{"deep": true}', "--timeout", "7", "--rerank"),
        *("--spec-type", "ngram-mod,draft-simple", "--spec-ngram-mod-n-max", "32", "-ngld", "all"),
        *("-md", "draft.gguf", "--spec-draft-n-max", "5", "--no-spec-draft-backend-sampling"),
        *("-Cr", "1-2", "-Cbd", "0x5", "--prio-draft", "2", "-fitt", "512", "-ncmoe", "2"),
        *("--json-schema", '{"type": "string"}', "--sampler-seq", "kt", "--no-repack"),
        *("--lora-scaled", "a:0.5,b:2", "--no-reasoning-preserve", "--spec-draft-poll", "1"),
    )

    assert params.n_ctx == 4096
    assert params.flash_attn_type.name == "LLAMA_FLASH_ATTN_TYPE_DISABLED"
    assert not params.use_jinja
    assert params.no_kv_offload
    assert params.load_mode.name == "LLAMA_LOAD_MODE_MMAP_MLOCK"
    assert params.n_gpu_layers == -2
    assert params.model_alias == {"a", "b"}
    assert params.sampling.seed == 2**32 - 1
    assert params.enable_reasoning == 0
    assert params.default_template_kwargs == {
        "enable_thinking": "false",
        "deep": "true",
        "preserve_reasoning": "false",
    }
    assert params.cache_type_k.name == "GGML_TYPE_Q8_0"
    assert params.timeout_read == params.timeout_write == 7
    assert [kind.name for kind in params.speculative.types] == [
        "COMMON_SPECULATIVE_TYPE_NGRAM_MOD",
        "COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE",
    ]
    draft = params.speculative.draft
    assert params.speculative.ngram_mod.n_max == 32
    assert (draft.mparams.path, draft.n_max, draft.n_gpu_layers) == ("draft.gguf", 5, -2)
    assert not draft.backend_sampling
    assert params.cpuparams.cpumask[:4] == [False, True, True, False]
    assert draft.cpuparams_batch.cpumask[:4] == [True, False, True, False]
    assert draft.cpuparams_batch.mask_valid
    assert draft.cpuparams.priority.name == "GGML_SCHED_PRIO_HIGH"
    assert draft.cpuparams.poll == 1
    assert set(params.fit_params_target) == {512 << 20}
    assert params.tensor_buft_overrides.count("=CPU") == 2
    assert params.sampling.grammar.type == xllamacpp.common_grammar_type(2)
    assert params.sampling.samplers == "top_k;temperature"
    assert params.no_extra_bufts
    assert [(one.path, one.scale) for one in params.lora_adapters] == [("a", 0.5), ("b", 2.0)]
    assert params.embedding
    assert params.pooling_type.name == "LLAMA_POOLING_TYPE_RANK"


@pytest.mark.parametrize(
    ("words", "origins"),
    [
        ((), "*"),
        (("--tools", "read_file"), "localhost"),
        (("--agent",), "localhost"),
        (("--agent", "--no-agent"), "*"),
        (("--cors-origins", "*", "--mcp-servers-json", "{}"), "*"),
    ],
)
def test_tools_are_closed_to_other_web_pages(words: tuple[str, ...], origins: str) -> None:
    params = set_up(*words)
    embedded.close_to_pages(params)

    assert params.cors_origins == origins


def test_an_explicit_0_asks_for_the_whole_context() -> None:
    assert set_up("-c", "0").fit_params_min_ctx == -1
    assert set_up("-c", "512").fit_params_min_ctx == xllamacpp.CommonParams().fit_params_min_ctx


def test_sampling_that_was_asked_for_wins_over_the_models_advice() -> None:
    marks = xllamacpp.common_params_sampling_config
    wanted = marks.COMMON_PARAMS_SAMPLING_CONFIG_TEMP | marks.COMMON_PARAMS_SAMPLING_CONFIG_TOP_P

    assert set_up("--temp", "0.5", "--top-p", "0.9").sampling.user_sampling_config == wanted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--nonsense",), "error: invalid argument: --nonsense"),
        (("--ctx-size=4096",), "error: invalid argument: --ctx-size=4096"),
        (("stray",), "error: invalid argument: stray"),
        (("--metrics", "--port"), 'error while handling argument "--port": expected value'),
        (("-fa", "maybe"), "error while handling argument \"-fa\": 'maybe' is not one of on, off"),
        (("-c", "many"), 'error while handling argument "-c": invalid literal'),
        (("-c", "9" * 20), 'error while handling argument "-c":'),
        (("--slot-save-path", "/nowhere"), "not a directory: /nowhere"),
        (("--chat-template-file", "/nowhere"), "No such file"),
        (("--chat-template-kwargs", "[1]"), 'error while handling argument "--chat-template-kw'),
    ],
)
def test_refused_command_line(words: tuple[str, ...], message: str) -> None:
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_does_not_load_the_wheel() -> None:
    code = (
        "import runpy, sys, contextlib\n"
        "sys.argv = ['llama-server', '--help']\n"
        "with contextlib.suppress(SystemExit):\n"
        f"    runpy.run_path({embedded.__file__!r}, run_name='__main__')\n"
        "assert 'xllamacpp' not in sys.modules\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "--flash-attn [on|off|auto]" in done.stdout


def test_version() -> None:
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=True)

    assert re.match(r"version: \d+ \(xllamacpp [\d.]+\)", done.stdout)


def test_all_that_the_manager_writes_is_understood(config: ServerConfig) -> None:
    full = config.replace(
        n_predict=1,
        temperature=0.0,
        top_p=1.0,
        repeat_penalty=1.0,
        n_gpu_layers=0,
        batch_size=64,
        ubatch_size=64,
        flash_attention=FlashAttention.AUTO,
        tool_calling=False,
        speculation="draft",
        extra_args="--metrics -np 2",
    )
    engine = anyio.run(locate_engine)

    set_up(*build_command(engine, full)[len(engine.command) :])


class Serving:
    """An embedded server under test."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", **LOCAL, timeout=10)
        self._log = log

    def health(self) -> int:
        """The status code of `/health`, 0 when nobody answers."""
        try:
            return self.http.get("/health").status_code
        except httpx.HTTPError:
            return 0

    def until(self, status: int) -> None:
        eventually(lambda: self.health() == status or self.ended(), why=f"/health {status}")
        assert self.health() == status, self.log

    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def log(self) -> str:
        return self._log.read_text()


@contextmanager
def serving(
    model: Path, port: int, log: Path, *flags: str, env: Mapping[str, str] | None = None
) -> Iterator[Serving]:
    command = [*COMMAND, "-m", str(model), "--port", str(port), "-a", "demo", "-t", "1", *flags]
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **(env or {})}
        ) as process,
    ):
        server = Serving(process, port, log)
        try:
            yield server
        finally:
            server.http.close()
            process.kill()


def chat(**changes: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, **changes}


def test_it_serves_until_it_is_asked_to_stop(
    demo_model: Path, free_port: int, tmp_path: Path
) -> None:
    with serving(demo_model, free_port, tmp_path / "log") as server:
        server.until(200)

        assert server.http.get("/v1/models").json()["data"][0]["id"] == "demo"
        answer = server.http.post("/v1/chat/completions", json=chat(max_tokens=8)).json()
        assert answer["choices"][0]["message"]["content"].strip()
        assert len(server.http.get("/slots").json()) == 4  # automatic, as llama-server does

        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


def test_it_stops_in_the_middle_of_an_answer(
    demo_model: Path, free_port: int, tmp_path: Path
) -> None:
    with serving(demo_model, free_port, tmp_path / "log", "--ignore-eos") as server:
        server.until(200)
        endless = chat(stream=True, max_tokens=-1)
        with server.http.stream("POST", "/v1/chat/completions", json=endless) as answer:
            next(answer.iter_raw())

            server.process.send_signal(signal.SIGINT)
            # It may be answering a moment before it handles signals, which end it all the same.
            assert server.process.wait(60) in {0, -signal.SIGINT}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_in_the_middle_of_a_load(
    number: signal.Signals, free_port: int, tmp_path: Path
) -> None:
    never_there = tmp_path / "model.gguf"
    os.mkfifo(never_there)  # opening it blocks, so the load never ends
    with serving(never_there, free_port, tmp_path / "log") as server:
        server.until(503)

        server.process.send_signal(number)
        assert server.process.wait(60) == -number


def test_busy_port(demo_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with serving(demo_model, port, tmp_path / "log") as server:
            assert server.process.wait(60) == 1

            assert "couldn't bind HTTP server socket" in server.log
            assert "Traceback" not in server.log


def test_file_that_is_no_model(free_port: int, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.gguf"
    garbage.write_text("not a model")
    with serving(garbage, free_port, tmp_path / "log") as server:
        assert server.process.wait(60) == 1

        assert "invalid magic" in server.log
        assert "Traceback" not in server.log


def test_key_from_the_environment(demo_model: Path, free_port: int, tmp_path: Path) -> None:
    env = {"LLAMA_API_KEY": "secret"}
    with serving(demo_model, free_port, tmp_path / "log", env=env) as server:
        server.until(200)

        assert server.http.get("/v1/models").status_code == 401
        bearer = {"Authorization": "Bearer secret"}
        assert server.http.get("/v1/models", headers=bearer).status_code == 200
