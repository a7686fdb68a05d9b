"""What a run shows while it trains."""

from __future__ import annotations

from transformers import ProgressCallback


class Progress(ProgressCallback):
    """The Trainer's progress bar, and one line a log instead of all numbers."""

    def __init__(self, names: list[str]):
        super().__init__()
        self.names = names

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print loss, and each class's Ω_MSR and LM loss."""
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        classes = [
            f"{name} Ω {logs[f'{name}/msr']:.2f}, {logs[f'{name}/lm_loss']:.3f} nats"
            for name in self.names
            if f"{name}/msr" in logs
        ]
        line = f"step {state.global_step}: loss {float(logs['loss']):.3f}; " + "; ".join(classes)
        if self.training_bar is None:
            print(line, flush=True)
        else:
            self.training_bar.write(line)
