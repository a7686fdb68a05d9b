"""Tells how far a run is, and what it learns, while it trains."""

from __future__ import annotations

from collections.abc import Callable

from transformers import TrainerCallback

from flux_attention.progress import Progress

#: Lines that a run says at most, and one: of a long run each log would be too much to read.
MAX_LINES = 20


class TellProgress(TrainerCallback):
    """
    Tells ``progress`` of each step, and says a line of loss and classes now and then.

    Parameters
    ----------
    names : list of str
        Of the task classes.
    say : callable
        Takes the lines.
    progress : Progress
    """

    def __init__(self, names: list[str], say: Callable[[str], object], progress: Progress):
        self.names, self.say, self.progress = names, say, progress
        self.first = self.next_line = 0
        self.now = ""

    def on_train_begin(self, args, state, control, **kwargs):
        """Count the share from where a run goes on, so that the time left is that of the steps left."""
        self.first = state.global_step
        self._tell(state)

    def on_step_end(self, args, state, control, **kwargs):
        """Count the step."""
        self._tell(state)

    def _tell(self, state) -> None:
        if state.is_world_process_zero:
            share = (state.global_step - self.first) / max(1, state.max_steps - self.first)
            self.progress("training", state.global_step, state.max_steps, self.now, share)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Note loss, and each class's Ω_MSR and LM loss."""
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        classes = [
            f"{name} Ω {logs[f'{name}/msr']:.2f}, {logs[f'{name}/lm_loss']:.3f} nats"
            for name in self.names
            if f"{name}/msr" in logs
        ]
        self.now = "; ".join([f"loss {float(logs['loss']):.3f}", *classes])
        if state.global_step >= self.next_line:
            self.next_line = state.global_step + -(-state.max_steps // MAX_LINES)
            self.say(f"step {state.global_step} of {state.max_steps}: {self.now}")
