"""`kitty-nb`: the same verbs for a terminal.

What takes long to import is imported by the verb that needs it.
"""

from __future__ import annotations

import io
import json
import shlex
import shutil
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import typer
from typer.core import TyperGroup

from kitty_nb.errors import KittyError, ServerCrashedError, printable
from kitty_nb.safe_files import distrust

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from kitty_nb.config import ServerConfig
    from kitty_nb.supervisor.events import MemoryUse, ServerState

_NOTEBOOKS, _NOTEBOOK = Path("notebooks"), "control_panel.ipynb"
_DEMO_NAME = "kitty-demo.gguf"
_LARGEST_DEMO = 10_000  # GB; a disk that has less says so itself
_FAILED, _NOT_RUNNING, _INTERRUPTED = 1, 3, 130
_EXIT_CODES = (
    "Exit codes: 0 it went well; 1 it failed, and a sentence on stderr says why; 2 wrong arguments;"
    " 3 no server is running (status, wait-ready); 130 interrupted by Ctrl-C."
)


class _Verbs(TyperGroup):
    """Ends every error that is ours in its sentence, and every interruption quietly."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # whoever reads has seen enough, as `head`
            raise
        except (KittyError, OSError) as error:
            _say(f"kitty-nb: {error}", err=True)
            raise typer.Exit(_FAILED) from None
        except KeyboardInterrupt:
            raise typer.Exit(_INTERRUPTED) from None


app = typer.Typer(
    cls=_Verbs,
    help="Start, watch and stop llama-server. A panel of the same profile sees the same server.",
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


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Take the options that stand before the verb."""


_Env = Annotated[Path, typer.Option("--env", metavar="FILE", help="The file with the settings.")]
_Profile = Annotated[str, typer.Option(help="Which named set of settings to use.")]
_NoWait = Annotated[bool, typer.Option("--no-wait", help="Return once the process is there.")]
_Anyway = Annotated[bool, typer.Option("--anyway", help="Also where it will not fit into memory.")]
_ENV, _PROFILE = Path(".env"), "primary"


@app.command()
def scan(env: _Env = _ENV, profile: _Profile = _PROFILE) -> None:
    """List the models in the models folder, and those of other programs on this machine."""
    from rich.filesize import decimal
    from rich.table import Table

    from kitty_nb.catalog.catalog import ModelCatalog
    from kitty_nb.catalog.stores import model_stores
    from kitty_nb.terminal.console import PlainConsole

    config = _settings(env, profile)
    models = ModelCatalog(model_stores(config)).scan()
    if not models:
        _say(f"There are no models in {config.models_dir}. To try things out: kitty-nb demo-model")
        return
    table = Table(
        "Model", "Quantization", "Size", "Shards", "Context", "Takes in", "Problem", box=None
    )
    for model in models:
        context = str(model.context_length or "")
        takes = ", ".join(model.modalities)
        cells = (
            model.quantization or "",
            decimal(model.size),
            str(model.shard_count),
            context,
            takes,
        )
        name = f"{model.known_as} ({model.name})" if model.known_as else model.name
        table.add_row(name, *cells, model.problem or model.doubt or "")
    console = PlainConsole(markup=False)
    if not console.is_terminal:
        console.width = 10_000  # what another program reads is not to be folded
    console.print(table)


@app.command()
def start(
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
    no_wait: _NoWait = False,
    anyway: _Anyway = False,
    print_command: Annotated[
        bool,
        typer.Option("--print-command", help="Only print the command that would start it."),
    ] = False,
) -> None:
    """Start the profile's server; it stays when this command ends.

    Ctrl-C before it is ready stops it. A server that runs already with these settings is left as
    it is. LLAMACPP_ON_KERNEL_EXIT is for notebooks: what is started here stays until it is stopped.
    """
    from kitty_nb.terminal import commands

    if print_command:
        _say(anyio.run(commands.command_text, _config(env, profile)))
        return
    _show_load(env, commands.start, _config(env, profile), not no_wait, anyway)


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
    """Stop the profile's server, whoever started it. Without one there is nothing to do."""
    from kitty_nb.terminal import commands

    config = _settings(env, profile)
    pid = anyio.run(commands.stop, config, force)
    _say(_nothing_runs(config) if pid is None else f"The server (PID {pid}) is stopped.")


@app.command()
def restart(
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
    no_wait: _NoWait = False,
    anyway: _Anyway = False,
) -> None:
    """End the profile's server and start it with the settings as they are in the file."""
    from kitty_nb.terminal import commands

    _show_load(env, commands.restart, _config(env, profile), not no_wait, anyway)


@app.command()
def switch(
    model: Annotated[str, typer.Argument(help="A .gguf file, as a path in the models folder.")],
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
    alias: Annotated[str | None, typer.Option(help="The name that clients ask for.")] = None,
    no_wait: _NoWait = False,
    anyway: _Anyway = False,
) -> None:
    """Serve another model with the settings of the server that runs."""
    from kitty_nb.terminal import commands

    _show_load(env, commands.switch, _settings(env, profile), model, alias, not no_wait, anyway)


@app.command()
def status(
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
    every: Annotated[
        bool, typer.Option("--all", help="Of every profile that the file names.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say how the profile's server is. The exit code is 3 when none is running."""
    from kitty_nb.config import configured_profiles
    from kitty_nb.terminal.status import glance, measure

    names = configured_profiles(env) if every else (profile,)
    states = [*map(glance, _all_settings(env, names))]
    if as_json:
        facts = [_facts(state, *anyio.run(measure, state)) for state in states]
        typer.echo(json.dumps(facts if every else facts[0], indent=2))
    else:
        for state in states:
            _say(f"{state.config.profile}: {state.sentence}" if every else state.sentence)
    if all(state.status.idle for state in states):
        raise typer.Exit(_NOT_RUNNING)


@app.command()
def wait_ready(
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Give up after so long.")
    ] = None,
) -> None:
    """Wait until a server that was started answers. The exit code is 3 when none is running."""
    from kitty_nb.terminal import commands

    config = _settings(env, profile)
    if not _show_load(env, commands.wait_ready, config, timeout):
        _say(_nothing_runs(config), err=True)
        raise typer.Exit(_NOT_RUNNING)


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
    """Print the log of the profile's server, or of its last one."""
    from kitty_nb.supervisor.registry import refuse_open_folder
    from kitty_nb.terminal.status import follow_log, has_log, log_lines

    config = _settings(env, profile)
    refuse_open_folder(config)
    path = config.log_path
    there = has_log(path)
    if follow:
        anyio.run(follow_log, path, _say, lines)
    if not there:
        raise KittyError(f"There is no log {path}: no server of this profile was started yet.")
    for line in deque(log_lines(path), maxlen=lines):
        _say(line)


@app.command()
def doctor(env: _Env = _ENV, profile: _Profile = _PROFILE) -> None:
    """Check engine (on a demo model), models, port, GPU, .env, disk, versions; say what to do."""
    from rich.table import Table

    from kitty_nb.doctor import Verdict, examine
    from kitty_nb.terminal.console import PlainConsole

    findings = anyio.run(examine, env, profile)
    table = Table("", "Checked", "Found, and what to do", box=None)
    colours = {Verdict.GOOD: "green", Verdict.ODD: "yellow", Verdict.BAD: "red"}
    for finding in findings:
        text = f"{finding.found}\n{finding.advice}".rstrip()
        table.add_row(finding.verdict, finding.what, text, style=colours[finding.verdict])
    PlainConsole(markup=False, highlight=False).print(table)
    if any(finding.verdict is Verdict.BAD for finding in findings):
        raise typer.Exit(_FAILED)


@app.command()
def demo_model(
    path: Annotated[Path | None, typer.Argument(help="The .gguf file to write.")] = None,
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
    size: Annotated[
        float | None, typer.Option(metavar="GB", help="Pad it, so that it takes time to load.")
    ] = None,
) -> None:
    """Write a small model to try things out with; by default into the models folder."""
    from kitty_nb.catalog.demo_model import write_demo_model

    if size is not None and not 0 < size <= _LARGEST_DEMO:  # nan is neither
        raise typer.BadParameter("Write a number of gigabytes, such as 0.5.", param_hint="--size")
    target = path or _settings(env, profile).models_dir / _DEMO_NAME
    written = write_demo_model(target, None if size is None else int(size * 1e9))
    _say(f"{written}: {written.stat().st_size:,} bytes")


@app.command()
def download(
    repository: Annotated[
        str, typer.Argument(help="owner/name, owner/name:Q4_K_M, or its page's address.")
    ],
    quant: Annotated[
        str | None, typer.Option(metavar="Q4_K_M", help="The quantization, or the name of a file.")
    ] = None,
    only_list: Annotated[
        bool, typer.Option("--list", help="Only list its models and their sizes.")
    ] = False,
    env: _Env = _ENV,
    profile: _Profile = _PROFILE,
) -> None:
    """Download a model from the Hugging Face Hub into the models folder, and verify it.

    Its shards and its projector are included. Ctrl-C keeps the downloaded part: the same command
    resumes there. For gated and private repositories, log in with `hf auth login`.
    """
    from kitty_nb.catalog.catalog import why_not_served
    from kitty_nb.hub.repository import HubReference
    from kitty_nb.terminal import downloads
    from kitty_nb.terminal.console import PlainConsole

    folder = _settings(env, profile).models_dir
    reference = HubReference.parse(repository)
    if only_list:
        anyio.run(
            downloads.show_variants, reference, folder, PlainConsole(markup=False, highlight=False)
        )
        return
    console = PlainConsole(stderr=True, markup=False, highlight=False)
    try:
        model = anyio.run(downloads.download, reference, quant, folder, console)
    except KeyboardInterrupt:
        _say("Cancelled. The downloaded part is kept; the same command resumes there.", err=True)
        raise
    if told := why_not_served(model):
        _say(told, err=True)
    _say(f"LLAMACPP_{profile.upper()}_MODEL={model.relative_to(folder).as_posix()}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lab(context: typer.Context) -> None:
    """Open JupyterLab on notebooks/control_panel.ipynb in this folder.

    It and the notebooks beside it are written there where they are missing. Other options go to
    JupyterLab, e.g. --no-browser. The notebook says which .env it reads.
    """
    import psutil
    from jupyterlab.labapp import LabApp

    for path in (_NOTEBOOKS, *_NOTEBOOKS.glob("*.ipynb")):
        if reason := distrust(path, folders=False):
            raise KittyError(f"{reason} A notebook runs as you: open it in a folder of your own.")
    _NOTEBOOKS.mkdir(parents=True, exist_ok=True)
    # An editable install has no copies in the package: the checkout is around it.
    homes = (Path(__file__).parent, Path(__file__).parents[1])
    home = next(home for home in homes if (home / _NOTEBOOKS / _NOTEBOOK).exists())
    for notebook in (home / _NOTEBOOKS).glob("*.ipynb"):
        if not (copy := _NOTEBOOKS / notebook.name).exists():
            shutil.copyfile(notebook, copy)
    # In a container everybody is root; JupyterLab would only say how to insist.
    root = ["--allow-root"] if psutil.Process().username() == "root" else []
    here = f"--ServerApp.root_dir={Path.cwd()}"
    LabApp.launch_instance([str(_NOTEBOOKS / _NOTEBOOK), here, *root, *context.args])


def main() -> None:
    """Run the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be no text in any encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    app(prog_name="kitty-nb")


def _say(text: str, *, err: bool = False) -> None:
    typer.echo(printable(text), err=err)


def _config(env: Path, profile: str) -> ServerConfig:
    from kitty_nb.catalog.resolve import load_profile
    from kitty_nb.config import env_warnings

    _warn(env_warnings(env, profile))
    config, complaint = load_profile(env, profile)
    if complaint:
        raise complaint
    return config


def _settings(env: Path, profile: str) -> ServerConfig:
    """For what needs no model: a wrong setting must not be in the way of stopping a server."""
    return _all_settings(env, [profile])[0]


def _all_settings(env: Path, profiles: Iterable[str]) -> list[ServerConfig]:
    from kitty_nb.catalog.resolve import load_profile
    from kitty_nb.config import env_warnings

    _warn(env_warnings(env, *profiles))
    read = [load_profile(env, name) for name in profiles]
    _warn(str(complaint) for _, complaint in read if complaint)
    return [config for config, _ in read]


def _warn(warnings: Iterable[str]) -> None:
    """Say each once: profiles share most settings."""
    for warning in dict.fromkeys(warnings):
        _say(f"kitty-nb: {warning}", err=True)


def _show_load(
    env: Path,
    command: Callable[..., Awaitable[ServerState | None]],
    config: ServerConfig,
    *words: object,
) -> bool:
    """Run a command that may load a model, show its load, and say how the server is then."""
    from kitty_nb.terminal.load_display import LoadDisplay

    try:
        with LoadDisplay() as display:
            state = anyio.run(command, config, display, *words)
    except ServerCrashedError as error:
        logs = ("kitty-nb", "logs", "-n", "20", "--env", str(env), "--profile", config.profile)
        raise KittyError(f"{error}\nTo see the end of its log: {shlex.join(logs)}") from None
    if state:
        _say(state.sentence)
    return state is not None


def _facts(
    state: ServerState, memory: MemoryUse | None, tokens_per_second: float | None
) -> dict[str, Any]:
    return {
        "profile": state.config.profile,
        "status": state.status.value,
        "model": str(state.config.model) if state.config.model else None,
        "projector": str(state.projector) if state.projector else None,
        "alias": state.config.served_alias or None,
        "endpoint": state.endpoint,
        "pid": state.pid,
        "uptime_seconds": state.uptime,
        "devices": list(state.devices),
        "error": state.error,
        "log": str(state.config.log_path),
        "memory": memory and {"ram": memory.resident, "devices": memory.gpu},
        "tokens_per_second": tokens_per_second,
    }


def _nothing_runs(config: ServerConfig) -> str:
    return f"No server of the profile {config.profile!r} is running."


if __name__ == "__main__":
    main()
