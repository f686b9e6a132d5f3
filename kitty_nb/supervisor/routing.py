"""What a router serves: the profiles as presets, and how many models may be loaded at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from anyio.to_thread import run_sync

from kitty_nb.catalog.memory import Memory, estimate, plan, read_shape
from kitty_nb.catalog.resolve import routed_profiles
from kitty_nb.engine.command_line import build_router_command
from kitty_nb.errors import KittyError
from kitty_nb.formats import Format
from kitty_nb.supervisor.forecast import Forecaster, Running, free_memory, settings_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kitty_nb.config import ServerConfig
    from kitty_nb.engine.locate import Engine

_GB = 1e9


@dataclass(frozen=True, slots=True)
class RouterPlan:
    """What a router is started with.

    Attributes:
        command: The command line.
        presets: The content of the presets file that it names.
        notes: What is amiss, in sentences.
    """

    command: tuple[str, ...]
    presets: str
    notes: tuple[str, ...]


def presets_path(config: ServerConfig) -> Path:
    """The file with the presets of a router's profile."""
    return config.log_dir / f"{config.profile}.presets.ini"


def pinned_profiles(config: ServerConfig) -> tuple[str, ...]:
    """Return the profiles that a router keeps loaded. It reads the disk."""
    try:
        return tuple(one.profile for one in routed_profiles(config) if one.pinned)
    except KittyError:  # changed since it was started
        return ()


async def router_command(config: ServerConfig, engine: Engine) -> RouterPlan:
    """Return what starts a router for its profiles, of which as many are loaded as fit together.

    Raises:
        ConfigError: Listing what is wrong with the profiles.
        UnknownFlagError: When this build has no router, or lacks a flag in `extra_args`.
    """
    from kitty_nb.formats.exports import export  # noqa: PLC0415 - only routers need YAML

    profiles = await run_sync(routed_profiles, config)
    exported = await run_sync(export, Format.ROUTER, profiles)
    measured = await run_sync(free_memory, None)
    _, memory = await Forecaster().find_memory(config, Running(), measured)
    needs = await run_sync(_needs, profiles, engine, memory or measured)
    free = [pool.free for pool in (memory or measured).pools]
    if config.router_memory_gb is not None:
        free[0] = min(free[0], int(config.router_memory_gb * _GB))
    pinned = [need for one, need in zip(profiles, needs, strict=True) if one.pinned]
    others = [need for one, need in zip(profiles, needs, strict=True) if not one.pinned]
    most = most_together(pinned, others, free)
    # The key that clients need comes by the environment, and other notes are about other programs.
    notes = [note for note in exported.notes if "left out" in note or "names another" in note]
    if most < len(pinned) + bool(others):
        most = len(pinned) + bool(others)
        notes.append(
            "The pinned models and the largest of the others do not fit into memory together. Pin"
            " fewer, or lower their context."
        )
    command = build_router_command(engine, config, presets_path(config), most)
    return RouterPlan(command, exported.text, tuple(notes))


def most_together(
    pinned: Sequence[Sequence[int]], others: Sequence[Sequence[int]], free: Sequence[int]
) -> int:
    """Return the largest number of models of which any fit together, the pinned always among them.

    A router unloads by a number of models, not by their memory. With this number it never has to.

    Args:
        pinned: What each pinned model needs of each pool, in bytes.
        others: What each other model needs.
        free: What each pool has.
    """
    most = len(pinned) + len(others)
    for pool, room in enumerate(free):
        room -= sum(need[pool] for need in pinned)  # noqa: PLW2901
        count = len(pinned)
        for need in sorted((need[pool] for need in others), reverse=True):
            room -= need  # noqa: PLW2901
            if room < 0:
                break
            count += 1
        most = min(most, count)
    return most


def _needs(
    profiles: Sequence[ServerConfig], engine: Engine, memory: Memory
) -> list[tuple[int, ...]]:
    """What each model needs of each pool, by the formula of the memory preview."""
    needs = []
    for one in profiles:
        shape = read_shape(one.require_model())
        settled = plan(shape, settings_of(one, engine), memory)
        needs.append(tuple(need.known for need in estimate(shape, settled, memory.gpus)))
    return needs
