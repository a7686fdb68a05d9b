"""What `train` shows while it is at work: in a terminal a bar, elsewhere a few lines; the Trainer's own never."""

import os
import pty
import re
import subprocess

import pytest
from helpers.command import COMMAND, ENVIRONMENT, flux_process

#: Each of them is logged.
STEPS = 50


@pytest.fixture
def path(recipe, tmp_path):
    recipe.training = {**recipe.training, "max_steps": STEPS, "save_steps": STEPS, "logging_steps": 1}
    recipe.to_yaml(tmp_path / "recipe.yaml")
    return str(tmp_path / "recipe.yaml")


def test_a_terminal_has_a_bar_with_count_and_time_left(path):
    ours, its = pty.openpty()
    environment = {**ENVIRONMENT, "TERM": "xterm"}
    with subprocess.Popen([*COMMAND, "train", path], stdin=its, stdout=its, stderr=its, env=environment) as process:
        os.close(its)
        pieces = []
        try:
            while piece := os.read(ours, 2**16):
                pieces.append(piece)
        except OSError:  # how Linux says that the other end is closed
            pass
        finally:
            os.close(ours)
    shown = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", b"".join(pieces).decode())
    assert process.returncode == 0, shown
    assert re.search(rf"training +━+ +\d+ of {STEPS} +\d+ s left +loss \d", shown), shown
    assert f"step 1 of {STEPS}: loss " in shown and "the adapter is in" in shown
    assert "it/s" not in shown and "%|" not in shown


def test_a_log_has_few_lines_and_no_bar(path):
    result = flux_process("train", path)
    assert result.returncode == 0, result.stderr
    steps = [int(step) for step in re.findall(rf"^step (\d+) of {STEPS}: loss ", result.stdout, re.MULTILINE)]
    assert steps[:2] == [1, 4] and 10 < len(steps) <= 20
    written = result.stdout + result.stderr
    assert "\r" not in written and "━" not in written and "it/s" not in written
    assert len(written.splitlines()) < STEPS
