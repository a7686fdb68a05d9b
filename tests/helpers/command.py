"""The command line in this process, which need not import everything anew."""

import contextlib
import io
import sys
from subprocess import CompletedProcess
from unittest import mock

from flux_attention import cli


def flux(*arguments: str) -> CompletedProcess:
    """Exit code, output and errors of ``flux-attention`` with these arguments."""
    stdout, stderr = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", ["flux-attention", *arguments]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            cli.run()
        except SystemExit as stop:
            code = stop.code
    return CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())
