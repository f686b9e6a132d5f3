"""In each Python that the suite starts: httpx has a command line of its own, which nobody uses.

It would import rich, click and pygments whenever httpx is imported, a fifteenth of a second.
"""

import sys

sys.modules["httpx._main"] = None  # type: ignore[assignment]
