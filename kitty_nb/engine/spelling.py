"""Flags that builds of llama-server spell differently: from the user's words to a build's. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kitty_nb.config.engine_flags import spelled

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kitty_nb.engine.dialect import Dialect

# Names of one option, of different times and builds.
_RENAMED = (
    ("--n-predict", "--predict", "-n"),
    ("--gpu-layers", "--n-gpu-layers", "-ngl"),
    ("--temp", "--temperature"),
    ("--verbosity", "--log-verbosity", "-lv"),
    ("--embedding", "--embeddings"),
    ("--rerank", "--reranking"),
    ("--ui", "--webui"),
    ("--no-ui", "--no-webui"),
    ("--load-mode", "-lm"),
    ("--direct-io", "-dio"),
    ("--no-direct-io", "-ndio"),
    ("--spec-draft-model", "--model-draft", "-md"),
    ("--spec-draft-n-max", "--draft-max", "--draft-n", "--draft"),
    ("--spec-draft-n-min", "--draft-min", "--draft-n-min"),
    ("--spec-draft-p-min", "--draft-p-min"),
    ("--spec-draft-ngl", "--gpu-layers-draft", "--n-gpu-layers-draft", "-ngld"),
    ("--spec-draft-device", "--device-draft", "-devd"),
    ("--spec-draft-type-k", "--cache-type-k-draft", "-ctkd"),
    ("--spec-draft-type-v", "--cache-type-v-draft", "-ctvd"),
)
_NAMES = {name: names for names in _RENAMED for name in names}
# What a build without the first flag is told instead: the first whose flags it knows. Empty is a
# wish for what it does anyway.
_INSTEAD = {
    "--mlock --no-mmap": ("--load-mode mlock",),
    "--no-mmap --mlock": ("--load-mode mlock",),
    "--mlock": ("--load-mode mlock",),  # so llama.cpp's own advice
    "--no-mmap": ("--load-mode none",),
    "--mmap": ("--load-mode mmap", ""),
    "--direct-io": ("--load-mode dio",),
    "--no-direct-io": ("",),
    "--load-mode none": ("--no-mmap",),
    "--load-mode mmap": ("--mmap", ""),
    "--load-mode mlock": ("--no-mmap --mlock",),
    "--load-mode mmap+mlock": ("--mlock",),
    "--load-mode dio": ("--direct-io",),
    "--load-mode auto": ("",),
    "--no-jinja": ("",),
}
_LONGEST = 2
_SWITCHED = {"on", "off", "auto"}


def spell(dialect: Dialect, words: Sequence[str]) -> Iterator[str]:
    """Yield the words of a command line as this build spells them; unknown ones unchanged."""
    rest = list(words)
    while rest:
        taken, said = _spell_first(dialect, rest)
        yield from said
        del rest[:taken]


def is_flag(word: str) -> bool:
    """Tell whether a word is a flag rather than a value such as -1."""
    return word.startswith("-") and not word[1:2].isdigit() and word[1:2] != "."


def _spell_first(dialect: Dialect, words: Sequence[str]) -> tuple[int, Sequence[str]]:
    """Return how many words the first option is, and what to say for them."""
    flag, value = words[0], words[1] if words[1:] else "-"
    option = dialect.option(flag)
    if not is_flag(flag):
        return 1, (flag,)
    if option and option.values and "on" in option.choices and is_flag(value):
        return 1, (flag, "on")  # a switch in other builds
    if option and not option.values and value in _SWITCHED:
        return 2, (flag,) if value == "on" else ()  # with a value in other builds
    if option:
        taken = 1 + option.values
        return taken, words[:taken]
    name = next(filter(dialect.option, _NAMES.get(spelled(flag), ())), None)
    if name:
        return 1, (name,)
    said = [_NAMES.get(spelled(word), (spelled(word),))[0] for word in words[:_LONGEST]]
    for taken in range(len(said), 0, -1):
        for instead in _INSTEAD.get(" ".join(said[:taken]), ()):
            if all(map(dialect.option, filter(is_flag, instead.split()))):
                return taken, instead.split()
    return 1, (flag,)
