"""Ctrl-C stops training once the step at work is finished and saved; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import TrainerCallback


class Interrupted(KeyboardInterrupt):
    """Says at which step Ctrl-C stopped training, and where that is saved."""

    def __init__(self, step: int, steps: int, checkpoint: Path):
        super().__init__(f"stopped after step {step} of {steps}, saved in {checkpoint}")
        self.step, self.checkpoint = step, checkpoint


class SaveOnInterrupt(TrainerCallback):
    """
    Makes the Trainer save and stop at the end of the step in which Ctrl-C comes.

    Attributes
    ----------
    stopped : bool
        Whether it did.
    """

    def __init__(self):
        self.asked = self.stopped = False
        self._before = None

    def _handle(self, number, frame) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # also in a job that had been started to ignore it
        print("\nsaving after this step; Ctrl-C again ends at once", file=sys.stderr, flush=True)

    def on_train_begin(self, args, state, control, **kwargs):
        """Take signals, which only a process's main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)

    def on_train_end(self, args, state, control, **kwargs):
        """Leave signals to whoever took them before."""
        self.release()

    def release(self) -> None:
        """Leave signals as ``on_train_end`` does, also where training failed."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def on_step_end(self, args, state, control, **kwargs):
        """Save and stop if this process, or any other, was asked to."""
        asked = self.asked
        if args.world_size > 1:  # a signal comes to processes at different times, and all must save the same step
            flag = torch.tensor(float(asked), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            asked = bool(flag)
        if asked and state.global_step < state.max_steps:
            self.stopped = True
            control.should_log = control.should_save = control.should_training_stop = True


@contextmanager
def workers_end_quietly() -> Iterator[None]:
    """
    Leave Ctrl-C to this process within a ``with`` block: those that it forks do not answer, and end with the block.

    Raises
    ------
    KeyboardInterrupt
        By Ctrl-C, whatever error ending the workers led to.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone can take signals
        yield
        return
    parent, asked, before = os.getpid(), [], signal.getsignal(signal.SIGINT)

    def handle(number, frame) -> None:
        if os.getpid() == parent and callable(before):
            asked.append(number)
            before(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    except Exception:
        if asked:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)
