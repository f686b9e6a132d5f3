"""Which profiles there are, and the port of one that names none."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

ROLES = ("primary", "coder", "q4", "f16", "summary", "vision")
PREFIX = "LLAMACPP_"
_FIRST_PORT = 8082
_NAME = re.compile(r"[A-Z][A-Z0-9_]*")


def default_port(profile: str) -> int:
    """The port of a profile that names none: each role has its own, so that all can run at once."""
    role = profile.lower()
    return _FIRST_PORT + (ROLES.index(role) if role in ROLES else 0)


def named_profiles(keys: Iterable[str], suffixes: Collection[str]) -> tuple[str, ...]:
    """The profiles that some keys of a `.env` file are about; roles first, then as they come.

    A role is there when it has any key of its own, another profile when it has a model, and
    `primary` when there is no other.

    Args:
        keys: The keys that have a value.
        suffixes: What can follow `LLAMACPP_<PROFILE>_`.
    """
    found = dict.fromkeys(
        name.lower()
        for key in keys
        for name, suffix in [split_key(key, suffixes)]
        if suffix == "MODEL" or name.lower() in ROLES
    )
    roles = [role for role in ROLES if role in found]
    others = [name for name in found if name and name not in ROLES]
    if "" in found and "primary" not in roles:  # LLAMACPP_MODEL, a model for whoever has none
        roles.insert(0, "primary")
    return (*roles, *others) or ("primary",)


def split_key(key: str, suffixes: Collection[str]) -> tuple[str, str]:
    """Return the profile in a key, none where it is for all of them, and the setting's suffix.

    Both are empty where it is no setting.
    """
    rest = key.removeprefix(PREFIX)
    if rest in suffixes:
        return "", rest
    for suffix in sorted(suffixes, key=len, reverse=True):
        name = rest.removesuffix(f"_{suffix}")
        if key.startswith(PREFIX) and name != rest and _NAME.fullmatch(name):
            return name, suffix
    return "", ""
