"""`Bench`, llama-bench's table: on the real engine with the demo model."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anyio
import httpx
import pytest
from terminal import run
from test_cli import write_env

from kitty_nb import ServerConfig
from kitty_nb.errors import ExperimentError, KittyError
from kitty_nb.experiments import Bench, BenchTable
from kitty_nb.experiments.bench import BenchClient, BenchKind, BenchProgress, BenchRow, BenchTest
from kitty_nb.experiments.noise import Noise

WAIT = 120


def test_every_depth_has_a_row_for_prompt_and_answer(config: ServerConfig) -> None:
    seen: list[BenchProgress] = []
    bench = Bench(prompt=64, answer=8, depths=(128, 0), repeats=2, config=config)
    table = bench.run(seen.append).wait(WAIT)

    assert [str(row.test) for row in table.rows] == ["pp64", "tg8", "pp64 @ d128", "tg8 @ d128"]
    assert all(len(row.speeds) == len(row.clock) == 2 for row in table.rows), table
    # No request is shorter than what the server says of it.
    assert all(
        mine <= own for row in table.rows for mine, own in zip(row.clock, row.speeds, strict=True)
    )
    assert [(one.done, one.total) for one in seen] == [(done, 8) for done in range(8)]
    assert "unknown" not in table.build
    frame = table.frame
    assert list(frame["depth"]) == [0, 0, 128, 128]
    assert frame["tokens_per_second"].tolist() == [row.mean for row in table.rows]


def test_an_engine_that_does_not_keep_the_context_is_told_and_not_measured() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        tokens = len(json.loads(request.content)["prompt"])
        timings = {"prompt_n": tokens, "prompt_ms": 10.0, "predicted_n": 1}
        return httpx.Response(200, json={"content": "", "timings": timings})

    async def measure() -> None:
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            client = BenchClient(http, 100)
            assert (await client.measure(BenchTest(BenchKind.PROMPT, 32)))[0] == 3200
            with pytest.raises(ExperimentError, match="128 tokens instead of 32: it does not keep"):
                await client.measure(BenchTest(BenchKind.PROMPT, 32, 96))
            with pytest.raises(ExperimentError, match=r"0 tokens instead of 32\. Look for a limit"):
                await client.measure(BenchTest(BenchKind.ANSWER, 32, 96))

    anyio.run(measure)


def test_a_depth_beyond_the_trained_context_is_a_row_that_says_so(config: ServerConfig) -> None:
    bench = Bench(prompt=16, answer=0, depths=(0, 4096), repeats=1, config=config)
    fits, beyond = bench.run().wait(WAIT).rows
    assert fits.mean
    assert beyond.mean is None
    assert "does not fit into the model's trained context of 4,096 tokens" in beyond.note
    alone = Bench(prompt=16, answer=0, depths=4096, config=config)
    with pytest.raises(ExperimentError, match=r"No test fits .*4,096 tokens"):
        alone.run().wait(WAIT)


def test_there_must_be_something_to_measure(config: ServerConfig) -> None:
    for wrong in ({"prompt": 0, "answer": 0}, {"depths": ()}):
        with pytest.raises(ExperimentError, match="nothing to measure"):
            Bench(config=config, **wrong)
    for name, value in [("repeats", 0), ("depths", -1), ("prompt", 1.5), ("seed", -1)]:
        with pytest.raises(ExperimentError, match=f"{name} is {value}. Write a whole number"):
            Bench(config=config, **{name: value})
    with pytest.raises(KittyError, match=r"gone\.gguf"):
        Bench("gone.gguf", config=config).run().wait(WAIT)


def table(*rows: BenchRow) -> BenchTable:
    settings = (("threads", 2),)
    name = "gemma3 270M Q4_K - Medium"
    return BenchTable(name, 246587904, 268098176, "CPU", settings, "7e4c0a9 (1)", rows)


def test_the_table_is_llama_benchs_to_the_letter() -> None:
    rows = (
        BenchRow(BenchTest(BenchKind.PROMPT, 512), (811.0, 812.0), (810.0, 811.0)),
        BenchRow(BenchTest(BenchKind.ANSWER, 128, 4096), (61.25,), (61.0,)),
    )
    # Printed by llama-bench b10435.
    assert str(table(*rows)).splitlines()[:4] == [
        "| model                          |       size |     params | backend    | threads |"
        "            test |                  t/s |",
        "| ------------------------------ | ---------: | ---------: | ---------- | ------: |"
        " --------------: | -------------------: |",
        "| gemma3 270M Q4_K - Medium      | 235.16 MiB |   268.10 M | CPU        |       2 |"
        "           pp512 |        811.50 ± 0.71 |",
        "| gemma3 270M Q4_K - Medium      | 235.16 MiB |   268.10 M | CPU        |       2 |"
        "   tg128 @ d4096 |         61.25 ± 0.00 |",
    ]
    assert str(table(*rows)).endswith("\n\nbuild: 7e4c0a9 (1)")


def test_a_plot_shows_the_speed_against_the_depth() -> None:
    rows = (
        BenchRow(BenchTest(BenchKind.PROMPT, 512), (811.0, 812.0)),
        BenchRow(BenchTest(BenchKind.ANSWER, 128), (70.0, 72.0)),
        BenchRow(BenchTest(BenchKind.ANSWER, 128, 4096), (61.0,)),
        BenchRow(BenchTest(BenchKind.ANSWER, 128, 9999), reason="It does not fit."),
    )
    (axes,) = table(*rows).plot().axes
    (drawn,) = axes.containers
    assert drawn.get_label() == "tg128"
    assert drawn.lines[0].get_xydata().tolist() == [[0, 71], [4096, 61]]  # type: ignore[attr-defined]
    assert axes.get_ylabel() == "generation tokens per second"
    with pytest.raises(ExperimentError, match="Nothing to plot"):
        table(*rows[1:]).plot(prompts=True)


def test_what_the_clock_does_not_confirm_is_said() -> None:
    held = table(BenchRow(BenchTest(BenchKind.PROMPT, 512), (1000.0,), (500.0,)))
    assert "- pp512: By the clock it is 500.00 t/s" in str(held)
    assert "Close other programs" in str(held)
    alone = replace(held.rows[0], noise=Noise(0.1, 0.0))
    assert alone.note == "By the clock it is 500.00 t/s: something delayed the answers."
    assert held._repr_markdown_() == str(held)
    short = BenchTest(BenchKind.PROMPT, 16)
    quick = table(BenchRow(short, (10_000.0,), (2_000.0,)))  # 6 ms of HTTP
    assert "By the clock" not in str(quick)
    shared = table(BenchRow(short, (9.0,), (9.0,), noise=Noise(0.9, 0.4)))
    assert "- pp16: Other work, in this process or others, used 40 %" in str(shared)
    missing = table(BenchRow(short, reason="It is too deep."))
    assert "- pp16: It is too deep." in str(missing)
    assert "| - |" in re.sub(" +", " ", str(missing))


def test_ctrl_c_prints_the_rows_so_far(
    config: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = BenchClient.measure

    async def interrupted(client: BenchClient, test: BenchTest) -> tuple[float, float]:
        if test.kind is BenchKind.ANSWER:
            signal.raise_signal(signal.SIGINT)
            await anyio.sleep(WAIT)
        return await measure(client, test)

    monkeypatch.setattr(BenchClient, "measure", interrupted)
    words = ("--pp", 16, "--tg", 4, "--depths", "0", "--repeats", 1)
    done = run("bench", *words, "--env", write_env(tmp_path, config))
    assert done.exit_code == 130
    assert re.findall(r"\| +(pp16|tg4) \|", done.stdout) == ["pp16"]


def test_the_terminal_prints_the_table(config: ServerConfig, tmp_path: Path) -> None:
    env = write_env(tmp_path, config)
    words = ("--pp", 16, "--tg", 4, "--depths", "0,32", "--repeats", 1, "--env", env)
    for model in ((), (config.model,), ("demo.gguf",)):
        done = run("bench", *model, *words)
        assert done.exit_code == 0, done.stderr
        assert re.findall(r"\| +(\S+(?: @ d32)?) \| +[\d.]+ ± 0\.00 \|", done.stdout) == [
            *("pp16", "tg4", "pp16 @ d32", "tg4 @ d32")
        ]
    assert run("bench", "--depths", "deep", "--env", env).exit_code == 2
    none = run("bench", "--repeats", 0, "--env", env)
    assert (none.exit_code, none.stderr.count("repeats is 0")) == (1, 1)


def test_cancelling_ends_its_server(misbehaving: Callable[..., ServerConfig]) -> None:
    operation = Bench(config=misbehaving("--never-ready"), prompt=16, depths=0).run()
    with pytest.raises(KittyError):
        operation.wait(1)
    operation.cancel()


@pytest.mark.slow
def test_a_model_with_a_sliding_window_keeps_its_depth(real_config: ServerConfig) -> None:
    bench = Bench(prompt=32, answer=4, depths=1100, repeats=2, config=real_config)
    rows = anyio.run(bench.run_here).rows
    assert all(len(row.speeds) == 2 for row in rows), [row.reason for row in rows]
