"""`kitty-nb`: the commands of the terminal.

Slow imports are in the command that needs them.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import anyio
import typer
from typer.core import TyperGroup

from kitty_nb.errors import KittyError, printable
from kitty_nb.formats import Format, Source

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kitty_nb.cli.commands import Begin
    from kitty_nb.client.connect import Served
    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments import LoadTest, Regression

_NOTEBOOKS, _NOTEBOOK = Path("notebooks"), "control_panel.ipynb"
_LARGEST_DEMO = 10_000  # GB; a full disk reports its own error
_FAILED, _NOT_RUNNING, _INTERRUPTED = 1, 3, 130
_EXIT_CODES = (
    "Exit codes: 0 success; 1 failure, with the reason on stderr; 2 wrong arguments; 3 no server is"
    " running (status, wait-ready, key, connect, load-test --running); 130 interrupted by Ctrl-C."
)


class _Verbs(TyperGroup):
    """Command group that prints our errors as sentences, and exits quietly when interrupted."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader has seen enough, as with `head`
            raise
        except (KittyError, OSError) as error:
            _say(f"kitty-nb: {error}", err=True)
            raise typer.Exit(_FAILED) from None
        except KeyboardInterrupt:
            raise typer.Exit(_INTERRUPTED) from None


app = typer.Typer(
    cls=_Verbs,
    help="Start, watch and stop llama-server. Each profile has one server, shared with notebooks.",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"kitty-nb {version('kitty_nb')}")
        raise typer.Exit


_Version = Annotated[
    bool,
    typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version."),
]


@app.callback()
def _options(_: _Version = False) -> None:
    """Accept the options before the command."""


_Env = Annotated[
    Path, typer.Option("--env", metavar="FILE", help="The .env file with the settings.")
]
_Profile = Annotated[str, typer.Option(help="The profile to use.")]
_NoWait = Annotated[bool, typer.Option("--no-wait", help="Return as soon as the process exists.")]
_Anyway = Annotated[
    bool, typer.Option("--anyway", help="Start the model even if it doesn't fit into memory.")
]
_Model = Annotated[
    str | None,
    typer.Argument(help="A .gguf file, here or in the models folder; else the profile's."),
]
_PromptTokens = Annotated[
    int, typer.Option(metavar="N", help="Length of the prompt, in tokens; 0 skips it.")
]
_AnswerTokens = Annotated[
    int, typer.Option(metavar="N", help="Length of the answer, in tokens; 0 skips it.")
]
_ENV, _PROFILE = Path(".env"), "primary"


@app.command()
def scan(env: _Env = _ENV, profile: _Profile = _PROFILE) -> None:
    """List the models in the models folder and in other programs' stores."""
    from rich.filesize import decimal
    from rich.table import Table

    from kitty_nb.catalog.catalog import ModelCatalog
    from kitty_nb.catalog.stores import model_stores
    from kitty_nb.cli.commands import list_far_models, same_profile
    from kitty_nb.cli.console import PlainConsole

    config = _settings(env, profile, anywhere=True)
    if config.ssh:
        models, config = anyio.run(list_far_models, config)
    else:
        models = ModelCatalog(model_stores(config)).scan()
    if not models:
        demo = f". To try things out: {same_profile(env, config.profile, 'demo-model')}"
        there = f" on {config.ssh}." if config.ssh else demo
        _say(f"There are no models in {config.models_dir}{there}")
        return
    table = Table(
        "Model", "Quantization", "Size", "Shards", "Context", "Input", "Problem", box=None
    )
    for model in models:
        table.add_row(
            f"{model.known_as} ({model.name})" if model.known_as else model.name,
            model.quantization or "",
            decimal(model.size),
            str(model.shard_count),
            str(model.context_length or ""),
            ", ".join(model.modalities),
            model.problem or model.doubt or "",
        )
    console = PlainConsole()
    if not console.is_terminal:
        console.width = 10_000  # a program reads one row a line
    console.print(table)


@app.command()
def start(
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
    no_wait: _NoWait = False,
    anyway: _Anyway = False,
    print_command: Annotated[
        bool,
        typer.Option("--print-command", help="Print the command line instead of running it."),
    ] = False,
) -> None:
    """Start the profile's server; it keeps running after this command exits.

    Ctrl-C during the load stops it. A server that already runs with these settings is left alone.
    LLAMACPP_ON_KERNEL_EXIT is for notebooks: a server started here runs until it is stopped.
    """
    from kitty_nb.cli import commands

    config = _settings(env, profile, valid=True, anywhere=not print_command)
    if print_command:
        _say(anyio.run(commands.command_text, config))
    else:
        _load(config, env, lambda server, same: server.start(same, not no_wait, anyway=anyway))


@app.command()
def stop(
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Kill the server immediately instead of shutting it down gracefully."
        ),
    ] = False,
) -> None:
    """Stop the profile's server, whoever started it; do nothing if none is running."""
    from kitty_nb.cli import commands

    _say(anyio.run(commands.stop, _settings(env, profile, anywhere=True), env, force))


@app.command()
def restart(
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
    no_wait: _NoWait = False,
    anyway: _Anyway = False,
) -> None:
    """Restart the profile's server with the current settings in the .env file."""
    config = _settings(env, profile, valid=True, anywhere=True)
    _load(config, env, lambda server, _: server.restart(config, not no_wait, anyway=anyway))


@app.command()
def switch(
    model: Annotated[str, typer.Argument(help="A .gguf file, relative to the models folder.")],
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
    alias: Annotated[str | None, typer.Option(help="The model name that clients use.")] = None,
    no_wait: _NoWait = False,
    anyway: _Anyway = False,
) -> None:
    """Serve another model with the settings of the running server."""
    _load(
        _settings(env, profile, anywhere=True),
        env,
        lambda server, _: server.switch_model(model, alias, not no_wait, anyway=anyway),
    )


@app.command()
def status(
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
    every: Annotated[bool, typer.Option("--all", help="Report every profile in the file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Report the state of the profile's server; exit with 3 if none is running."""
    from kitty_nb.cli.commands import read_status, status_facts
    from kitty_nb.config.profiles import configured_profiles
    from kitty_nb.supervisor.events import ServerStatus

    names = configured_profiles(env) if every else (profile,)
    read = [read_status(config) for config in _all_settings(env, names, anywhere=True)]
    states = [state for state, _ in read]
    if as_json:
        facts = [anyio.run(status_facts, *one) for one in read]
        typer.echo(json.dumps(facts if every else facts[0], indent=2))
    else:
        for state in states:
            _say(f"{state.config.profile}: {state.sentence}" if every else state.sentence)
    if all(state.status.idle or state.status is ServerStatus.OUT_OF_REACH for state in states):
        raise typer.Exit(_NOT_RUNNING)


@app.command()
def wait_ready(
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
    timeout: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="Give up after this many seconds."),
    ] = None,
) -> None:
    """Wait until the profile's server is ready; exit with 3 if none is running."""
    from kitty_nb.cli import commands

    config = _settings(env, profile, anywhere=True)
    ready = anyio.run(commands.wait_ready, config, env, timeout)
    if ready is None:
        _end_without_server(config)
    _say(ready)


@app.command()
def key(env: _Env = _ENV, profile: _Profile = _PROFILE) -> None:
    """Print the API key that clients must send; exit with 3 if no server is running."""
    served, _ = _served(_settings(env, profile, anywhere=True))
    key = served.access.api_key
    if key:
        typer.echo(key.get_secret_value())
    else:
        _say("No API key is set for this server.", err=True)


@app.command()
def connect(
    name: Annotated[
        str | None, typer.Argument(help="The other program; if omitted, all are listed.")
    ] = None,
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
) -> None:
    """Print code that uses the server from another program; exit with 3 if none is running.

    The code gets the key with `kitty-nb key` and does not contain it. What to install is printed on
    stderr.
    """
    from kitty_nb.cli.commands import key_command
    from kitty_nb.client.connect import hand_overs

    found = hand_overs()
    if name is None:
        width = max(map(len, found))
        _say("\n".join(f"{one:{width}}  {found[one].title}" for one in found))
        return
    if name not in found:
        raise typer.BadParameter(f"Choose one of {', '.join(found)}.", param_hint="NAME")
    config = _settings(env, profile, anywhere=True)
    served, tunnel = _served(config)
    if tunnel:
        _say(f"To forward the server's port to this machine: {tunnel}", err=True)
    if found[name].install:
        _say(f"This needs: pip install {found[name].install}", err=True)
    _say(found[name].in_terminal(served, key_command(env, config.profile)))


@app.command()
def export(
    to: Annotated[Format, typer.Argument(metavar="FORMAT", help=f"{', '.join(Format)}.")],
    every: Annotated[
        bool, typer.Option("--all", help="Export every profile in the file, in one file.")
    ] = False,
    image: Annotated[
        str | None, typer.Option(help="The container image, for quadlet and compose.")
    ] = None,
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
) -> None:
    """Print the profile as a file for another program, which then runs the server.

    It contains no secrets. What it can't express, and where its key goes, is printed on stderr.
    """
    from kitty_nb.cli import commands
    from kitty_nb.config.profiles import configured_profiles

    names, notes = [profile], list[str]()
    if every:
        names, notes = commands.exportable(env, configured_profiles(env))
    configs = _all_settings(env, names, valid=True)
    exported = anyio.run(commands.export, to, configs, image, notes)
    for note in exported.notes:
        _say(f"kitty-nb: {note}", err=True)
    typer.echo(exported.text, nl=False)


@app.command(name="import")
def import_(
    file: Annotated[
        Path,
        typer.Argument(help="A llama-swap YAML, router INI, Modelfile, or LM Studio preset."),
    ],
    source: Annotated[
        Source | None,
        typer.Option(
            "--from", metavar="NAME", help=f"The program that wrote it: {', '.join(Source)}."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A .gguf file, here or in the models folder, for a preset that names no model.",
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Overwrite profiles that .env already has.")
    ] = False,
    only_print: Annotated[
        bool, typer.Option("--print", help="Print the lines instead of writing them.")
    ] = False,
    env: _Env = _ENV,
    profile: Annotated[
        str | None, typer.Option(help="The profile's name; by default, its name in the file.")
    ] = None,
) -> None:
    """Write the profiles in another program's file into the .env file.

    A backup of .env is kept. No secrets are copied. What is left out is printed on stderr.
    """
    from kitty_nb.cli import commands
    from kitty_nb.config.profiles import add_profiles, added_lines

    found = anyio.run(commands.read_profiles, file, env, source, profile, _file_of(model))
    for note in found.notes:
        _say(f"kitty-nb: {note}", err=True)
    if only_print:
        _say("\n".join(added_lines(found.configs, env)))
    else:
        _say(add_profiles(found.configs, env, replace=replace).sentence)


@app.command()
def logs(
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow the log; press Ctrl-C to stop.")
    ] = False,
    lines: Annotated[
        int | None, typer.Option("--lines", "-n", min=1, help="Show only the last N lines.")
    ] = None,
) -> None:
    """Print the log of the profile's current or previous server."""
    from kitty_nb.supervisor.log import follow_log, log_lines
    from kitty_nb.supervisor.registry import refuse_open_folder

    config = _settings(env, profile, anywhere=True)
    if config.url:
        raise KittyError(f"The log of the server at {config.url} is on its own machine.")
    if config.ssh:
        from kitty_nb.cli.commands import show_far_log

        anyio.run(show_far_log, config, _say, lines, follow)
        return
    refuse_open_folder(config)
    if follow:
        anyio.run(follow_log, config.log_path, _say, lines)
    for line in deque(log_lines(config.log_path), maxlen=lines):
        _say(line)


@app.command()
def doctor(env: _Env = _ENV, profile: _Profile = _PROFILE) -> None:
    """Check versions, .env, engine (with a demo model), GPU, memory, models, disk and ports."""
    from rich.table import Table

    from kitty_nb.cli.console import PlainConsole
    from kitty_nb.cli.doctor import Verdict, examine

    findings = examine(env, profile)
    table = Table("", "Check", "Result and advice", box=None)
    colours = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.ERROR: "red"}
    for finding in findings:
        text = f"{finding.found}\n{finding.advice}".rstrip()
        table.add_row(finding.verdict, finding.what, text, style=colours[finding.verdict])
    PlainConsole().print(table)
    if any(finding.verdict is Verdict.ERROR for finding in findings):
        raise typer.Exit(_FAILED)


@app.command()
def demo_model(
    path: Annotated[Path | None, typer.Argument(help="The .gguf file to write.")] = None,
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
    size: Annotated[
        float | None,
        typer.Option(metavar="GB", help="Pad the model to this size, for a longer load."),
    ] = None,
) -> None:
    """Write a small demo model, by default into the models folder."""
    from kitty_nb.catalog.demo_model import DEMO_NAME, write_demo_model

    if size is not None and not 0 < size <= _LARGEST_DEMO:  # nan is neither
        raise typer.BadParameter("Write a number of gigabytes, such as 0.5.", param_hint="--size")
    target = path or _settings(env, profile).models_dir / DEMO_NAME
    written = write_demo_model(target, None if size is None else int(size * 1e9))
    _say(f"{written}: {written.stat().st_size:,} bytes")


@app.command()
def download(
    repository: Annotated[
        str, typer.Argument(help="owner/name, owner/name:Q4_K_M, or the page's URL.")
    ],
    quant: Annotated[
        str | None, typer.Option(metavar="Q4_K_M", help="The quantization, or a file name.")
    ] = None,
    only_list: Annotated[
        bool, typer.Option("--list", help="List the models and their sizes; download nothing.")
    ] = False,
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
) -> None:
    """Download a model from the Hugging Face Hub into the models folder, and verify it.

    Its shards and its projector are included. Ctrl-C keeps the downloaded part: the same command
    resumes it. For gated and private repositories, log in with `hf auth login`.
    """
    from kitty_nb.catalog.catalog import why_not_served
    from kitty_nb.cli import console
    from kitty_nb.hub import HubReference

    folder = _settings(env, profile).models_dir
    reference = HubReference.parse(repository)
    if only_list:
        anyio.run(console.show_variants, reference, folder)
        return
    try:
        model = anyio.run(console.download, reference, quant, folder)
    except KeyboardInterrupt:
        _say("Cancelled. The downloaded part is kept; the same command resumes it.", err=True)
        raise
    if problem := why_not_served(model):
        _say(problem, err=True)
    _say(f"LLAMACPP_{profile.upper()}_MODEL={model.relative_to(folder).as_posix()}")


@app.command()
def prompts(
    action: Annotated[Literal["list", "clear"], typer.Argument(help="What to do.")] = "list",
    name: Annotated[str, typer.Argument(help="Only prompts with this name.")] = "",
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
) -> None:
    """List or remove the prompts kept on disk, for all profiles that share the log folder."""
    from datetime import datetime

    from rich.filesize import decimal
    from rich.table import Table

    from kitty_nb.cli.console import PlainConsole
    from kitty_nb.supervisor.kept_prompts import PromptStore

    config = _settings(env, profile)
    store = PromptStore.of(config)
    if doubt := store.doubt:
        raise KittyError(f"{doubt} Nothing is read or removed until only you can write there.")
    kept = [prompt for prompt in store.prompts() if name in {"", prompt.name}]
    if action == "clear":
        store.clear(kept, whole=not name)
        _say(f"Removed {len(kept)} kept prompt{'s' * (len(kept) != 1)}.")
    elif not kept:
        named = f" named {name!r}" if name else ""
        _say(f"There are no kept prompts{named} in {store.folder}.")
    else:
        table = Table("Name", "Model", "Tokens", "Size", "Saved", box=None)
        for one in kept:
            at = datetime.fromtimestamp(one.at).astimezone()
            where = one.name or f"(slot {one.slot} of {one.profile})"
            size = decimal(one.size)
            table.add_row(where, one.model, f"{one.tokens:,}", size, f"{at:%Y-%m-%d %H:%M}")
        PlainConsole().print(table)


@app.command()
def load_test(
    model: _Model = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="Concurrent requests; repeat for several.")
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(help="Requests per second, sent regardless of answers; repeatable."),
    ] = None,
    arrivals: Annotated[str, typer.Option(help="poisson or constant.")] = "poisson",
    limit: Annotated[
        str,
        typer.Option(help='Find the highest rate within, e.g., "time_to_first_token_p95 <= 2".'),
    ] = "",
    requests: Annotated[int, typer.Option(min=1, help="Requests per load.")] = 100,
    max_tokens: Annotated[int, typer.Option(min=2, help="Length of an answer, in tokens.")] = 64,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A user message; repeat for several.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The seed of arrivals and sampling.")] = 0,
    running: Annotated[
        bool, typer.Option("--running", help="Test the profile's running server.")
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE.parquet", help="Write the times of each request to a file."),
    ] = None,
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
) -> None:
    """Measure latency under load, on a new server or the running one; print a Markdown table.

    --concurrency keeps a number of requests in flight; --rate sends them regardless of answers.
    """
    from kitty_nb.experiments import Load, LoadTest
    from kitty_nb.experiments import load_test as begin
    from kitty_nb.experiments.trial import DEFAULT_PROMPT

    loads: list[Load] = []

    def keep(load: Load) -> None:
        loads.append(load)
        _say(f"{load.label}: done in {load.seconds:.1f} s", err=True)

    config, access = _settings(env, profile, valid=not running), None
    if running or (config.url and model is None):
        access = _served(config)[0].access
    test = begin(
        _file_of(model),
        concurrency=concurrency or (),
        rate=rate or (),
        arrivals=arrivals,
        limit=limit,
        requests=requests,
        max_tokens=max_tokens,
        seed=seed,
        config=config,
        access=access,
        on_load=keep,
        prompts=prompt or DEFAULT_PROMPT,
    )
    try:
        found = test.wait()
    except BaseException:  # if interrupted, or if the server dies: keep the loads so far
        test.cancel()
        if loads:
            _show_loads(LoadTest(tuple(loads)), save)
        raise
    _show_loads(found, save)


@app.command()
def bench(
    model: _Model = None,
    pp: _PromptTokens = 512,
    tg: _AnswerTokens = 128,
    depths: Annotated[
        str, typer.Option(metavar="N,N,…", help="Tokens already in the context.")
    ] = "0,4096,16384",
    repeats: Annotated[int, typer.Option(metavar="N", help="Measurements per test.")] = 5,
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
) -> None:
    """Measure prompt and generation speed; print llama-bench's table in Markdown.

    It starts a new server with the profile's settings. Stop others first: they skew the results.
    """
    from kitty_nb.cli.console import measuring_bar
    from kitty_nb.experiments import Bench

    try:
        numbers = [int(number) for number in depths.split(",")]
    except ValueError:
        raise typer.BadParameter("Write numbers, such as 0,4096.", param_hint="--depths") from None
    config = _settings(env, profile)
    if config.url:
        raise KittyError(
            f"bench starts a server of its own, which kitty_nb can't do at {config.url}. To measure"
            f" that server: kitty-nb load-test --profile {profile}"
        )
    if model is not None:
        config = config.replace(model=_file_of(model), allow_absolute_paths=True)
    bench = Bench(prompt=pp, answer=tg, depths=numbers, repeats=repeats, config=config)
    try:
        with measuring_bar() as show:
            anyio.run(bench.run_here, show)
    finally:  # if interrupted, too: the rows so far
        if bench.table:
            _say(str(bench.table))


@app.command()
def regress(
    records: Annotated[
        list[Path], typer.Argument(metavar="RECORD...", help="Run records, as JSON files.")
    ],
    engine: Annotated[
        list[Path],
        typer.Option(
            metavar="PATH",
            help="Another llama-server, or a Python environment with another xllamacpp; repeat"
            " for several.",
        ),
    ],
    bisect: Annotated[
        bool,
        typer.Option(
            "--bisect", help="Find the first engine that regresses, given engines in order."
        ),
    ] = False,
    rounds: Annotated[int, typer.Option(metavar="N", help="Measurements per engine.")] = 8,
    pp: _PromptTokens = 256,
    tg: _AnswerTokens = 64,
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
) -> None:
    """Compare other engines with the one in use; exit with 1 if one is slower or answers differ.

    Each round starts every engine and times a prompt and an answer; the first replays the records.
    """
    from kitty_nb.cli.console import measuring_bar
    from kitty_nb.experiments import regress as begin

    config = _settings(env, profile)
    found: list[Regression] = []
    try:
        with measuring_bar() as show:
            operation = begin(
                records,
                engine,
                rounds=rounds,
                prompt=pp,
                answer=tg,
                bisect=bisect,
                config=config,
                on_progress=show,
                on_round=found.append,
            )
            try:
                found.append(operation.wait())
            finally:
                operation.cancel()
    finally:  # if interrupted, too: the rounds so far
        if found:
            _say(str(found[-1]))
    if found[-1].regressed:
        raise typer.Exit(_FAILED)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lab(context: typer.Context) -> None:
    """Open JupyterLab on notebooks/control_panel.ipynb in this folder.

    Missing notebooks are copied there first. Other options, such as --no-browser, are passed on to
    JupyterLab. The notebook says which .env it reads.
    """
    import psutil
    from jupyterlab.labapp import LabApp

    from kitty_nb.safe_files import distrust

    for path in (_NOTEBOOKS, *_NOTEBOOKS.glob("*.ipynb")):
        if reason := distrust(path, folders=False):
            raise KittyError(f"{reason} A notebook runs as you: use a folder of your own.")
    _NOTEBOOKS.mkdir(parents=True, exist_ok=True)
    # An editable install has no copies in the package: they are in the checkout around it.
    homes = Path(__file__).parents[1:3]
    home = next(home for home in homes if (home / _NOTEBOOKS / _NOTEBOOK).exists())
    for notebook in (home / _NOTEBOOKS).glob("*.ipynb"):
        if not (copy := _NOTEBOOKS / notebook.name).exists():
            shutil.copyfile(notebook, copy)
    # In a container, everyone is root; JupyterLab would only ask for this option.
    root = ["--allow-root"] if psutil.Process().username() == "root" else []
    here = f"--ServerApp.root_dir={Path.cwd()}"
    LabApp.launch_instance([str(_NOTEBOOKS / _NOTEBOOK), here, *root, *context.args])


@app.command()
def install_remote(
    source: Annotated[
        str,
        typer.Argument(help="A local wheel of kitty_nb, or anything that pip there can install."),
    ],
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
) -> None:
    """Install kitty_nb on the profile's machine (LLAMACPP_SSH), into ~/.local/share/kitty_nb/env.

    kitty_nb looks for it there.
    """
    from kitty_nb.remote.connection import install

    config = _settings(env, profile, anywhere=True)
    if not config.ssh:
        raise KittyError(f"The profile {profile!r} runs on this machine. Set LLAMACPP_SSH first.")
    install(config, source)
    _say(f"Installed on {config.ssh}. To check it: kitty-nb doctor --profile {profile}")


@app.command(hidden=True)
def serve(
    profile: _Profile = _PROFILE,
    stdio: Annotated[
        bool, typer.Option("--stdio", help="Communicate over standard input and output.")
    ] = False,
) -> None:
    """Supervise the profile's server for another machine, which runs this over ssh."""
    from kitty_nb.remote.serve import serve as begin

    if not stdio:
        raise typer.BadParameter("Another machine runs this, with --stdio.", param_hint="--stdio")
    # Other output must not get between the lines of the protocol.
    send = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    anyio.run(begin, profile, sys.stdin.fileno(), send)


def main() -> None:
    """Run the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name may not be valid in any encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    app(prog_name="kitty-nb")


def _say(text: str, *, err: bool = False) -> None:
    typer.echo(printable(text), err=err)


def _show_loads(found: LoadTest, save: Path | None) -> None:
    _say(str(found))
    if save:
        found.to_parquet(save)


def _file_of(model: str | None) -> Path | None:
    """Return the file here with this name, or else the name itself, for the models folder."""
    if model is None:
        return None
    here = Path(model)
    return here.absolute() if here.is_file() else here


def _load(config: ServerConfig, env: Path, begin: Begin) -> None:
    from kitty_nb.cli import commands

    _say(anyio.run(commands.load, config, env, begin))


def _served(config: ServerConfig) -> tuple[Served, str]:
    """Find the profile's server, or end the command.

    Returns:
        The server, as its machine sees it, and the command that brings its port to this machine;
        empty where it is this one.
    """
    from kitty_nb.catalog.resolve import routed_profiles
    from kitty_nb.client import Access
    from kitty_nb.client.connect import Served
    from kitty_nb.supervisor.registry import find_server, refuse_open_folder

    if config.url:
        from kitty_nb.isolated_server import access_at_url

        access = anyio.run(access_at_url, config)
        return Served(access, access.model or "", config.profile), ""
    if config.ssh:
        from kitty_nb.cli.commands import read_far_key
        from kitty_nb.remote.connection import tunnel_command

        state, key = anyio.run(read_far_key, config)
        if state.pid is None:
            _end_without_server(config)
        served = Served(Access(state.config.endpoint, key), state.alias, config.profile)
        return served, tunnel_command(state.config)
    refuse_open_folder(config)
    record = find_server(config)
    if record is None:
        _end_without_server(config)
    alias = record.config.served_alias or routed_profiles(record.config).profiles[0].profile
    return Served(Access(record.config.endpoint, record.api_key), alias, config.profile), ""


def _end_without_server(config: ServerConfig) -> NoReturn:
    from kitty_nb.supervisor.registry import served_elsewhere

    none = f"No server is running for the profile {config.profile!r}."
    _say(served_elsewhere(config) or none, err=True)
    raise typer.Exit(_NOT_RUNNING)


def _settings(
    env: Path, profile: str, *, valid: bool = False, anywhere: bool = False
) -> ServerConfig:
    return _all_settings(env, [profile], valid=valid, anywhere=anywhere)[0]


def _all_settings(
    env: Path, profiles: Iterable[str], *, valid: bool = False, anywhere: bool = False
) -> list[ServerConfig]:
    """Read settings; an invalid one is an error only if they must be valid, as for a start.

    Profiles on another machine are refused unless the command works anywhere.
    """
    from kitty_nb.catalog.resolve import load_profile
    from kitty_nb.config.profiles import env_warnings

    read = [load_profile(env, name) for name in profiles]
    complaints = [complaint for _, complaint in read if complaint]
    warnings = [*env_warnings(env, *profiles), *([] if valid else map(str, complaints))]
    for warning in dict.fromkeys(warnings):  # profiles share most settings
        _say(f"kitty-nb: {warning}", err=True)
    if valid and complaints:
        raise complaints[0]
    configs = [config for config, _ in read]
    for config in configs:
        if config.ssh and not anywhere:
            raise KittyError(
                f"The profile {config.profile!r} runs on {config.ssh}, and this command works only"
                f" on its own machine. Log in there and run it: ssh {config.ssh}"
            )
    return configs
