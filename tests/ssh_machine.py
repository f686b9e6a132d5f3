"""Another machine, which is this one: an sshd of the tests' own on loopback."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_STARTS_WITHIN = 20.0


def find_sshd() -> str | None:
    """Find sshd, which is where administrators' programs are."""
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class SshMachine:
    """An sshd with keys, a home folder and a configuration for clients, all in one folder.

    Attributes:
        folder: The folder.
        port: What it listens on.
        home: The home folder that its sessions see.
        client: The configuration for clients, in which the machine is called `there`.
    """

    def __init__(self, folder: Path, port: int, **environment: str) -> None:
        self.folder, self.home = folder, folder / "home"
        self.client = folder / "ssh_config"
        self.home.mkdir(parents=True)
        self.port = port
        for name in ("host", "user"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
            )
        shutil.copy(folder / "user.pub", folder / "authorized_keys")
        host_key = " ".join((folder / "host.pub").read_text().split()[:2])
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {host_key}\n")
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        seen = {"HOME": str(self.home), "PATH": path, **environment}
        variables = " ".join(f'"{name}={value}"' for name, value in seen.items())
        self.settings = {
            "Port": self.port,
            "ListenAddress": "127.0.0.1",
            "HostKey": folder / "host",
            "AuthorizedKeysFile": folder / "authorized_keys",
            "PidFile": "none",
            "UsePAM": "no",
            "StrictModes": "no",
            "PasswordAuthentication": "no",
            "MaxStartups": "100",
            "SetEnv": variables,
        }
        self.client.write_text(
            "Host there\n"
            "  HostName 127.0.0.1\n"
            f"  Port {self.port}\n"
            f"  User {getpass.getuser()}\n"
            f"  IdentityFile {folder / 'user'}\n"
            "  IdentitiesOnly yes\n"
            "  IdentityAgent none\n"
            f"  UserKnownHostsFile {folder / 'known_hosts'}\n"
            "  GlobalKnownHostsFile none\n"
        )
        self._sshd: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Let sshd listen."""
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # it insists
        lines = (f"{name} {value}\n" for name, value in self.settings.items())
        (self.folder / "sshd_config").write_text("".join(lines))
        with (self.folder / "sshd.log").open("ab") as log:
            self._sshd = subprocess.Popen(
                [str(find_sshd()), "-D", "-e", "-f", self.folder / "sshd_config"],
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        deadline = time.monotonic() + _STARTS_WITHIN
        while time.monotonic() < deadline and self._sshd.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.01)
        raise RuntimeError((self.folder / "sshd.log").read_text())

    def cut(self) -> int:
        """Kill the clients' ssh processes of this machine; return how many there were."""
        mine = [one for one in psutil.process_iter(["name", "cmdline"]) if self._is_client(one)]
        for one in mine:
            with suppress(psutil.Error):
                one.kill()
        return len(mine)

    def sessions(self) -> list[psutil.Process]:
        """Return the processes that serve the clients' connections."""
        assert self._sshd
        found = psutil.Process(self._sshd.pid).children(recursive=True)
        return [one for one in found if _name(one).startswith(("sshd", "kitty-nb"))]

    def _is_client(self, one: psutil.Process) -> bool:
        words = one.info["cmdline"] or []
        return one.info["name"] == "ssh" and str(self.client) in words

    def stop(self) -> None:
        """Let nobody in any more, and end the connections."""
        if self._sshd:
            for one in psutil.Process(self._sshd.pid).children(recursive=True):
                with suppress(psutil.Error):
                    if _name(one).startswith("sshd"):
                        one.kill()
            self._sshd.send_signal(signal.SIGTERM)
            self._sshd.wait()
            self._sshd = None


def _name(one: psutil.Process) -> str:
    """Its name; newer versions of sshd serve a connection as `sshd-session`."""
    with suppress(psutil.Error):  # it has just ended
        return one.name()
    return ""


@contextmanager
def ssh_machine(folder: Path, port: int, **environment: str) -> Iterator[SshMachine]:
    """Start one, and stop it."""
    machine = SshMachine(folder, port, **environment)
    machine.start()
    try:
        yield machine
    finally:
        machine.stop()
