from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass, replace
from functools import partial
from html import unescape
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
import pytest
from test_results import row

from kitty_nb import ServerConfig
from kitty_nb.errors import ExperimentError, RunRecordError
from kitty_nb.experiments import (
    Divergence,
    ExactMatch,
    HarnessTask,
    Outcome,
    Perplexity,
    RequestTimes,
    Results,
    RunRecord,
    Suite,
    Sweep,
    Trial,
    TrialResult,
    Workload,
    compare_results,
)
from kitty_nb.experiments.measure import fingerprint_of
from kitty_nb.experiments.trial import ModelFingerprint
from kitty_nb.isolated_server import this_host

ASKED = Workload(("<b>Why</b> & how?", "Long " * 9), 8, (1, 4), at_least=2)
RATE = "generation_tokens_per_second"


def with_requests(one: TrialResult) -> TrialResult:
    """The row with two requests of different lengths at each number at once."""
    assert one.measurement
    each = (RequestTimes(0.0, 0.1, 0.8, 8, 10, 0), RequestTimes(0.0, 0.4, 1.1, 8, 90, 1))
    speeds = tuple(replace(speed, each=each) for speed in one.measurement.speeds)
    return replace(one, measurement=replace(one.measurement, speeds=speeds), host=this_host())


@pytest.fixture
def results(demo_model: Path) -> Results:
    config = ServerConfig(
        models_dir=demo_model.parent,
        model=demo_model,
        context_size=1024,
        extra_args="--metrics --hf-token hush",
    )
    rates = ((2, (20.0, 21.0, 20.5)), (4, (31.0, 31.5, 31.2)))
    rows = [
        with_requests(row(demo_model.name, threads, repeat, rate, 2 + threads, quality=1 / threads))
        for threads, several in rates
        for repeat, rate in enumerate(several, 1)
    ]
    failed = TrialResult(Trial(demo_model.name, (("threads", 8),)), Outcome.SKIPPED, "<too> big")
    return Results(config, (*rows, failed), ASKED)


def test_the_report_is_one_page_that_needs_nothing_else(
    results: Results, demo_model: Path, tmp_path: Path
) -> None:
    path = results.report(tmp_path / "new" / "out.html", title="Threads & <b>caches</b>")
    page = path.read_text()
    assert "<script" not in page
    assert "<b>" not in page
    assert "Threads &amp; &lt;b&gt;caches&lt;/b&gt;" in page
    assert "&lt;too&gt; big" in page
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert set(re.findall(r"https?://[\w./-]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "prefers-color-scheme: dark" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {*re.findall(r'href="#([^"]+)"', page), *re.findall(r"url\(#([^)]+)\)", page)} <= {*ids}
    assert hashlib.sha256(demo_model.read_bytes()).hexdigest() in page
    assert "slower: -34" in page
    assert "with its 98 % interval" in page
    assert page.count("<svg ") == page.count("<figcaption>") == 8
    assert "against memory, GiB, with quality as colour" in page
    assert "threads 4" in page
    assert "hush" not in page


def test_a_report_takes_the_objectives_that_best_takes(results: Results, tmp_path: Path) -> None:
    page = results.report(tmp_path / "out.html", objective=f"-{RATE}").read_text()
    assert "<strong>threads 2</strong>" in page
    best = page.partition('<tr class="best">')[2]
    assert best.index("threads 2") < best.index("threads 4")
    assert "<h2>Best by the least generation" in page
    for wrong in (5, len):
        with pytest.raises(ExperimentError, match=r"objective is .* Write the name of a metric"):
            results.report(tmp_path / "out.html", objective=wrong)  # type: ignore[arg-type]


def test_a_model_may_have_any_name(results: Results, tmp_path: Path) -> None:
    name = "_a$\\frac$ $x_1$ \udcff <script> \x1b"

    def renamed(one: TrialResult) -> TrialResult:
        model = f"{name}.gguf" if dict(one.trial.settings)["threads"] == 4 else "other.gguf"
        return replace(one, trial=replace(one.trial, model=model))

    odd = replace(results, rows=tuple(map(renamed, results.rows)))
    page = odd.report(tmp_path / "out.html").read_text()
    assert "<script" not in page
    shown = name.replace("\udcff", "\\udcff")
    assert shown in odd.to_csv(tmp_path / "out.csv").read_text()
    assert f"{shown}.gguf" in {*pd.read_parquet(odd.to_parquet(tmp_path / "out.parquet"))["model"]}
    drawn = odd.plot("concurrency")
    (legend,) = drawn.legends
    assert len(legend.get_texts()) == 2
    drawn.savefig(tmp_path / "out.png")


def test_a_name_that_no_file_can_have_is_refused_in_a_sentence(results: Results) -> None:
    for write in (results.to_csv, results.to_parquet):
        with pytest.raises(ExperimentError, match="Can't write"):
            write("/tmp/\0")
    with pytest.raises(RunRecordError, match="Can't read"):
        RunRecord.load("\ud800")


def test_a_device_or_pipe_stays_what_it_is(results: Results, tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "out.csv")
    with pytest.raises(ExperimentError, match="device or a pipe"):
        results.to_csv(pipe)
    assert pipe.is_fifo()


ANSWERS = dict.fromkeys(ASKED.prompts, "Yes.")


@dataclass(frozen=True)
class Length:
    """Somebody's own measure of quality."""

    least: int

    def __call__(self, _: str, answer: str) -> float:
        return len(answer) - self.least


@pytest.mark.parametrize(
    ("quality", "written"),
    [
        (ExactMatch(ANSWERS), ExactMatch(ANSWERS)),
        (Suite.standard(each=2), Suite.standard(each=2)),
        (partial(pow, mod=3), None),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (
                (Perplexity(MappingProxyType(ANSWERS)), Perplexity(ANSWERS)),
                (Divergence(Path("big.gguf"), ANSWERS), Divergence("big.gguf", ANSWERS)),  # type: ignore[arg-type]
                (HarnessTask("gsm8k", 5), HarnessTask("gsm8k", 5)),
                (None, None),
                (Length(3), None),
                (lambda _, answer: len(answer), None),
            )
        ),
    ],
)
def test_the_code_in_a_report_makes_the_same_sweep(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quality: Any, written: Any
) -> None:
    results = replace(results, workload=replace(ASKED, quality=quality))
    page = results.report(tmp_path / "out.html").read_text()
    code = unescape(page[page.rindex("<pre>") + 5 : page.rindex("</pre>")])
    monkeypatch.chdir(tmp_path)
    folder = f"LLAMACPP_MODELS_DIR={results.config.models_dir}\n"
    (tmp_path / ".env").write_text(folder)
    found: dict[str, object] = {}
    exec(code.replace("sweep.run().wait()", "None"), found)
    sweep = found["sweep"]
    assert isinstance(sweep, Sweep)
    with sweep:
        assert {one.trial.combination for one in results.rows} == {
            trial.combination for trial in sweep.trials
        }
        assert sweep.workload == replace(ASKED, quality=written)
        assert ("# quality=… (a function of yours)" in code) == (quality is not written is None)
        assert sweep.config.context_size == 1024
        assert sweep.config.extra_args == ("--metrics",)
        assert max(trial.repeat for trial in sweep.trials) == 3


@pytest.mark.slow
def test_a_report_of_a_model_that_is_elsewhere_says_so(results: Results, tmp_path: Path) -> None:
    away = replace(results, config=ServerConfig(models_dir=tmp_path), workload=None)
    away = replace(away, rows=(replace(away.rows[0], host="red x86_64"), *away.rows[1:]))
    page = away.report(tmp_path / "out.html").read_text()
    assert "demo.gguf; the measured files are missing, unreadable or changed here" in page
    assert f">processor of {this_host()}<" in page
    assert "LLAMACPP_PRIMARY_THREADS=4" in page
    assert "Repeat it" not in page


def test_a_report_names_no_checksum_of_a_file_that_was_replaced(
    results: Results, demo_model: Path, tmp_path: Path
) -> None:
    config = results.config.replace(models_dir=tmp_path, model=None)
    model = tmp_path / demo_model.name
    shutil.copyfile(demo_model, model)
    was = fingerprint_of(model.name, config)
    measured = tuple(replace(one, fingerprint=was) for one in results.rows[:-1])
    results = Results(config, (*measured, results.rows[-1]))  # one that found no file
    page = results.report(tmp_path / "before.html").read_text()
    assert hashlib.sha256(model.read_bytes()).hexdigest() in page
    with model.open("ab") as file:
        file.write(bytes(32))
    page = results.report(tmp_path / "after.html").read_text()
    assert f"{model.name}; the measured files are missing, unreadable or changed here" in page
    assert "SHA-256" not in page


def test_curves_of_many_combinations_are_those_of_the_best(
    results: Results, demo_model: Path, tmp_path: Path
) -> None:
    rows = tuple(row(demo_model.name, n, 1, 10.0 + n, 4) for n in range(1, 21))
    page = Results(results.config, rows).report(tmp_path / "out.html").read_text()
    curves = page.split("<svg ")[2]
    assert sorted(map(int, re.findall(r">threads (\d+)<", curves))) == [*range(13, 21)]


def test_nothing_measured_has_no_report(results: Results, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="None of 1 trials was measured"):
        Results(results.config, results.rows[-1:]).report(tmp_path / "out.html")
    with pytest.raises(ExperimentError, match="Did you mean memory_gib"):
        results.report(tmp_path / "out.html", objective="memory_gb")


def test_curves_are_against_requests_at_once_or_the_length_of_prompts(results: Results) -> None:
    (axes,) = results.plot("concurrency", RATE).axes
    lines = {tuple(bars.lines[0].get_ydata()) for bars in axes.containers}  # type: ignore[attr-defined]
    assert lines == {(20.5, 20.5 / 4), (31.2, 31.2 / 4)}
    assert list(axes.get_xticks()) == [1, 4]
    assert axes.get_xlabel() == "requests at once"
    looks = [bars.lines[0] for bars in axes.containers]  # type: ignore[attr-defined]
    assert len({one.get_color() for one in looks}) == len({one.get_marker() for one in looks}) == 2
    (axes,) = results.plot("prompt").axes
    assert axes.get_ylabel() == "time to first token, s"
    assert list(axes.get_xticks()) == [10, 90]
    (axes,) = results.plot("prompt", "time_between_tokens").axes
    assert axes.get_ylabel() == "time between tokens, s"
    with pytest.raises(ExperimentError, match="for a plot against prompt"):
        results.plot("prompt", "memory_gib")


def test_two_sweeps_are_compared_by_combination_and_number(results: Results) -> None:
    def slower(one: TrialResult) -> TrialResult:
        if not one.measurement:
            return one
        speeds = tuple(
            replace(s, generation_tokens_per_second=(s.generation_tokens_per_second or 0) * 0.8)
            for s in one.measurement.speeds
        )
        memory = 2 * one.measurement.memory
        return replace(one, measurement=replace(one.measurement, speeds=speeds, memory=memory))

    elsewhere = [
        replace(slower(one), trial=replace(one.trial, model=f"/models/{one.trial.model}"))
        for one in results.rows
        if dict(one.trial.settings)["threads"] == 2
    ]
    second = Results(results.config, tuple(elsewhere))
    found = compare_results(results, second)
    told = {one.metric: one.difference for one in found.compared}
    assert told[RATE].ratio == pytest.approx(0.8)
    assert told[RATE].verdict == "slower"
    assert told["time_to_first_token"].verdict == "too close to tell"
    assert [dict(trial.settings)["threads"] for trial in found.missing] == [4]
    assert f"| {RATE} | 0.800 | slower" in re.sub(" +", " ", str(found))
    assert found._repr_markdown_() == repr(found) == str(found)  # a table in a notebook
    assert "memory_gib" not in told
    assert "worse: +100.0 %" in str(compare_results(results, second, "memory_gib"))
    frame = compare_results(results, results, ["memory_gib"]).frame
    assert frame["ratio"].tolist() == [1.0, 1.0]
    unscored = [
        replace(one, measurement=one.measurement and replace(one.measurement, quality=None))
        for one in elsewhere
    ]
    with pytest.raises(ExperimentError, match="No combination has quality in both sweeps"):
        compare_results(results, Results(results.config, tuple(unscored)), ["quality"])
    with pytest.raises(ExperimentError, match="no combination in common"):
        compare_results(
            replace(results, rows=results.rows[:3]), replace(results, rows=results.rows[3:])
        )
    failed = Results(results.config, results.rows[-1:])
    with pytest.raises(ExperimentError, match=r"nothing to compare\.\n- 1 of them: <too> big"):
        compare_results(results, failed)


def of_model(one: TrialResult, model: str, size: int | None = None) -> TrialResult:
    file = ModelFingerprint(size, "f" * 24) if size else None
    return replace(one, trial=replace(one.trial, model=model), fingerprint=file)


def test_files_of_one_name_in_two_folders_are_compared_each_with_itself(results: Results) -> None:
    both = tuple(
        of_model(one, f"{folder}/m.gguf") for one in results.rows for folder in ("small", "large")
    )
    two = Results(results.config, both)
    found = compare_results(two, two, RATE)
    assert {one.trial.model for one in found.compared} == {"small/m.gguf", "large/m.gguf"}
    assert len(found.compared) == 4
    one = Results(results.config, tuple(row for row in both if row.trial.model[0] == "s"))
    assert {trial.model for trial in compare_results(two, one).missing} == {"large/m.gguf"}


def test_different_files_of_one_name_are_not_compared(results: Results) -> None:
    sweeps = [
        Results(results.config, tuple(of_model(one, "m.gguf", size) for one in results.rows))
        for size in (1000, 2000)
    ]
    assert compare_results(sweeps[0], sweeps[0], RATE).compared
    with pytest.raises(ExperimentError, match=r"different files named m\.gguf"):
        compare_results(*sweeps)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("parallel", replace(ASKED, parallel=(4,))),
        ("max_tokens", replace(ASKED, max_tokens=9)),
        ("quality", replace(ASKED, quality=Suite.standard())),
    ],
)
def test_sweeps_that_asked_differently_are_not_compared(
    results: Results, name: str, asked: Workload
) -> None:
    with pytest.raises(ExperimentError, match=f"differ in {name}, so .* Run one"):
        compare_results(results, replace(results, workload=asked))
    assert compare_results(results, replace(results, workload=replace(ASKED, seed=5))).compared


def test_the_table_is_written_as_csv(results: Results, tmp_path: Path) -> None:
    read = pd.read_csv(results.to_csv(tmp_path / "trials.csv"))
    assert read[RATE].tolist()[:6] == results.frame[RATE].tolist()[:6]
