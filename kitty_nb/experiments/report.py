"""The report of a sweep: a self-contained HTML page without scripts, light and dark."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path, PurePath
from pprint import pformat
from typing import TYPE_CHECKING, Any

from anyio.from_thread import start_blocking_portal
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from rich.filesize import decimal

from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.config.flags import without_secrets
from kitty_nb.errors import ConfigError, ExperimentError, ModelFileError
from kitty_nb.experiments.arguments import require
from kitty_nb.experiments.extras import extra
from kitty_nb.experiments.measure import fingerprint_of
from kitty_nb.experiments.metrics import in_words, smaller_is_better
from kitty_nb.experiments.output import number, valid_text
from kitty_nb.experiments.plots import labels_of, words_of
from kitty_nb.experiments.quality import Divergence, ExactMatch, HarnessTask, Perplexity
from kitty_nb.experiments.recording import digest_model, host_facts, library_versions
from kitty_nb.experiments.statistics import CONFIDENCE
from kitty_nb.experiments.suite import Suite
from kitty_nb.isolated_server import SERVER_SETTINGS, this_host

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from matplotlib.figure import Figure

    from kitty_nb.catalog.cache import FileDigest
    from kitty_nb.experiments.analysis import Analysis
    from kitty_nb.experiments.combination import Combination
    from kitty_nb.experiments.trial import ModelFingerprint, Trial, Workload

_INK = "#010203"  # placeholder for the page's text colour
_CURVES = 8
_WIDTH = 5.6  # inches, so that labels match the page's small print
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
_BY_CONCURRENCY = (
    *("generation_tokens_per_second", "total_tokens_per_second", "time_to_first_token"),
    *("time_to_first_token_p90", "time_between_tokens_p90"),
)
_TEMPLATE = Path(__file__).with_name("report.html")


def report_of(results: Analysis, objective: str, title: str) -> str:
    """Render the page; see `Results.report`."""
    config = results.config
    public = config.replace(extra_args=without_secrets(config.extra_args))
    results = replace(results, config=public)
    require("objective", objective, str, "the name of a metric")
    best, name = results.best(objective), objective.removeprefix("-")
    sign = 1 if objective != name or smaller_is_better(name) else -1
    measured = sorted(
        (one for one in results.combinations if name in one.metrics),
        key=lambda one: sign * one.metrics[name].median,
    )
    labels = dict(zip((one.trial for one in measured), labels_of(measured), strict=True))
    page = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    page.filters |= {"words": words_of, "number": number}
    html = page.from_string(_TEMPLATE.read_text()).render(
        title=title,
        made=datetime.now(UTC),
        results=results,
        objective=name,
        by=words_of(name) if objective == name else f"the least {words_of(name)}",
        confidence=round(CONFIDENCE * 100),
        best=best,
        measured=measured,
        labels=labels,
        names=[n for n in dict.fromkeys((name, *_SHOWN)) if any(n in m.metrics for m in measured)],
        verdicts=[
            (labels[one.trial], *_verdict(results, one, best, objective))
            for one in measured
            if one.trial != best.trial
        ],
        notes=[
            (one.trial.label, " ".join(one.reasons)) for one in results.combinations if one.reasons
        ],
        curves=_CURVES,
        figures=[*_figures(results, name, {one.trial for one in measured[:_CURVES]})],
        facts=[*machine_of(results), *_models(results)],
        code=_code(results, results.workload) if results.workload else "",
    )
    return valid_text(html)


def _verdict(
    results: Analysis, one: Combination, best: Combination, objective: str
) -> tuple[str, str]:
    try:
        found = results.verdict(one, best, objective)
    except ExperimentError as error:
        return str(error), ""
    return in_words(objective.removeprefix("-"), found), str(found.rounds)


def _figures(
    results: Analysis, objective: str, shown: Collection[Trial]
) -> Iterator[tuple[str, Markup]]:
    """Yield each figure's caption and SVG; curves only of the combinations that are shown."""
    few = replace(results, rows=tuple(r for r in results.rows if r.trial.combination in shown))
    scores = ("quality", "perplexity")
    wanted = [
        ("bars", objective, "", ""),
        *(("concurrency", name, "", "") for name in _BY_CONCURRENCY),
        ("prompt", "time_to_first_token", "", ""),
        *(("pareto", objective, x, "") for x in ("memory_gib", *scores)),
        *(("pareto", objective, "memory_gib", score) for score in scores),
    ]
    style = {"svg.fonttype": "none", "svg.hashsalt": "kitty_nb", **dict.fromkeys(_INKED, _INK)}
    against = {"concurrency": "requests at once", "prompt": "the length of the prompt"}
    for index, (kind, y, x, colour) in enumerate(wanted):
        with extra("matplotlib").rc_context(style), suppress(ExperimentError):  # not measured
            drawn = few if kind in against else results
            figure = drawn.plot(kind, y, x or "memory_gib", colour)
            if kind in against and len(figure.axes[0].get_xticks()) < 2:  # noqa: PLR2004 (no curve)
                continue
            other = against.get(kind) or (words_of(x) if x else "")
            caption = words_of(y).capitalize() + (f", against {other}" if other else "")
            caption += f", with {words_of(colour)} as colour" if colour else ""
            yield caption, _inline(figure, f"f{index}-")


def _inline(figure: Figure, prefix: str) -> Markup:
    """Return a figure as SVG for HTML, in the page's colours, its ids unique by a prefix."""
    text = StringIO()
    figure.set_size_inches(_WIDTH, figure.get_figheight() * _WIDTH / figure.get_figwidth() + 0.4)
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = svg.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
    svg = svg.replace(_INK, "currentColor").replace("<svg ", '<svg role="img" ', 1)
    return Markup(svg)  # noqa: S704 (Matplotlib escapes the labels)


def _models(results: Analysis) -> Iterator[tuple[str, str]]:
    for model, files in files_of(results).items():
        if not files:
            name = PurePath(model).name
            yield "model", f"{name}; the measured files are missing, unreadable or changed here"
        for file in files:
            hashed = Markup('<span class="hash">{}</span>').format(file.sha256)
            yield "model", escape(f"{file.name}, {decimal(file.size)}, SHA-256 ") + hashed


def machine_of(results: Analysis) -> Iterator[tuple[str, str]]:
    """Yield facts about the machines and engines of results, each with its heading."""
    hosts = dict.fromkeys(row.host for row in results.rows if row.host)
    for host in hosts:
        yield "machine", host
    if this_host() in hosts:
        facts, of = host_facts(), f" of {this_host()}" if len(hosts) > 1 else ""
        gpus = (f"{gpu.name}, {decimal(gpu.memory)}" for gpu in facts.gpus)
        yield f"processor{of}", f"{facts.cpu}, {facts.usable_threads} threads usable"
        yield f"memory{of}", ", ".join((decimal(facts.ram), *gpus))
        yield f"system{of}", f"{facts.os}; {facts.python}"
        versions = (f"{name} {version}" for name, version in library_versions().items())
        yield f"libraries{of}", f"{', '.join(versions)}, at the time of this report"
    for engine in dict.fromkeys(row.engine for row in results.rows if row.engine):
        yield "engine", engine


def files_of(results: Analysis) -> dict[str, tuple[FileDigest, ...]]:
    """Return each model's files by its name in trials; none where the measured ones are gone."""
    measured: dict[str, set[ModelFingerprint | None]] = {}
    for row in results.rows:
        measured.setdefault(row.trial.model, {None}).add(row.fingerprint)
    found: dict[str, tuple[FileDigest, ...]] = dict.fromkeys(measured, ())
    with start_blocking_portal() as portal:
        for model, fingerprints in measured.items():
            with suppress(ConfigError, ModelFileError):  # measured elsewhere, or gone since
                config = resolve_model(results.config.replace(model=model, projector=None))
                files = portal.call(digest_model, config).shards
                if fingerprints <= {None, fingerprint_of(model, results.config)}:
                    found[model] = files
    return found


def _code(results: Analysis, workload: Workload) -> str:
    """Return Python that makes the same sweep; the user must add a quality function."""
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
    named, own, quality = ["Sweep"], [], workload.quality
    if type(quality) in (ExactMatch, Perplexity, Divergence, HarnessTask, Suite):
        asked["quality"] = _as_code(quality)
        named += [type(quality).__name__, *(["Task"] if isinstance(quality, Suite) else [])]
    elif quality is not None:
        own = ["    # quality=… (a function of yours)"]
    changed = ["config = ServerConfig.from_env()"]
    if given:
        changed[0] += ".replace("
        changed += [*(f"    {name}={value!r}," for name, value in given.items()), ")"]
    lines = [
        "from kitty_nb import ServerConfig",
        f"from kitty_nb.experiments import {', '.join(sorted(named))}",
        "",
        *changed,
        "sweep = Sweep(",
        *(f"    {name}={_pretty(value)}," for name, value in asked.items()),
        *own,
        "    config=config,",
        ")",
        "results = sweep.run().wait()",
    ]
    return "\n".join(lines)


def _as_code(quality: Any) -> Any:
    """Return a quality with values whose `repr` is code."""
    kept = {field.name: getattr(quality, field.name) for field in fields(quality)}
    kept |= {name: dict(value) for name, value in kept.items() if isinstance(value, Mapping)}
    kept |= {name: str(value) for name, value in kept.items() if isinstance(value, PurePath)}
    return type(quality)(**kept)


def _pretty(value: object) -> str:
    return pformat(value, width=92, sort_dicts=False).replace("\n", "\n    ")
