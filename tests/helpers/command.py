"""The command line for tests: in this process, or in one of its own where the process is the point."""

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from unittest import mock

from flux_attention.cli import run

COMMAND = [sys.executable, "-m", "flux_attention.cli"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def flux(*arguments, stdin=b""):
    """Run a command in this process, which saves the imports."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["flux-attention", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))),
        mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            run()
        except SystemExit as end:
            return Result(end.code, out.getvalue(), err.getvalue())
    raise AssertionError("the command did not exit")


def flux_process(*arguments, timeout=300):
    """Run a command in a process of its own."""
    options = dict(capture_output=True, text=True, env=ENVIRONMENT, stdin=subprocess.DEVNULL, timeout=timeout)
    return subprocess.run([*COMMAND, *arguments], **options)


def write_prompt(path):
    """A prompt that asks for a fact behind the sink and before the window."""
    lines = [f"x{i} = compute({i})" for i in range(150)]
    lines.insert(30, "# The secret code of the silver whale is 48213.")
    path.write_text("\n".join(lines) + "\n# Question: What is the secret code of the silver whale?\n# Answer:\n")
    return str(path)
