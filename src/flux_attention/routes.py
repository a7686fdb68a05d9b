"""Routes that were decided for a batch: full attention (FA) or sparse attention (SA), per sequence and layer.

Shape suffixes: B batch, L routed layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.text import Text

from flux_attention.patterns import Full, Pattern

#: What is decided on: a routed layer's index in the model, or (layer, KV head).
Unit = int | tuple[int, int]


@dataclass(frozen=True)
class Routes:
    """
    The routes of one prefill.

    Attributes
    ----------
    routes_BL : torch.Tensor
        bool on the CPU, True = full attention.
    logits_BL2 : torch.Tensor or None
        float32 on the CPU, the routers' outputs for [SA, FA], also of prompts shorter than ``min_tokens``, which run
        full whatever they say; None where no router ran.
    layers : tuple of int
        The model's index of each routed layer; or (layer, KV head) where heads are routed.
    lengths : tuple of int
        Real (not padding) prompt tokens of each sequence.
    sparse, full : Pattern
        What the sparse layers computed, and the full ones.
    """

    routes_BL: torch.Tensor
    logits_BL2: torch.Tensor | None
    layers: tuple[Unit, ...]
    lengths: tuple[int, ...]
    sparse: Pattern
    full: Pattern

    @property
    def msr(self) -> list[float]:
        """Model sparsity ratio Ω_MSR of each sequence: the share of routed layers that are sparse."""
        return (~self.routes_BL).float().mean(1).tolist()

    @property
    def esr(self) -> list[float]:
        """Effective sparsity ratio Ω_ESR of each sequence: the share of causal query-key pairs not computed."""
        saved = []
        for length, ratio in zip(self.lengths, self.msr, strict=True):
            computed = ratio * self.sparse.pairs(length) + (1 - ratio) * self.full.pairs(length)
            saved.append(1 - computed / Full().pairs(length))
        return saved

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready entries, one a sequence, with the routes as a string of F and S in layer order."""
        return {
            "layers": list(self.layers),
            "sequences": [
                {
                    "tokens": length,
                    "routes": _strip(row),
                    "full_layers": [layer for layer, full in zip(self.layers, row.tolist(), strict=True) if full],
                    "msr": msr,
                    "esr": esr,
                    "logits": None if self.logits_BL2 is None else self.logits_BL2[index].tolist(),
                }
                for index, (length, row, msr, esr) in enumerate(
                    zip(self.lengths, self.routes_BL, self.msr, self.esr, strict=True)
                )
            ],
        }

    def __repr__(self) -> str:
        rows = ", ".join(f"{_strip(row)} Ω={msr:.2f}" for row, msr in zip(self.routes_BL, self.msr, strict=True))
        return f"Routes({rows})"

    def __rich__(self) -> Text:
        """Draw a strip of layers for each sequence: █ full attention, ░ sparse."""
        text = Text()
        for index, (row, msr, esr) in enumerate(zip(self.routes_BL, self.msr, self.esr, strict=True)):
            if index:
                text.append("\n")
            for full in row.tolist():
                text.append("█" if full else "░", style="bold red" if full else "cyan")
            text.append(f"  {int(row.sum())}/{len(row)} layers full  Ω_MSR {msr:.2f}  Ω_ESR {esr:.2f}")
        return text


def _strip(row_L: torch.Tensor) -> str:
    return "".join("F" if full else "S" for full in row_L.tolist())


def unit_name(unit: Unit) -> str:
    """Name what is decided on, for people: a layer ``3``, a KV head ``3.1``."""
    return str(unit) if isinstance(unit, int) else ".".join(map(str, unit))
