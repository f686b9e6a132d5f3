from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import psutil
import pytest

from kitty_nb import ServerConfig
from kitty_nb.errors import ExperimentError
from kitty_nb.experiments import (
    Measurement,
    Outcome,
    Results,
    Trial,
    TrialResult,
    compare_results,
)
from kitty_nb.experiments.metrics import read_objective
from kitty_nb.experiments.trial import LoadSeconds, Speed

pytestmark = pytest.mark.skipif(find_spec("pandas") is None, reason="needs pandas")
GIB = 1 << 30
RATE = "generation_tokens_per_second"


def row(
    model: str, threads: int, repeat: int, rate: float, gib: float, **more: object
) -> TrialResult:
    speeds = tuple(
        Speed(n, 4, 1.0, 0.1 * n, 100.0, rate / n, rate * 0.9 * n**0.5, int((gib - 1 / n) * GIB))
        for n in (1, 4)
    )
    measured = Measurement(
        LoadSeconds(0.1, 1.0, 0.2),
        speeds,
        int(gib * GIB),
        context=8192,
        **more,  # type: ignore[arg-type]
    )
    trial = Trial(model, (("threads", threads), ("cache_type_k", "q8_0")), repeat)
    return TrialResult(trial, Outcome.DONE, "", measured)


@pytest.fixture
def results(demo_model: Path) -> Results:
    config = ServerConfig(models_dir=demo_model.parent, model=demo_model, extra_args="--metrics")
    return Results(
        config,
        (
            row(demo_model.name, 2, 1, 20.0, 4),
            row(demo_model.name, 4, 1, 31.0, 6),
            row(demo_model.name, 2, 2, 26.0, 4),
            row(demo_model.name, 4, 2, 35.0, 7),
            row(demo_model.name, 2, 3, 21.0, 4),
            TrialResult(Trial(demo_model.name, (("threads", 8),)), Outcome.SKIPPED, "too big"),
        ),
    )


def test_the_frame_has_a_row_for_each_trial(results: Results) -> None:
    frame = results.frame
    assert len(frame) == 6
    assert list(frame.columns)[:5] == ["model", "threads", "cache_type_k", "repeat", "outcome"]
    assert frame["generation_tokens_per_second"].tolist()[:2] == [20.0, 31.0]
    assert frame["total_tokens_per_second_4"].notna().sum() == 5
    assert frame["reason"].iloc[5] == "too big"
    assert "too big" in results._repr_html_()
    assert repr(results) == "Results(6 trials of 3 combinations)"


def test_the_summary_has_medians_and_their_spread(results: Results) -> None:
    summary = results.summary.set_index("threads")
    one = summary.loc[2]
    assert one["trials"] == 3
    assert [one[RATE], one[f"{RATE}_low"], one[f"{RATE}_high"]] == [21.0, 20.0, 26.0]
    assert summary.loc[8, "trials"] == 0
    assert summary.loc[8, "reason"] == "too big"


def test_the_best_is_the_best_median_within_the_constraints(results: Results) -> None:
    assert dict(results.best().trial.settings)["threads"] == 4
    label = "demo.gguf, threads 4, cache_type_k q8_0"
    assert repr(results.best()) == f"Combination({label}: 2 measured)"
    fits = results.best(constraints={"memory_gib": 5, "context_size>=": 8192})
    assert dict(fits.trial.settings)["threads"] == 2
    assert dict(results.best("memory_gib").trial.settings)["threads"] == 2
    assert dict(results.best(constraints={"memory_gib_4": 4}).trial.settings)["threads"] == 2
    assert results.best("memory_gib_1").value("memory_gib_1") == 3
    assert dict(results.best(constraints={"threads<": 4}).trial.settings)["threads"] == 2
    assert dict(results.best(constraints={"cache_type_k==": "q8_0"}).trial.settings)["threads"] == 4


def test_what_is_too_close_to_tell_is_said_and_the_settings_in_use_preferred(
    demo_model: Path,
) -> None:
    config = ServerConfig(models_dir=demo_model.parent, model=demo_model, threads=2)

    def results(*rates: tuple[int, tuple[float, ...]]) -> Results:
        rows = [
            row(demo_model.name, threads, n, rate, 4)
            for threads, several in rates
            for n, rate in enumerate(several, 1)
        ]
        return Results(config, tuple(rows))

    noisy = results((8, (589.0, 23.0, 1155.0)), (4, (100.0, 99.0)), (2, (101.0, 98.0)))
    best = noisy.best()
    assert dict(best.trial.settings)["threads"] == 2
    assert [dict(trial.settings)["threads"] for trial in best.close] == [8, 4]
    assert "too close to tell from 2 others" in repr(best)
    assert best.env_lines().startswith("# Too close to tell from 2 others, nearest ")
    clear = results((8, (30.0, 31.0)), (2, (20.0, 21.0))).best()
    assert dict(clear.trial.settings)["threads"] == 8
    assert not clear.close
    assert "close" not in repr(clear) + clear.env_lines()
    once = results((8, (21.0,)), (2, (20.0,)))
    assert "measured once, so 10 % either way may be chance" in once.best().doubt
    assert dict(once.best().trial.settings)["threads"] == 2
    assert dict(results((8, (30.0,)), (2, (20.0,))).best().trial.settings)["threads"] == 8
    slower = results((8, (20.0, 21.0)), (4, (20.5, 21.5)), (2, (30.0, 31.0)))
    assert [dict(trial.settings)["threads"] for trial in slower.best().close] == []
    config = config.replace(threads=None)  # so llama-server has one for each core
    cores = psutil.cpu_count(logical=False) or 1
    unset = results((cores + 1, (21.0,)), (cores, (20.0,)))
    assert dict(unset.best().trial.settings)["threads"] == cores


@pytest.mark.parametrize(
    ("extra", "name", "in_use", "other"),
    [
        ("--cache_type_k q8_0", "cache_type_k", "q8_0", "f16"),
        ("-ctk q8_0", "cache_type_k", "q8_0", "f16"),
        ("", "mmproj", "auto", "off"),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_settings_in_use_are_preferred_wherever_they_are_written(
    demo_model: Path, extra: str, name: str, in_use: str, other: str, order: int
) -> None:
    config = ServerConfig(models_dir=demo_model.parent, model=demo_model, extra_args=extra)
    trials = [Trial(demo_model.name, ((name, value),)) for value in (other, in_use)[::order]]
    rows = (replace(row(demo_model.name, 1, 1, 20.0, 4), trial=trial) for trial in trials)
    assert dict(Results(config, tuple(rows)).best().trial.settings)[name] == in_use


@pytest.mark.parametrize(
    ("objective", "constraints", "told"),
    [
        ("generation_tokens_per_secnd", {}, "Did you mean generation_tokens_per_second?"),
        ("memory_gib", {"memory_gb": 1}, "Did you mean memory_gib?"),
        ("memory_gib", {"memory_gib ~": 1}, "Can't parse"),
        ("memory_gib", {"memory_gib": 1}, "None of 2 combinations satisfies memory_gib <= 1"),
        ("memory_gib", {"cache_type_k": 3}, "None of 2 combinations"),
        ("memory_gib", {"n_gpu_layers": 3}, "None of 2 combinations"),
    ],
)
def test_what_cannot_be_best_is_told(
    results: Results, objective: str, constraints: dict[str, object], told: str
) -> None:
    with pytest.raises(ExperimentError, match=told):
        results.best(objective, constraints)


def test_a_value_that_is_no_measurement_is_left_out_and_told(
    demo_model: Path, tmp_path: Path
) -> None:
    config = ServerConfig(models_dir=demo_model.parent, model=demo_model)
    rates = {(2, 1): float("nan"), (2, 2): 40.0, (4, 1): 20.0, (4, 2): 21.0}
    rows = (row(demo_model.name, *key, rate, 4) for key, rate in rates.items())
    results = Results(config, tuple(rows))
    told = f"{RATE} of repeat 1 is left out: it is nan."
    best = results.best()
    assert dict(best.trial.settings)["threads"] == 2
    assert best.series[RATE] == {2: 40.0}
    assert told in best.reasons
    assert "that can't be a measurement" in best.env_lines().splitlines()[0]
    assert told in results.report(tmp_path / "out.html").read_text()
    compared = compare_results(results, results)
    assert f"second sweep: {told}" in str(compared)
    (pair,) = [
        one.difference
        for one in compared.compared
        if one.metric == RATE and one.trial == best.trial
    ]
    assert pair.rounds == 1


def test_a_metric_that_is_no_number_anywhere_names_the_rows(demo_model: Path) -> None:
    config = ServerConfig(models_dir=demo_model.parent, model=demo_model)
    names = [(threads, repeat) for threads in (2, 4) for repeat in (1, 2)]
    nan = float("nan")
    results = Results(config, tuple(row("m.gguf", *key, 20.0, 4, quality=nan) for key in names))
    told = (
        r"quality is no finite number: nan for m.gguf, threads 2, .* \(repeat 1\); .*; and \d more"
    )
    for asks in (
        lambda: results.best("quality"),
        lambda: results.best(constraints={"quality>=": 0.5}),
        lambda: results.plot(y="quality"),
        lambda: compare_results(results, results, metrics="quality"),
    ):
        with pytest.raises(ExperimentError, match=told):
            asks()
    objective = read_objective(lambda _: nan, ())
    with pytest.raises(ExperimentError, match=r"<lambda> is no finite number: nan for m.gguf"):
        results.choose(objective, ())


def test_nothing_measured_has_no_best_and_no_plot(results: Results) -> None:
    empty = Results(results.config, results.rows[5:])
    with pytest.raises(ExperimentError, match="no best"):
        empty.best()
    with pytest.raises(ExperimentError, match="nothing to plot"):
        empty.plot()
    assert len(Results(results.config, ()).frame) == 0


def test_the_env_lines_of_the_winner_make_its_settings(results: Results, tmp_path: Path) -> None:
    best = results.best()
    env = tmp_path / ".env"
    folder = f"LLAMACPP_MODELS_DIR={results.config.models_dir}\n"
    env.write_text(folder + results.env_lines(profile="coder"))
    config = ServerConfig.from_env(env, "coder")
    assert config.model == best.config.model
    assert config.threads == 4
    assert config.extra_args == ("--metrics", "--cache-type-k", "q8_0")
    assert best.env_lines().splitlines()[0] == "LLAMACPP_PRIMARY_MODEL=demo.gguf"


@pytest.mark.parametrize("kind", ["bars", "parallel", "pareto"])
def test_every_plot_is_a_picture(results: Results, kind: str) -> None:
    figure = results.plot(kind)
    png = figure._repr_png_()  # type: ignore[attr-defined]
    assert png.startswith(b"\x89PNG")
    (axes,) = figure.axes
    words = " ".join(text.get_text() for text in (*axes.get_xticklabels(), axes.xaxis.label))
    assert "generation" in words or kind == "pareto"


def test_plots_show_noise_as_such_and_units(results: Results) -> None:
    (axes,) = results.plot("pareto", y="time_to_first_token_4", x="load_seconds").axes
    assert axes.get_ylabel() == "time to first token, s, 4 at once"
    assert axes.get_xlabel() == "load, s"
    assert axes.get_xlim()[0] <= 0 >= axes.get_ylim()[0]
    assert axes.get_xlim()[1] > 1.04 * 1.3  # the loads' own 1.3 s; no point sits on the frame
    (axes,) = results.plot("pareto").axes
    assert axes.get_xlabel() == "memory, GiB"
    ends = [s for bar in axes.collections for s in getattr(bar, "get_segments", list)()]
    assert any({low[1], high[1]} == {20.0, 26.0} for low, high in ends)
    (axes,) = results.plot("parallel").axes
    drawn = [bars.lines for bars in axes.containers]  # type: ignore[attr-defined]
    assert sorted(points.get_ydata()[-1] for points, *_ in drawn) == pytest.approx(
        [21 / 35, 33 / 35]
    )
    last = [bar.get_segments()[-1] for *_, (bar,) in drawn]
    ends = sorted(float(y) for segment in last for _, y in segment)
    assert ends == pytest.approx([20 / 35, 26 / 35, 31 / 35, 1])
    quick = [row("m.gguf", threads, 1, 1480.0 * threads, 4) for threads in (2, 3)]
    (axes,) = Results(results.config, quick).plot("parallel").axes
    assert {"4,440", "1.3", "0"} < {text.get_text() for text in axes.texts}


def test_a_pareto_plot_of_three_numbers_names_what_nothing_beats(results: Results) -> None:
    rows = [
        row("m.gguf", threads, 1, rate, gib, quality=quality)
        for threads, rate, gib, quality in ((1, 9, 2, 0.2), (2, 8, 3, 0.9), (3, 7, 4, 0.8))
    ]
    figure = Results(results.config, tuple(rows)).plot("pareto", colour="quality")
    axes, bar = figure.axes
    assert bar.get_ylabel() == "quality (more is better)"
    assert bar.get_ylim() == pytest.approx((0.2, 0.9))
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["1: threads 1", "2: threads 2", "beaten by one of these"]
    assert [(text.get_text(), text.xy) for text in axes.texts] == [("1", (2, 9)), ("2", (3, 8))]  # type: ignore[attr-defined]
    colours = axes.collections[-1].get_facecolors()  # type: ignore[attr-defined]
    bright = [sum(colour[:3]) for colour in colours]
    assert bright[0] < bright[2] < bright[1]
    svg = StringIO()
    figure.savefig(svg, format="svg")
    assert "<image" not in svg.getvalue()  # which a report does not show


def test_a_context_left_to_the_engine_is_drawn_beside_the_same_one_written_out() -> None:
    rows = []
    for number, size in enumerate((0, 4096, 8192), 1):
        one = row("", 1, 1, 10.0 * number, 4)
        assert one.measurement
        measured = replace(one.measurement, context=size or 4096)
        trial = Trial("m.gguf", (("context_size", size),) if size else ())
        rows.append(replace(one, trial=trial, measurement=measured))
    results = Results(ServerConfig(), tuple(rows))
    (axes,) = results.plot().axes
    assert len({bar.get_y() for bar in axes.patches}) == 3  # type: ignore[attr-defined]
    (legend,) = results.plot("concurrency").legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *("m.gguf", "m.gguf, context_size 4096", "m.gguf, context_size 8192")
    ]


def test_curves_say_what_their_bars_span(results: Results) -> None:
    (legend,) = results.plot("concurrency").legends
    assert legend.get_title().get_text() == "points are medians, bars the range of the repeats"
    (legend,) = results.plot("pareto").legends  # where none beats another
    assert "beaten by one of these" not in {text.get_text() for text in legend.get_texts()}


def test_long_names_are_saved_whole(results: Results, tmp_path: Path) -> None:
    rows = tuple(row(f"{'long-' * 40}{n}.gguf", 2, 1, 20.0 + n, 4) for n in (1, 2))
    results.plot("concurrency").savefig(tmp_path / "short.svg")
    Results(results.config, rows).plot("concurrency").savefig(tmp_path / "long.svg")
    wide = [
        float((tmp_path / name).read_text().partition('width="')[2].partition("pt")[0])
        for name in ("short.svg", "long.svg")
    ]
    assert wide[1] > 1.5 * wide[0]


def test_numbers_are_told_with_their_unit() -> None:
    from kitty_nb.experiments.plots import words_of  # noqa: PLC0415 - takes a second

    assert [*map(words_of, ("seconds", "memory_gib_1", "clock_ghz", "kl_divergence"))] == [
        *("trial, s", "memory, GiB, 1 at once", "clock, GHz", "KL divergence, nats")
    ]
    assert words_of("time_to_first_token_p99_4") == "time to first token p99, s, 4 at once"


def test_an_unknown_plot_names_the_others(results: Results) -> None:
    for wrong in ("pie", ["pie"]):
        with pytest.raises(ExperimentError, match="bars, parallel, pareto"):
            results.plot(wrong)  # type: ignore[arg-type]
    with pytest.raises(ExperimentError, match="No result has ''"):
        results.plot(y="")
    with pytest.raises(ExperimentError, match="Did you mean memory_gib"):
        results.plot("pareto", x="memory_gb")


def test_numbers_that_no_combination_has_together_are_refused_in_a_sentence() -> None:
    rows = (row("m.gguf", 2, 1, 20.0, 4, quality=0.5), row("m.gguf", 4, 1, 30.0, 4, perplexity=3.0))
    with pytest.raises(ExperimentError, match="No combination has both quality and perplexity"):
        Results(ServerConfig(), rows).plot("pareto", y="quality", x="perplexity")


def test_the_front_holds_what_nothing_beats() -> None:
    from kitty_nb.experiments.plots import front  # noqa: PLC0415 - takes a second

    points = [(4.0, 20.0), (6.0, 30.0), (6.0, 25.0), (7.0, 30.0), (3.0, 10.0)]
    assert front(points, "memory_gib", "generation_tokens_per_second") == [4, 0, 1]
    assert front(points, "quality", "generation_tokens_per_second") == [3]
    rated = [
        (*point, quality) for point, quality in zip(points, (0.5, 0.5, 0.6, 0.4, 0.5), strict=True)
    ]
    assert front(rated, "memory_gib", "generation_tokens_per_second", "quality") == [4, 0, 1, 2]


def test_without_the_extra_the_error_names_it(results: Results) -> None:
    code = (
        "import sys; sys.modules['pandas'] = None\n"
        "from kitty_nb import ServerConfig\n"
        "from kitty_nb.experiments import Results\n"
        "try: Results(ServerConfig(), ()).frame\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ExperimentError")
    assert "pip install 'kitty_nb[experiments]'" in done.stdout


def test_a_sweep_without_optuna_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['optuna'] = None\n"
        "from kitty_nb import ServerConfig\n"
        "from kitty_nb.experiments import Results, RunRecord, Sweep, replay\n"
        "try: Sweep(['m.gguf'], config=ServerConfig())\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ExperimentError optuna can't be imported")
    assert "pip install 'kitty_nb[experiments]'" in done.stdout
