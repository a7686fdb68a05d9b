"""Shows a run's progress while it trains."""

from __future__ import annotations

import time
from datetime import timedelta

from transformers import ProgressCallback


class Progress(ProgressCallback):
    """Shows the Trainer's progress bar, and one line a log instead of all numbers."""

    def __init__(self, names: list[str]):
        super().__init__()
        self.names = names

    def on_train_begin(self, args, state, control, **kwargs):
        """Count from where a run goes on, so that the time left is that of the steps left."""
        super().on_train_begin(args, state, control, **kwargs)
        self.began, self.current_step = (time.monotonic(), state.global_step), state.global_step
        if self.training_bar is not None:
            self.training_bar.n = self.training_bar.initial = state.global_step
            self.training_bar.refresh()

    def _left(self, state) -> str:
        """Estimate how long the steps left take."""
        then, first = self.began
        seconds = (time.monotonic() - then) / max(1, state.global_step - first) * (state.max_steps - state.global_step)
        return str(timedelta(seconds=round(seconds)))

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print loss, and each class's Ω_MSR and LM loss."""
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        classes = [
            f"{name} Ω {logs[f'{name}/msr']:.2f}, {logs[f'{name}/lm_loss']:.3f} nats"
            for name in self.names
            if f"{name}/msr" in logs
        ]
        line = f"step {state.global_step} of {state.max_steps}: loss {float(logs['loss']):.3f}; " + "; ".join(classes)
        line += f"; {self._left(state)} left"
        if self.training_bar is None:
            print(line, flush=True)
        else:
            self.training_bar.write(line)
