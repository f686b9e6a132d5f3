"""How ssh is run: nobody is there to answer it, and nothing is believed that nobody has checked."""

from __future__ import annotations

_OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "8",  # seconds
    # A line that is dead is noticed, also while nobody asks anything.
    "ServerAliveInterval": "2",
    "ServerAliveCountMax": "3",
    # Whatever the user's configuration says of the connections that a person makes.
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "PermitLocalCommand": "no",
    "RemoteCommand": "none",
    "ControlPersist": "no",
}


def ssh_command(host: str, remote: str, file: object, *words: str) -> tuple[str, ...]:
    """Return the command that runs another one on another machine.

    Args:
        host: The machine, as ssh knows it.
        remote: What the shell there runs.
        file: The file with ssh's configuration; None for the user's own.
        *words: More options of ssh.
    """
    own = ("-F", str(file)) if file else ()
    options = (f"-o{name}={value}" for name, value in _OPTIONS.items())
    return ("ssh", *own, *options, *words, "--", host, remote)
