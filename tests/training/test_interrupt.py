"""Ctrl-C in training: saved at the step that was finished, and gone on from to the same end; runs of two processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.command import ENVIRONMENT
from helpers.training import FSDP, same_losses, short_recipe
from safetensors.torch import load_file

from flux_attention.training import Recipe, train
from flux_attention.training.interrupt import SaveOnInterrupt

#: More than a run makes between the line about the third of them and the interrupt that answers it.
STEPS = 24
#: How much routers differ at the end.
EXACT, CLOSE = dict(atol=0, rtol=0), dict(atol=1e-4, rtol=1e-3)


def take_interrupts():  # a job started in the background has them ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*arguments, processes=1, program=("-m", "flux_attention.cli"), **variables):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else ()), *program, "train", *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.Popen(command, env=environment, preexec_fn=take_interrupts, **pipes)


def wait_for(process, words):
    """Read standard output up to a line with ``words``."""
    for line in process.stdout:
        if words in line:
            return line
    raise AssertionError(process.stderr.read())


def interrupt(recipe, tmp_path, processes):
    """Train a whole run, and interrupt another: its arguments, folder, checkpoint, exit code and standard error."""
    recipe.training = {**recipe.training, "max_steps": STEPS, "save_steps": STEPS}
    train(recipe)
    path, stopped = tmp_path / "recipe.yaml", tmp_path / "stopped"
    recipe.to_yaml(path)
    arguments = [str(path), "--output", str(stopped)]
    with start(*arguments, processes=processes) as process:
        wait_for(process, f"step 3 of {STEPS}")
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
    return arguments, stopped, checkpoint, process.returncode, stderr


def assert_same_end(one, other, tolerance, **close):
    same_losses(one, other, tolerance)
    first, second = (load_file(folder / "routers.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **close)


def test_an_interrupted_run_is_saved_and_goes_on_to_the_same_end(recipe, tmp_path):
    _, stopped, checkpoint, code, stderr = interrupt(recipe, tmp_path, 1)
    assert code == 130 and "interrupted" in stderr and "Traceback" not in stderr
    said = []  # by what the command calls, which saves the start of a process
    train(Recipe.from_dict({**recipe.to_dict(), "output": str(stopped)}), say=said.append)
    assert f"going on from {checkpoint}" in said
    assert_same_end(Path(recipe.output), stopped, 0, **EXACT)


def test_two_processes_give_the_same_runs_as_one(recipe, base, records_file, finished, tmp_path):
    """With a copy of the model each, interrupted; and sharing it. One start, of which each takes long, serves both."""
    arguments, stopped, checkpoint, _, _ = interrupt(recipe, tmp_path, 2)
    shared, earlier = tmp_path / "shared", tmp_path / "first"
    sharing = short_recipe(base, records_file, shared)
    sharing.training = {**sharing.training, **FSDP}
    sharing.to_yaml(tmp_path / "shared.yaml")
    script, environment = Path(__file__).with_name("fsdp_on_cpu.py"), {"SHARED": str(tmp_path / "shared.yaml")}
    with start(*arguments, processes=2, program=[str(script)], **environment) as process:
        assert f"going on from {checkpoint}" in wait_for(process, "going on")
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stdout + stderr
    assert_same_end(Path(recipe.output), stopped, 1e-4, **CLOSE)
    # It names what it saves; a run that was stopped goes on to the same end.
    saved = torch.load(shared / "checkpoint-4/optimizer.pt", weights_only=True)
    assert {name.split(".")[0] for name in saved["state"]} == {"routers", "objective"}
    assert f"going on from {shared / 'checkpoint-4'}" in stdout
    before, after = (load_file(folder / "routers.safetensors") for folder in (earlier, shared))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert_same_end(finished, shared, 1e-4, **CLOSE)


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
