"""Profiles in the formats of other programs: exports, and imports into `.env`.

The arguments of llama-server are the common language: `engine/command_line.py` has the table of
settings and flags, used in both directions. What a format can't express becomes a note, and is
never dropped silently.
"""

from enum import StrEnum


class Format(StrEnum):
    """The program that is to run the server."""

    LLAMA_SWAP = "llama-swap"
    ROUTER = "router"
    SYSTEMD = "systemd"
    QUADLET = "quadlet"
    COMPOSE = "compose"

    @property
    def runs_here(self) -> bool:
        """Whether it runs this machine's engine, rather than one in a container or its own."""
        return self in {Format.LLAMA_SWAP, Format.SYSTEMD}


class Source(StrEnum):
    """The program that a file was written for."""

    LLAMA_SWAP = "llama-swap"
    ROUTER = "router"
    OLLAMA = "ollama"
    LM_STUDIO = "lm-studio"
