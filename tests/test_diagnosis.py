from __future__ import annotations

import errno
import re
import signal
import subprocess
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from kitty_nb.config import env_settings
from kitty_nb.supervisor.diagnosis import FROM_OUTSIDE, diagnose, diagnose_launch, read_signatures
from kitty_nb.supervisor.process import oom_kills

TABLES = read_signatures()
FAILED_LOAD = """\
0.00.005.272 E llama_model_load_from_file_impl: failed to load model
0.00.005.313 E common_fit_params: encountered an error while trying to fit params to free device\
 memory: failed to load model
0.00.005.336 E cmn  common_init_: failed to load model '/models/m.gguf'
0.00.005.342 E srv    load_model: failed to load model, '/models/m.gguf'
0.00.005.344 I srv    operator(): operator(): cleaning up before exit...
0.00.005.652 E srv  llama_server: exiting due to model loading error
"""


class Ending(NamedTuple):
    """A server's end, and what is to be made of it; see `endings.toml`."""

    name: str
    cause: str
    remedy: str
    log: str
    code: int = 1
    around: str = ""
    lasting: bool = False
    reported: bool = False

    @property
    def lines(self) -> list[str]:
        told = self.log.splitlines()
        if not self.around:
            return told
        told = [f"0.00.005.105 E {line}" for line in told]
        if self.around == "load":  # the trial fit says it first
            begin = "0.00.004.990 I srv    load_model: loading model '/models/m.gguf'"
            return [begin, *told, *told, *FAILED_LOAD.splitlines()]
        created = "0.00.005.163 E cmn  common_init_: failed to create context with model '/m.gguf'"
        return [*told, created, *FAILED_LOAD.splitlines()[-2:]]


ENDINGS = [
    Ending(name, **values)
    for name, values in tomllib.loads(
        Path(__file__).with_name("endings.toml").read_text(encoding="utf-8")
    ).items()
]
LOGS = Path("/state/kitty_nb/logs")
NO_SUCH_FILE = ENDINGS[0].lines

FULL_LIFE = """\
0.00.004.990 I srv    load_model: loading model '/models/m.gguf'
0.00.005.331 E common_fit_params: encountered an error while trying to fit params to free device\
 memory: std::bad_alloc
0.00.014.397 I srv  llama_server: model loaded
0.00.014.411 I srv  llama_server: listening on http://127.0.0.1:8082
0.09.014.411 W srv    operator(): unauthorized: Invalid API Key"""


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.name)
def test_every_ending_has_its_cause_its_remedy_and_its_proof(ending: Ending) -> None:
    diagnosis = diagnose(ending.code, ending.lines)

    assert ending.cause in diagnosis.cause
    assert ending.remedy in diagnosis.remedy
    suffixes = "|".join(setting.suffix for setting in env_settings().values())
    assert not re.search(rf"\b({suffixes})\b", diagnosis.remedy)  # without LLAMACPP_ it is no key
    assert diagnosis.repeats == ending.lasting
    assert not (diagnosis.blames_model and "memory" in diagnosis.cause)
    assert str(diagnosis).startswith(f"The server {diagnosis.ending}: ")
    assert str(diagnosis).endswith(f" {diagnosis.cause} {diagnosis.remedy}")
    assert diagnosis.evidence
    assert all(any(line.endswith(proof) for line in ending.lines) for proof in diagnosis.evidence)
    assert not any(proof.startswith("0.0") for proof in diagnosis.evidence)


def test_every_row_has_an_ending() -> None:
    patterns = ["|".join(row["patterns"]) for row in TABLES["signature"]]
    used = {
        next(one for one in patterns if any(re.search(one, line) for line in ending.lines))
        for ending in ENDINGS
    }
    assert used == {*patterns}


def test_the_trial_fit_does_not_say_it_twice() -> None:
    empty = next(ending for ending in ENDINGS if ending.name == "empty file")
    assert diagnose(1, empty.lines).evidence == ("gguf_init_from_reader: failed to read magic",)


def test_a_line_of_structure_with_more_lines_in_it_is_one() -> None:
    line = "0.00.1.2 E common_chat_templates_init: error: parser\n...{{ unclosed...\n   ^"
    diagnosis = diagnose(1, [line])
    assert diagnosis.evidence == ("common_chat_templates_init: error: parser ...{{ unclosed... ^",)


def test_evidence_is_bounded() -> None:
    log = [f"E CUDA error: {n} {'x' * 20_000}" for n in range(1000)]
    diagnosis = diagnose(1, log)
    assert len(diagnosis.evidence) == 5
    assert max(map(len, diagnosis.evidence)) <= 300
    assert len(str(diagnosis)) < 1000


@pytest.mark.parametrize(
    "number",
    [*map(signal.Signals.__getitem__, TABLES["signal"]), *FROM_OUTSIDE],
    ids=lambda number: number.name,
)
@pytest.mark.parametrize("by_script", [False, True])
def test_a_signal_is_named(number: signal.Signals, by_script: bool) -> None:
    diagnosis = diagnose(128 + number if by_script else -number, FULL_LIFE.splitlines())
    assert number.name in str(diagnosis)
    reading = TABLES["signal"].get(number.name, TABLES["ending"]["stopped"])
    assert diagnosis.cause == reading["cause"]
    assert not diagnosis.evidence
    assert diagnosis.repeats == (number is signal.SIGILL)


@pytest.mark.parametrize(
    ("out_of_memory", "said"),
    [
        (None, "often the system because memory ran out"),
        (True, "The system killed it because memory ran out."),
        (False, "The kernel did not; a memory daemon"),
    ],
)
def test_a_kill_is_the_systems_where_it_says_so(out_of_memory: bool | None, said: str) -> None:
    diagnosis = diagnose(-signal.SIGKILL, FULL_LIFE.splitlines(), out_of_memory=out_of_memory)
    assert diagnosis.ending == "was killed by SIGKILL"
    assert said in diagnosis.cause
    assert not diagnosis.repeats


@pytest.mark.parametrize(
    ("code", "log", "said"),
    [
        (0, f"{FULL_LIFE}\n0.31.5.6 I srv    operator(): cleaning up before exit...", "asked it"),
        (0, FULL_LIFE, "asked it"),  # the embedded engine ends without a word
        (0, "main: model loaded", "asked it"),  # builds of 2024 write no times
        (0, "\n".join(NO_SUCH_FILE), "File not found"),  # a script lost the code
        (0, "Available devices:\n  (none)", "without starting to serve"),
        (0, "", "without starting to serve"),
    ],
)
def test_an_end_without_an_error(code: int, log: str, said: str) -> None:
    assert said in diagnose(code, log.splitlines()).cause


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("\n".join(NO_SUCH_FILE), "File not found"),
        (f"{FULL_LIFE}\n0.31.5.6 I srv    operator(): cleaning up before exit...", "asked it"),
        (FULL_LIFE, "cause is unknown"),
        ("\n".join((FULL_LIFE, "No space left on device", *["fine"] * 300)), "cause is unknown"),
        (f"{FULL_LIFE}\n[ 8091] 0.54.2.3 E CUDA error: out of memory", "cause is unknown"),
    ],
)
def test_the_end_of_an_adopted_server_has_no_exit_code(log: str, said: str) -> None:
    diagnosis = diagnose(None, log.splitlines())
    assert diagnosis.ending == "ended"
    assert said in diagnosis.cause


def test_an_adopted_server_that_the_system_killed() -> None:
    diagnosis = diagnose(None, FULL_LIFE.splitlines(), out_of_memory=True)
    assert "memory ran out" in diagnosis.cause


@pytest.mark.parametrize(
    ("code", "log", "said"),
    [
        (7, [], "ended with exit code 7. The cause"),
        (-99, [], "was killed by signal 99. The cause"),
        (1, ["I fine", "E something failed here", "error: later"], "1: E something failed here."),
        (
            1,
            ["0.00.1.2 I all failed", "0.00.1.2 E odd thing"],
            "exit code 1: odd thing. The cause",
        ),
        (1, ["Traceback:", "  File x", "ValueError: no path"], "exit code 1: ValueError: no path."),
        (1, [FAILED_LOAD], "exit code 1: llama_model_load_from_file_impl: failed to load model"),
        (1, [*FULL_LIFE.splitlines(), "error: old", "error: new"], "exit code 1: error: new."),
    ],
)
def test_an_unknown_end_shows_the_telling_line(code: int, log: list[str], said: str) -> None:
    lines = [line for text in log for line in text.splitlines()]
    diagnosis = diagnose(code, lines)
    assert said in str(diagnosis)
    assert not diagnosis.repeats


def test_what_went_wrong_before_the_model_was_loaded_did_not_end_it() -> None:
    early = NO_SUCH_FILE
    later = "0.00.014.397 I srv          init: model loaded"
    assert "File not found" in diagnose(1, early).cause
    assert "cause is unknown" in diagnose(1, [*early, later]).cause


@pytest.mark.parametrize("name", TABLES["launch"])
def test_a_program_that_cannot_be_started_is_explained(name: str) -> None:
    number = getattr(errno, name, None)
    if number is None:
        pytest.skip("this system has no such error")
    diagnosis = diagnose_launch(OSError(number, "said by the system", "/opt/llama-server"), LOGS)
    assert str(diagnosis).startswith(
        "The server could not be started: said by the system: /opt/llama-server. "
    )
    assert "{" not in diagnosis.cause
    assert diagnosis.repeats == TABLES["launch"][name].get("repeats", False)


def test_a_program_that_is_none_is_explained(tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_bytes(b"\x7fELF garbage")
    program.chmod(0o755)
    with pytest.raises(OSError) as refused:  # noqa: PT011  the system's message, not ours
        subprocess.Popen([program])
    assert "This machine cannot run" in str(diagnose_launch(refused.value, LOGS))


@pytest.mark.parametrize(
    ("number", "file", "says"),
    [
        (
            errno.EACCES,
            "/state",
            "write to the log folder /state/kitty_nb/logs. Set LLAMACPP_LOG_DIR",
        ),
        (
            errno.ENOENT,
            f"{LOGS}",
            "write to the log folder /state/kitty_nb/logs. Set LLAMACPP_LOG_DIR",
        ),
        (errno.ENOSPC, f"{LOGS}/primary.log", "log folder /state/kitty_nb/logs is full. .*LOG_DIR"),
        (
            errno.ENOSPC,
            None,
            "No space left: /state/kitty_nb/logs. The disk that holds the log folder",
        ),
        (
            errno.EACCES,
            "/opt/llama-server",
            "permission to use /opt/llama-server. Fix its permissions",
        ),
    ],
)
def test_a_log_that_cannot_be_written_is_not_blamed_on_the_program(
    number: int, file: str | None, says: str
) -> None:
    error = OSError(number, "No space left", file) if file else OSError(number, "No space left")
    assert re.search(says, str(diagnose_launch(error, LOGS)))


def test_oom_kills_are_counted(tmp_path: Path) -> None:
    counters = tmp_path / "vmstat"
    counters.write_text("pgfault 12\noom_kill 3\noom_kill_other 9\n")
    assert oom_kills(counters) == 3
    counters.write_text("pgfault 12\n")
    assert oom_kills(counters) is None
    assert oom_kills(tmp_path / "none") is None
    assert (oom_kills() is not None) == Path("/proc/vmstat").exists()
