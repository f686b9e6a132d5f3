from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kitty_nb
from kitty_nb import errors

PACKAGE = Path(kitty_nb.__file__).parent

# Room → what it may import of the package, as the architecture draws it.
ROOMS = {
    "errors": set(),
    "safe_files": set(),
    "network": {"errors", "config"},
    "config": {"errors", "safe_files"},
    "catalog": {"errors", "safe_files", "config"},
    "engine": {"errors", "safe_files", "network", "config"},
    "formats": {"errors", "config", "catalog", "engine"},
    "supervisor": {
        "errors",
        "safe_files",
        "network",
        "config",
        "engine",
        "catalog",
        "formats",
    },
    "client": {"errors", "network", "supervisor.events"},
    "operation": {"errors", "client", "supervisor.events", "supervisor.prompt_keeper"},
    "remote": {"errors", "network", "config", "catalog", "supervisor"},
    "manager": {
        "errors",
        "config",
        "engine",
        "catalog",
        "supervisor",
        "remote",
        "client",
        "operation",
    },
    "isolated_server": {"errors", "network", "config", "engine", "supervisor", "client"},
    "hub": {"errors", "catalog"},
    "experiments": {
        "errors",
        "config",
        "catalog",
        "client",
        "operation",
        "manager",
        "isolated_server",
        "safe_files",
    },
    "fleet": {
        "errors",
        "network",
        "safe_files",
        "config",
        "catalog",
        "engine",
        "supervisor",
        "client",
        "operation",
        "isolated_server",
        "experiments",
    },
    "widgets": {
        "errors",
        "config",
        "catalog",
        "supervisor.events",
        "remote.supervisor",
        "client",
        "operation",
        "manager",
        "hub",
        "experiments",
        "fleet",
    },
    "cli": {
        "errors",
        "safe_files",
        "network",
        "config",
        "catalog",
        "engine",
        "supervisor",
        "remote",
        "client",
        "isolated_server",
        "hub",
        "experiments",
        "formats",
    },
}
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found.add(node.module or "")
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_public_name_is_there_and_sorted() -> None:
    assert kitty_nb.__all__ == sorted(kitty_nb.__all__)
    assert all(getattr(kitty_nb, name).__name__ == name for name in kitty_nb.__all__)
    assert dir(kitty_nb) == kitty_nb.__all__
    with pytest.raises(AttributeError, match="Panel"):
        kitty_nb.Panel  # noqa: B018


def test_every_error_is_drawn() -> None:
    found = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert found == set(re.findall(r"\b[A-Z]\w+Error\b", errors.__doc__ or ""))
    assert all(issubclass(getattr(errors, name), errors.KittyError) for name in found)


def test_data_flows_one_way() -> None:
    wrong = []
    for path in SOURCES:
        mine = room(path)
        allowed = ROOMS[mine] | {mine}
        for name in imports(path):
            top, _, inside = name.partition(".")
            mentioned = top == "kitty_nb" and inside
            if mentioned and not any(f"{inside}.".startswith(f"{a}.") for a in allowed):
                wrong.append(f"{path}: {name}")
            if top in {"ipywidgets", "IPython", "anywidget"} and mine != "widgets":
                wrong.append(f"{path}: {name}")
    assert not wrong


def test_only_the_named_rooms_signal_or_read_the_environment() -> None:
    wrong = []
    for path in SOURCES:
        forbidden = ["time.sleep", "shell=True"]
        if path.name not in {"process.py", "rpc.py"}:  # which is part of the server's session
            forbidden += ["killpg", "os.kill"]
        if room(path) != "config" and path.name != "embedded.py":
            forbidden += ["os.environ"]
        text = path.read_text()
        wrong += [f"{path}: {word}" for word in forbidden if word in text]
    assert not wrong


_ON_SCREEN = re.compile(
    r"\b(?:log below|above this|[Pp]ress|[Cc]lick|[Rr]escan|button|this panel)\b"
)


def test_sentences_for_every_front_end_speak_of_none() -> None:
    wrong = []
    for path in SOURCES:
        if room(path) not in {"catalog", "config", "engine", "supervisor", "remote"}:
            continue
        tree = ast.parse(path.read_text())
        docstrings = {
            ast.get_docstring(node, clean=False)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        }
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        texts = {text for text in texts - docstrings if isinstance(text, str)}
        wrong += [f"{path}: {text}" for text in texts if _ON_SCREEN.search(text)]
    assert not wrong


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, kitty_nb;"
        "print(sorted({'gguf', 'numpy', 'ipywidgets', 'pydantic', 'httpx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "[]"


def test_a_command_does_not_wait_for_what_it_needs_later_or_never() -> None:
    late = {"httpx", "rich.console", "pygments", "gguf", "numpy", "ipywidgets"}
    late |= {"kitty_nb.supervisor.supervisor"}
    code = f"import sys, kitty_nb.cli.commands; print(sorted({late!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "[]"


def test_no_imports_go_in_a_circle() -> None:
    command = [sys.executable, "-m", "benchmarks.house"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    assert re.search(r"^import cycles +none$", done.stdout, re.MULTILINE), done.stdout
