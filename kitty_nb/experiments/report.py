"""The results of a sweep as one page of HTML: no scripts, no other files, light and dark."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from html import escape
from io import StringIO
from pathlib import PurePath
from pprint import pformat
from typing import TYPE_CHECKING

from anyio.from_thread import start_blocking_portal
from rich.filesize import decimal

from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.config import takes_secret
from kitty_nb.errors import ConfigError, ExperimentError, ModelFileError
from kitty_nb.experiments.extras import extra
from kitty_nb.experiments.metrics import smaller_is_better
from kitty_nb.experiments.plots import labels_of, words_of
from kitty_nb.experiments.recording import digest_model, host_facts, library_versions
from kitty_nb.isolated_server import SERVER_SETTINGS, this_host

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from matplotlib.figure import Figure

    from kitty_nb.catalog.cache import FileDigest
    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.combination import Combination
    from kitty_nb.experiments.results import Results
    from kitty_nb.experiments.trial import Trial

    Labels = dict[Trial, str]

_INK = "#010203"  # stands for the page's own colour of text, whichever it is
_CURVES = 8
_WIDTH = 5.6  # inches, so that text has the size of the page's small print
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
_SHOWN = (
    "generation_tokens_per_second",
    "prompt_tokens_per_second",
    "time_to_first_token",
    "time_to_first_token_p90",
    "time_between_tokens_p90",
    "memory_gib",
    "quality",
    "perplexity",
)
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --page: #fff; --line: #d4d9e0; --soft: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --page: #14171c; --line: #3a414b; --soft: #1d2128; }
}
body { color: var(--ink); background: var(--page); font: 16px/1.5 system-ui, sans-serif;
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
thead th { vertical-align: bottom; } td.n, th.n { text-align: right; }
tbody th { white-space: nowrap; } td small { white-space: nowrap; opacity: .75; }
tr.best td, tr.best th { font-weight: 600; background: var(--soft); }
pre { background: var(--soft); border: 1px solid var(--line); padding: .8rem; overflow-x: auto;
  font-size: .85rem; }
.figures { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
figure { margin: 0; } figcaption { font-size: .9rem; }
figure svg { max-width: 100%; height: auto; color: var(--ink); }
.hash { overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .8rem; }
"""


def report_of(results: Results, objective: str, title: str) -> str:
    """Return the page.

    Args:
        results: What was measured.
        objective: The number to judge by.
        title: Of the page.

    Raises:
        ExperimentError: Nothing was measured, or there is no such number.
    """
    config = results.config
    results = replace(results, config=config.replace(extra_args=(*_shown(config.extra_args),)))
    best = results.best(objective)
    measured = [one for one in results.combinations if objective in one.metrics]
    labels = dict(zip((one.trial for one in measured), labels_of(measured), strict=True))
    spread = f" It is {best.doubt}." if best.doubt else ""
    made = datetime.now(UTC)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{len(results.rows)} trials of {len(results.combinations)} combinations,"
        f" {made:%Y-%m-%d %H:%M} UTC.</p>",
        f"<h2>Best by {escape(words_of(objective))}</h2>",
        f"<p><strong>{escape(labels[best.trial])}</strong>:"
        f" {_figure_of(best, objective)}.{escape(spread)}</p>",
        f"<pre>{escape(best.env_lines())}</pre>",
        "<h2>Table</h2>",
        "<p>Medians; in brackets, the least and the greatest of the repeats.</p>",
        _combinations(measured, labels, best, objective),
        "<h2>Verdicts</h2>",
        f"<p>Each combination against the best, by {escape(words_of(objective))}: the ratio over"
        " the rounds of repeats, with its confidence interval.</p>",
        _table(
            ("combination", "verdict", "rounds"),
            _verdicts(results, measured, labels, best, objective),
        ),
        *_failures(results),
        "<h2>Figures</h2>",
        "<p>Points are medians; bars span the least to the greatest of the repeats, or, against the"
        f" length of the prompt, of the requests. Curves are of the best {_CURVES}, at most.</p>",
        '<div class="figures">',
        *_figures(results, objective, curves=_best_of(results, measured, objective)),
        "</div>",
        "<h2>Machine, engine and model</h2>",
        _table(("", ""), [*_machine(results), *_models(results)]),
        *_code(results),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy"'
        " content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _figure_of(one: Combination, name: str) -> str:
    spread = one.metrics[name]
    if one.done == 1:
        return _number(spread.median)
    ends = f"{_number(spread.low)} to {_number(spread.high)}"
    return f"{_number(spread.median)} <small>({ends})</small>"


def _combinations(
    measured: Sequence[Combination], labels: Labels, best: Combination, objective: str
) -> str:
    there = {name for one in measured for name in one.metrics}
    names = [name for name in dict.fromkeys((objective, *_SHOWN)) if name in there]
    sign = 1 if smaller_is_better(objective) else -1
    head = "".join(f'<th class="n" scope="col">{escape(words_of(name))}</th>' for name in names)
    rows = []
    for one in sorted(measured, key=lambda one: sign * one.metrics[objective].median):
        cells = "".join(
            f'<td class="n">{_figure_of(one, name) if name in one.metrics else ""}</td>'
            for name in names
        )
        mark = ' class="best"' if one.trial == best.trial else ""
        rows.append(
            f'<tr{mark}><th scope="row">{escape(labels[one.trial])}</th>'
            f'<td class="n">{one.done}</td>{cells}</tr>'
        )
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">combination</th>'
        f'<th class="n" scope="col">trials</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _verdicts(
    results: Results,
    measured: Sequence[Combination],
    labels: Labels,
    best: Combination,
    objective: str,
) -> Iterator[tuple[str, ...]]:
    for one in measured:
        if one.trial != best.trial:
            try:
                found = results.verdict(one, best, objective)
            except ExperimentError as error:
                yield escape(labels[one.trial]), escape(str(error)), ""
            else:
                yield escape(labels[one.trial]), escape(str(found)), str(found.rounds)


def _failures(results: Results) -> Iterator[str]:
    reasons = [
        (escape(one.trial.label), escape(" ".join(one.reasons)))
        for one in results.combinations
        if one.reasons
    ]
    if reasons:
        yield "<h2>Notes on trials</h2>"
        yield _table(("combination", "reason"), reasons)


def _best_of(results: Results, measured: Sequence[Combination], objective: str) -> Results:
    """The results of as many combinations as can be told apart as curves, the best ones."""
    sign = 1 if smaller_is_better(objective) else -1
    best = sorted(measured, key=lambda one: sign * one.metrics[objective].median)[:_CURVES]
    shown = {one.trial for one in best}
    return replace(results, rows=tuple(r for r in results.rows if r.trial.combination in shown))


def _figures(results: Results, objective: str, curves: Results) -> Iterator[str]:
    wanted: list[tuple[str, str, str, str]] = [("bars", objective, "", "")]
    several = results.workload is None or len(results.workload.levels) > 1
    if several:
        names = ("generation_tokens_per_second", "total_tokens_per_second", "time_to_first_token")
        tails = ("time_to_first_token_p90", "time_between_tokens_p90")
        wanted += [("concurrency", name, "", "") for name in (*names, *tails)]
    wanted += [("prompt", "time_to_first_token", "", "")]
    scores = ("quality", "perplexity")
    wanted += [("pareto", objective, x, "") for x in ("memory_gib", *scores)]
    wanted += [("pareto", objective, "memory_gib", score) for score in scores]
    for number, (kind, y, x, colour) in enumerate(wanted):
        try:
            drawn = curves if kind in {"concurrency", "prompt"} else results
            svg = _svg(drawn, number, kind, y, x, colour)
        except ExperimentError:  # it was not measured
            continue
        if svg:
            yield svg


def _svg(results: Results, number: int, kind: str, y: str, x: str, colour: str) -> str:
    """Return a figure with its caption; empty where it has nothing to compare."""
    matplotlib = extra("matplotlib")
    style = {"svg.fonttype": "none", "svg.hashsalt": "kitty_nb", **dict.fromkeys(_INKED, _INK)}
    with matplotlib.rc_context(style):
        figure = results.plot(kind, y, x or "memory_gib", colour)
        if kind in {"concurrency", "prompt"} and len(figure.axes[0].get_xticks()) < 2:  # noqa: PLR2004
            return ""
        against = {"concurrency": "requests at once", "prompt": "the length of the prompt"}
        other = against.get(kind) or (words_of(x) if x else "")
        caption = words_of(y).capitalize() + (f", against {other}" if other else "")
        caption += f", with {words_of(colour)} as colour" if colour else ""
        drawn = _inline(figure, f"f{number}-")
    return (
        f'<figure role="group" aria-label="{escape(caption)}">{drawn}'
        f"<figcaption>{escape(caption)}.</figcaption></figure>"
    )


def _inline(figure: Figure, prefix: str) -> str:
    """Return a figure as SVG inside HTML, in the page's colours, its ids apart from others'."""
    text = StringIO()
    figure.set_size_inches(_WIDTH, figure.get_figheight() * _WIDTH / figure.get_figwidth() + 0.4)
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = svg.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
    return svg.replace(_INK, "currentColor").replace("<svg ", '<svg role="img" ', 1)


def _machine(results: Results) -> Iterator[tuple[str, str]]:
    return ((name, escape(text)) for name, text in machine_of(results))


def _models(results: Results) -> Iterator[tuple[str, str]]:
    for model, files in files_of(results).items():
        if not files:
            yield "model", f"{escape(PurePath(model).name)}, which is not on this machine"
        for file in files:
            hashed = f'<span class="hash">{escape(file.sha256)}</span>'
            yield "model", f"{escape(file.name)}, {decimal(file.size)}, SHA-256 {hashed}"


def machine_of(results: Results) -> Iterator[tuple[str, str]]:
    """Return what is known of the machines and engines of results, as names and texts."""
    hosts = dict.fromkeys(row.host for row in results.rows if row.host)
    for host in hosts:
        yield "machine", host
    if this_host() in hosts:
        facts = host_facts()
        gpus = (f"{gpu.name}, {decimal(gpu.memory)}" for gpu in facts.gpus)
        yield "processor", f"{facts.cpu}, {facts.usable_threads} threads usable"
        yield "memory", ", ".join((decimal(facts.ram), *gpus))
        yield "system", f"{facts.os}; {facts.python}"
        versions = (f"{name} {version}" for name, version in library_versions().items())
        yield "libraries", ", ".join(versions)
    for engine in dict.fromkeys(row.engine for row in results.rows if row.engine):
        yield "engine", engine


def files_of(results: Results) -> dict[str, tuple[FileDigest, ...]]:
    """Return the files of each model by its name in trials; none of one that is not here."""
    found: dict[str, tuple[FileDigest, ...]] = {}
    with start_blocking_portal() as portal:
        for model in dict.fromkeys(row.trial.model for row in results.rows):
            try:
                found[model] = portal.call(digest_model, _serving(model, results.config)).shards
            except (ConfigError, ModelFileError):  # measured elsewhere, or gone since
                found[model] = ()
    return found


def _serving(model: str, config: ServerConfig) -> ServerConfig:
    return resolve_model(config.replace(model=model, projector=None))


def _code(results: Results) -> Iterator[str]:
    if results.workload:
        yield "<h2>Repeat it</h2>"
        yield f"<pre>{escape(code_of(results))}</pre>"


def code_of(results: Results) -> str:
    """Return Python that makes the same sweep, but for functions that judge answers."""
    workload = results.workload
    if workload is None:
        raise ExperimentError("These results do not say what was asked, so nothing repeats them.")
    trials = dict.fromkeys(row.trial.combination for row in results.rows)
    given = results.config.model_dump(
        mode="json", include=set(SERVER_SETTINGS), exclude_defaults=True, exclude={"model"}
    )
    asked: dict[str, object] = {
        "configs": [{"model": trial.model, **dict(trial.settings)} for trial in trials],
        "prompts": list(workload.prompts),
        "repeats": max((row.trial.repeat for row in results.rows), default=1),
        "baseline": any(row.trial.repeat < 0 for row in results.rows),
        "seed": workload.seed,
        "parallel": workload.levels,
        "max_tokens": workload.max_tokens,
        "chat": workload.chat,
        "requests": workload.at_least,
    }
    judged = workload.quality is not None
    written = repr(workload.quality)
    if judged and not written.startswith("<"):
        asked["quality"] = workload.quality
    named = ["Sweep"] + ([type(workload.quality).__name__] if "quality" in asked else [])
    lines = [
        "from kitty_nb import ServerConfig",
        f"from kitty_nb.experiments import {', '.join(sorted(named))}",
        "",
        "config = ServerConfig.from_env().replace(",
        *(f"    {name}={value!r}," for name, value in given.items()),
        ")",
        "sweep = Sweep(",
        *(f"    {name}={_pretty(value)}," for name, value in asked.items()),
        *(["    # quality=… (a function of yours)"] if judged and "quality" not in asked else []),
        "    config=config,",
        ")",
        "results = sweep.run().wait()",
    ]
    return "\n".join(lines)


def _pretty(value: object) -> str:
    return pformat(value, width=92, sort_dicts=False).replace("\n", "\n    ")


def _shown(words: Sequence[str]) -> Iterator[str]:
    """The words of a command line but for secrets."""
    for before, word in zip(("", *words), words, strict=False):
        if not takes_secret(word) and not takes_secret(before):
            yield word


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are HTML already."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    thead = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return f'<div class="scroll"><table>{thead}<tbody>{body}</tbody></table></div>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"  # noqa: PLR2004
