"""Shows people what calibration measured: a section of the adapter's model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard

from flux_attention import adapters
from flux_attention.calibration.plot import by_class
from flux_attention.config import FluxConfig

INTRO = """

## What calibration measured

Held-out loss, in nats a token above that with all layers full, of the worst family of a class; and the share of
generated answers that were right. In full in [calibration.json](calibration.json).

![Calibration](calibration.svg)

| task class | layers sparse | full layers | loss, nats more | answers right |
| --- | --- | --- | --- | --- |
"""


def card(config: FluxConfig, rows: Sequence[Mapping[str, Any]], answered: Sequence[str]) -> ModelCard:
    """Make the adapter's model card with the rows of ``Calibrator.judge``."""
    made = adapters.card(config)
    made.text += INTRO
    for point in by_class(rows, answered):
        right = "" if point["accuracy"] is None else f"{point['accuracy']:.3f}"
        made.text += (
            f"| {point['task_class']} | {point['sparsity']:.3g} | {point['full']} | {point['rise']:.4f} | {right} |\n"
        )
    return made
