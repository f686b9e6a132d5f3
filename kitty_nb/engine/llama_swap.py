"""llama-swap: which of its versions does what kitty_nb asks of it."""

import re

from kitty_nb.engine.locate import output_of

HOME = "https://github.com/mostlygeek/llama-swap"
# The first versions that pass a client's key on to the server that they ask, and that choose among
# several servers of one model by their requests.
PASSES_KEY, SPREADS = 218, 242
_ANSWERS_WITHIN = 10.0  # seconds, on a busy machine too


async def why_unfit(program: str, least: int, lacks: str) -> str | None:
    """Return why a program can't be used, in sentences; None if it can.

    Args:
        program: Where it is.
        least: The first version that will do.
        lacks: What older ones do not do.
    """
    told = await output_of((program, "-version"), _ANSWERS_WITHIN)
    if "version: " not in told:
        return (
            f"{program} is not a llama-swap that runs here; reinstall it: {HOME}. Its -version"
            f" printed: {told.strip().splitlines()[0][:200]}"
        )
    version = re.search(r"version: (\d+)", told)
    if version and 0 < int(version[1]) < least:  # 0: built by the user
        return (
            f"{program} is version {int(version[1])}, which does not {lacks}. Update it to version"
            f" {least} or later: {HOME}"
        )
    return None
