"""Runs the notebooks of this folder, and writes them with what they showed to build/notebooks: `make notebooks`.

Offline, one kernel after the other; an error in a cell is an error of the run.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parent
OUTPUT = FOLDER.parent / "build" / "notebooks"


def run(path: Path) -> None:
    """Run one, in an empty kernel."""
    notebook = nbformat.read(path, as_version=4)
    began = time.perf_counter()
    try:
        # The kernel warns that its ports, of this machine alone, are not encrypted.
        quiet = ["--log-level=ERROR"]
        NotebookClient(notebook, timeout=300, kernel_name="python3", extra_arguments=quiet).execute(cwd=str(FOLDER))
    except CellExecutionError as error:
        sys.exit(f"{path.name}: {error}")
    finally:
        OUTPUT.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, OUTPUT / path.name)
    print(f"{path.name}: {time.perf_counter() - began:.0f} s, {OUTPUT / path.name}")


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    for found in sorted(FOLDER.glob("*.ipynb")):
        run(found)
