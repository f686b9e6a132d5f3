"""A configuration in the words of each build."""

from __future__ import annotations

from pathlib import Path

import pytest

from kitty_nb import ModelManager, ServerStatus
from kitty_nb.config import FlashAttention, ServerConfig
from kitty_nb.engine.command_line import build_command, sleeps
from kitty_nb.engine.locate import Engine, EngineKind, parse_help
from kitty_nb.errors import ConfigError, EngineError, UnknownFlagError

BASE = """\
-m,    --model FNAME                    model path to load
-a,    --alias STRING                   set alias for model name
--host HOST                             ip address to listen
--port PORT                             port to listen
"""
OLD = (
    BASE
    + """\
-c,    --ctx-size N                     size of the prompt context
-n,    --predict N                      number of tokens to predict
-ngl,  --gpu-layers N                   number of layers to store in VRAM
-fa,   --flash-attn                     enable Flash Attention (default: disabled)
--jinja                                 use jinja template for chat (default: disabled)
"""
)
VAGUE = (
    BASE
    + """\
  -n, --n-predict           maximum tokens to predict (default: -1)
"""
)
NEW = (
    BASE
    + """\
-t,    --threads N                      number of CPU threads to use during generation
-c,    --ctx-size N                     size of the prompt context
-n,    --predict, --n-predict N         number of tokens to predict
-b,    --batch-size N                   logical maximum batch size
-ub,   --ubatch-size N                  physical maximum batch size
-np,   --parallel N                     number of server slots
-ngl,  --gpu-layers, --n-gpu-layers N   max. number of layers to store in VRAM
-fa,   --flash-attn [on|off|auto]       set Flash Attention use
--temp, --temperature N                 temperature
--top-p N                               top-p sampling
--repeat-penalty N                      penalize repeat sequence of tokens
--jinja, --no-jinja                     whether to use jinja template engine for chat
--override-kv KEY=TYPE:VALUE,...        override model metadata by key
--control-vector-layer-range START END  layer range
--metrics                               enable prometheus compatible metrics endpoint
"""
)


def engine(help_text: str) -> Engine:
    return Engine(EngineKind.NATIVE, ("llama-server",), "1 (abc)", parse_help(help_text))


@pytest.fixture
def bare(config: ServerConfig) -> ServerConfig:
    return config.replace(context_size=None, threads=None, parallel=None)


def settings(help_text: str, config: ServerConfig) -> tuple[str, ...]:
    """The words after the flags that every command has."""
    return build_command(engine(help_text), config)[9:]


def test_every_command_says_what_to_serve_and_where(bare: ServerConfig) -> None:
    assert build_command(engine(NEW), bare) == (
        *("llama-server", "--model", str(bare.model), "--alias", "demo"),
        *("--host", "127.0.0.1", "--port", str(bare.port)),
    )


def test_without_an_alias_it_answers_to_the_file_name(bare: ServerConfig) -> None:
    command = build_command(engine(NEW), bare.replace(alias=None, model="demo.gguf"))

    assert command[command.index("--alias") + 1] == "demo"


def test_without_a_model(bare: ServerConfig) -> None:
    with pytest.raises(ConfigError, match="LLAMACPP_PRIMARY_MODEL"):
        build_command(engine(NEW), bare.replace(model=None))


@pytest.mark.parametrize(
    ("change", "old", "new"),
    [
        ({"context_size": 0}, "--ctx-size 0", "--ctx-size 0"),
        ({"n_predict": -1}, "--predict -1", "--n-predict -1"),
        ({"n_gpu_layers": 99}, "--gpu-layers 99", "--n-gpu-layers 99"),
        ({"flash_attention": FlashAttention.ON}, "--flash-attn", "--flash-attn on"),
        ({"flash_attention": FlashAttention.OFF}, "", "--flash-attn off"),
        ({"flash_attention": FlashAttention.AUTO}, "", "--flash-attn auto"),
        ({"tool_calling": True}, "--jinja", "--jinja"),
        ({"tool_calling": False}, "", "--no-jinja"),
    ],
)
def test_each_build_in_its_own_words(
    bare: ServerConfig, change: dict[str, object], old: str, new: str
) -> None:
    assert settings(OLD, bare.replace(**change)) == tuple(old.split())
    assert settings(NEW, bare.replace(**change)) == tuple(new.split())


@pytest.mark.parametrize(("key", "fenced"), [("none", True), ("sesame", False), (None, False)])
def test_without_a_key_only_pages_of_this_machine_may_ask(
    bare: ServerConfig, key: str | None, fenced: bool
) -> None:
    fence = (
        BASE + "--cors-origins ORIGINS                  comma-separated list of allowed origins\n"
    )
    words = ("--cors-origins", "localhost") if fenced else ()
    assert settings(fence, bare.replace(api_key=key)) == words
    assert settings(BASE, bare.replace(api_key=key)) == ()


def test_a_fence_of_ones_own_stays(bare: ServerConfig) -> None:
    fence = (
        BASE + "--cors-origins ORIGINS                  comma-separated list of allowed origins\n"
    )
    own = ("--cors-origins", "https://example.org")
    assert settings(fence, bare.replace(api_key="none", extra_args=own)) == own


def test_value_that_the_help_text_forgot(bare: ServerConfig) -> None:
    assert settings(VAGUE, bare.replace(n_predict=-1)) == ("--n-predict", "-1")
    assert settings(VAGUE, bare.replace(extra_args="-n 7")) == ("-n", "7")


def test_all_settings(bare: ServerConfig) -> None:
    full = bare.replace(
        context_size=4096,
        n_predict=256,
        temperature=0.7,
        top_p=0.9,
        repeat_penalty=1.1,
        n_gpu_layers=20,
        threads=4,
        batch_size=512,
        ubatch_size=256,
        parallel=2,
        extra_args="--metrics",
    )

    assert " ".join(settings(NEW, full)) == (
        "--ctx-size 4096 --n-predict 256 --temp 0.7 --top-p 0.9 --repeat-penalty 1.1"
        " --n-gpu-layers 20 --threads 4 --batch-size 512 --ubatch-size 256 --parallel 2 --metrics"
    )


@pytest.mark.parametrize(
    ("change", "key"),
    [({"temperature": 0.5}, "LLAMACPP_TEMPERATURE"), ({"parallel": 2}, "LLAMACPP_PARALLEL")],
)
def test_setting_that_this_build_lacks(
    bare: ServerConfig, change: dict[str, object], key: str
) -> None:
    with pytest.raises(UnknownFlagError, match=key):
        settings(OLD, bare.replace(**change))


@pytest.mark.parametrize(
    ("build", "speculation", "words"),
    [
        ("none,draft-simple,ngram-simple", "off", "--spec-type none"),
        ("none,draft-simple,ngram-simple", "ngram", "--spec-type ngram-simple"),
        ("none,draft-simple", "draft", "--spec-type draft-simple --model-draft d.gguf"),
        ("[none|ngram-simple]", "ngram", "--spec-type ngram-simple"),
        ("[none|ngram-simple]", "draft", "--model-draft d.gguf"),
        ("", "draft", "--model-draft d.gguf"),
        ("", "off", ""),
    ],
)
def test_speculation_in_the_words_of_each_build(
    bare: ServerConfig, build: str, speculation: str, words: str
) -> None:
    assert settings(_speculating(build), _drafting(bare, speculation)) == tuple(words.split())


@pytest.mark.parametrize(
    ("help_text", "speculation", "message"),
    [
        (OLD, "ngram", "no --spec-type, which LLAMACPP_SPECULATION"),
        (OLD, "draft", "no --spec-draft-model, which LLAMACPP_SPECULATION"),
        ("--spec-type none,draft-simple", "ngram", "no --spec-type ngram-simple, which"),
    ],
)
def test_speculation_that_this_build_lacks(
    bare: ServerConfig, help_text: str, speculation: str, message: str
) -> None:
    with pytest.raises(UnknownFlagError, match=message):
        settings(help_text, _drafting(bare, speculation))


def _speculating(kinds: str) -> str:
    return f"{f'--spec-type {kinds}' if kinds else ''}\n-md, --model-draft FNAME"


def _drafting(config: ServerConfig, speculation: str) -> ServerConfig:
    drafter = Path("d.gguf") if speculation == "draft" else None
    return config.replace(speculation=speculation).model_copy(update={"drafter": drafter})


def test_tool_calling_that_this_build_lacks(bare: ServerConfig) -> None:
    with pytest.raises(UnknownFlagError, match="--jinja"):
        settings(BASE, bare.replace(tool_calling=True))
    assert settings(BASE, bare.replace(tool_calling=False)) == ()


@pytest.mark.parametrize(
    "extra",
    [
        "--metrics -np 4",
        "--predict -1 --temp -.5",
        "--override-kv tokenizer.ggml.add_bos_token=bool:false",
        "--override-kv --looks-like-a-flag",
        "--control-vector-layer-range --1 --2 --metrics",
    ],
)
def test_extra_args_pass_unchanged(bare: ServerConfig, extra: str) -> None:
    assert settings(NEW, bare.replace(extra_args=extra)) == tuple(extra.split())


def test_a_flag_with_underscores_is_the_same_one(bare: ServerConfig) -> None:
    config = bare.replace(extra_args="--top_p 0.9 --override-kv a_b=bool:true")
    assert settings(NEW, config) == ("--top-p", "0.9", "--override-kv", "a_b=bool:true")
    assert config == bare.replace(extra_args=("--top-p", "0.9", "--override-kv", "a_b=bool:true"))


@pytest.mark.parametrize(
    ("seconds", "does"),
    [("5", True), ("0", True), ("-1", False), ("5 --sleep_idle_seconds -1", False)],
)
def test_whether_an_idle_model_is_freed(bare: ServerConfig, seconds: str, does: bool) -> None:
    assert sleeps(bare.replace(extra_args=f"--sleep_idle_seconds {seconds}").extra_args) is does


@pytest.mark.parametrize("flag", ["--api-prefix", "--api_prefix", "--ssl-key-file"])
def test_what_could_not_be_talked_to_is_refused(bare: ServerConfig, flag: str) -> None:
    known = f"{NEW}--api-prefix PREFIX\n--ssl-key-file FNAME\n"
    with pytest.raises(EngineError, match=r"LLAMACPP_EXTRA_ARGS has .* plain HTTP"):
        settings(known, bare.replace(extra_args=(flag, "/api")))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--metrcs", "Did you mean --metrics?"),
        ("--zzz", "llama-server --help"),
        ("--batch 512", "Did you mean --batch-size?"),
        ("--context-size 512", "Did you mean --ctx-size?"),
        ("--stop x", "llama-server --help"),
        ("--max-tokens 5", "llama-server --help"),
        ("--metrcs=1", "--metrcs, which .* Did you mean --metrics?"),
        ("--metrics --stop", "--stop"),
        ("--control-vector-layer-range 1 2 --threds 3", "Did you mean --threads?"),
        ("--ctx-size=4096", "--ctx-size=…: .* Use a space"),
    ],
)
def test_extra_args_that_cannot_work(bare: ServerConfig, extra: str, message: str) -> None:
    with pytest.raises(UnknownFlagError, match=message) as refusal:
        settings(NEW, bare.replace(extra_args=extra))
    assert "LLAMACPP_EXTRA_ARGS" in str(refusal.value)


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ("-m other.gguf", "MODEL"),
        ("--model other.gguf", "MODEL"),
        ("--metrics --host 0.0.0.0", "HOST"),
        ("--port=9000", "PORT"),
        ("-a name", "ALIAS"),
    ],
)
def test_extra_args_that_have_a_key_of_their_own(bare: ServerConfig, extra: str, key: str) -> None:
    with pytest.raises(EngineError, match=f"set LLAMACPP_PRIMARY_{key} instead"):
        settings(NEW, bare.replace(extra_args=extra))


def test_a_structured_log_is_asked_for_where_the_build_has_one(bare: ServerConfig) -> None:
    structured = NEW + "--log-jsonl, --no-log-jsonl             log as JSON lines\n"
    assert settings(structured, bare) == ("--log-jsonl",)
    assert settings(structured, bare.replace(extra_args="--no-log-jsonl"))[-1] == "--no-log-jsonl"
    assert settings(NEW, bare) == ()


LOAD_MODE = NEW + "-lm,   --load-mode MODE                 model loading mode (default: auto)\n"
MMAP = (
    OLD
    + """\
--mlock                                 force system to keep model in RAM
--no-mmap                               do not memory-map model
-md,   --model-draft FNAME              draft model for speculative decoding
--draft-max, --draft, --draft-n N       number of tokens to draft for speculative decoding
"""
)
SPECULATIVE = (
    LOAD_MODE
    + """\
--spec-draft-model, -md, --model-draft FNAME
                                        draft model for speculative decoding
--spec-draft-n-max N                    number of tokens to draft for speculative decoding
--draft, --draft-n, --draft-max N       the argument has been removed. use --spec-draft-n-max or
                                        --spec-ngram-mod-n-max
"""
)


@pytest.mark.parametrize(
    ("help_text", "extra", "spelled"),
    [
        (LOAD_MODE, "--no-mmap", "--load-mode none"),
        (LOAD_MODE, "--mmap", "--load-mode mmap"),
        (LOAD_MODE, "--no_mmap", "--load-mode none"),
        (LOAD_MODE, "--metrics --mlock -np 4", "--metrics --load-mode mlock -np 4"),
        (LOAD_MODE, "--mlock --no-mmap", "--load-mode mlock"),
        (LOAD_MODE, "-dio", "--load-mode dio"),
        (LOAD_MODE, "-fa", "-fa on"),
        (LOAD_MODE, "-fa -np 2", "-fa on -np 2"),
        (LOAD_MODE, "--override-kv --no-mmap", "--override-kv --no-mmap"),
        (MMAP, "-lm none", "--no-mmap"),
        (MMAP, "--load-mode mmap+mlock", "--mlock"),
        (MMAP, "--load-mode mlock", "--no-mmap --mlock"),
        (MMAP, "--load-mode auto", ""),
        (MMAP, "--load-mode mmap --no-mmap", "--no-mmap"),
        (MMAP, "-fa on", "-fa"),
        (MMAP, "--flash-attn off --no-mmap", "--no-mmap"),
        (MMAP, "--n-predict -1", "--predict -1"),
        (MMAP, "--spec-draft-model d.gguf", "--model-draft d.gguf"),
        (MMAP, "--spec-draft-n-max 8", "--draft-max 8"),
        (SPECULATIVE, "-md d.gguf --draft-max 8", "-md d.gguf --spec-draft-n-max 8"),
    ],
)
def test_extra_args_are_spelled_as_the_build_does(
    bare: ServerConfig, help_text: str, extra: str, spelled: str
) -> None:
    assert settings(help_text, bare.replace(extra_args=extra)) == tuple(spelled.split())


def test_a_spelling_that_no_flag_of_the_build_stands_for(bare: ServerConfig) -> None:
    with pytest.raises(UnknownFlagError, match="--load-mode, which"):
        settings(OLD, bare.replace(extra_args="--load-mode dio"))


@pytest.mark.parametrize("extra", ["--no-mmap -fa", "--load-mode none -fa on"])
def test_either_spelling_is_served(config: ServerConfig, engine: Path | None, extra: str) -> None:
    config = config.replace(binary=engine, extra_args=extra)
    with ModelManager(config=config) as manager:
        assert manager.start().wait(60).status is ServerStatus.READY


def test_the_log_tells_of_prompts_where_that_takes_few_lines() -> None:
    config = ServerConfig(model=Path("/m.gguf"))
    levels = NEW + "-lv,   --verbosity N                    threshold. Values:\n - 3: info\n"
    assert "--verbosity" not in build_command(engine(levels), config)
    command = build_command(engine(levels + " - 4: trace (more info)\n"), config)
    assert command[-2:] == ("--verbosity", "4")
