"""Run a notebook as *Run All* does, from its first cell to its last, or to the first that fails.

Its kernel has files in place of ports, which another program could take before it does.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from tempfile import TemporaryDirectory

import nbformat
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

source, target = sys.argv[1:]
notebook = nbformat.read(source, 4)
with TemporaryDirectory() as folder:
    manager = KernelManager(kernel_name="python3", transport="ipc", ip=f"{folder}/kernel")
    with suppress(CellExecutionError):
        NotebookClient(notebook, km=manager, iopub_timeout=60).execute()
nbformat.write(notebook, target)
