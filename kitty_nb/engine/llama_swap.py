"""llama-swap, and the versions of it that do what kitty_nb asks."""

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
        lacks: What older ones can't do.
    """
    told = await output_of((program, "-version"), _ANSWERS_WITHIN)
    if "version: " not in told:
        said = told.strip().splitlines()[0][:200]
        return f"{program} -version printed no version of llama-swap: {said} Reinstall it: {HOME}"
    found = re.search(r"version: (\d+)", told)
    version = int(found[1]) if found else 0  # built by the user
    if 0 < version < least:
        return (
            f"{program} is version {version}, which can't {lacks}. Update it to version {least} or"
            f" later: {HOME}"
        )
    return None
