"""Ctrl-C in training: saved at the step that was finished, and gone on from to the same end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.command import COMMAND, ENVIRONMENT
from helpers.training import same_losses
from safetensors.torch import load_file

from flux_attention.training import Recipe, train
from flux_attention.training.interrupt import SaveOnInterrupt

#: More than a run makes between the line about the third of them and the interrupt that answers it.
STEPS = 24
#: How much routers differ at the end.
EXACT, CLOSE = dict(atol=0, rtol=0), dict(atol=1e-4, rtol=1e-3)


def take_interrupts():  # a job started in the background has them ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*arguments, processes=1):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = COMMAND if processes == 1 else [sys.executable, *torchrun, *COMMAND[1:]]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([*command, "train", *arguments], env=environment, preexec_fn=take_interrupts, **pipes)


def wait_for(process, words):
    """Read standard output up to a line with ``words``."""
    for line in process.stdout:
        if words in line:
            return line
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupted_run_is_saved_and_goes_on_to_the_same_end(recipe, tmp_path, processes):
    """A run of one process, as it is without an interrupt; or of two processes."""
    recipe.training = {**recipe.training, "max_steps": STEPS, "save_steps": STEPS}
    train(recipe)
    path, whole, stopped = tmp_path / "recipe.yaml", Path(recipe.output), tmp_path / "stopped"
    recipe.to_yaml(path)
    arguments = [str(path), "--output", str(stopped)]
    with start(*arguments, processes=processes) as process:
        assert "left" in wait_for(process, f"step 3 of {STEPS}")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    (checkpoint,) = stopped.glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert 3 <= step < STEPS
    program = "flux-attention" if processes == 1 else "torchrun --nproc-per-node 2 -m flux_attention.cli"
    go_on = (
        f"stopped after step {step} of {STEPS}, saved in {checkpoint}; to go on: {program} train {' '.join(arguments)}"
    )
    assert go_on in stderr
    assert not (stopped / "routers.safetensors").exists()
    if processes == 1:
        assert process.returncode == 130 and "interrupted" in stderr and "Traceback" not in stderr
        said = []  # by what the command calls, which saves the start of a process
        train(Recipe.from_dict({**recipe.to_dict(), "output": str(stopped)}), say=said.append)
        assert f"going on from {checkpoint}" in said
    else:
        with start(*arguments, processes=processes) as process:
            assert f"going on from {checkpoint}" in wait_for(process, "going on")
            stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    same_losses(whole, stopped, 0 if processes == 1 else 1e-4)
    first, second = (load_file(folder / "routers.safetensors") for folder in (whole, stopped))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **(EXACT if processes == 1 else CLOSE))


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_a_second_interrupt_ends_at_once(before):
    """Whatever took interrupts before: jobs that a script starts in the background ignore them."""
    whole = signal.signal(signal.SIGINT, before)
    interrupt = SaveOnInterrupt()
    interrupt.on_train_begin(None, None, None)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        interrupt.on_train_end(None, None, None)
        assert signal.getsignal(signal.SIGINT) == before
    finally:
        signal.signal(signal.SIGINT, whole)
