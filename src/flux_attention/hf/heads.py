"""Routing by KV head instead of by layer: what whole layers are compared with, in quality alone.

The predecessor method decides for each head. Here each KV head of a layer, with the query heads that share it, is
decided on by the layer's router from the head's own queries. There is no KV cache for it and no kernel: heads of
different lengths in one layer are what routing by layer avoids.

Shape suffixes: B batch, S query length, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import torch

from flux_attention.hf.forward import ForwardPass


class HeadForwardPass(ForwardPass):
    """A forward pass in which a layer's KV heads take turns, each by its own route."""

    def _heads(self, layer: int) -> list[tuple[int, int]]:
        return [unit for unit in self.units if isinstance(unit, tuple) and unit[0] == layer]

    def _show(self, layer: int, query_BSHD: torch.Tensor) -> None:
        heads = self._heads(layer)
        for unit, query in zip(heads, query_BSHD.chunk(len(heads), dim=2), strict=True):
            self.decision.observe(unit, query)

    def attend(self, layer: int, query_BHSD, key_BKSD, value_BKSD, scale: float) -> torch.Tensor:
        """See ``ForwardContext.attend``."""
        heads = self._heads(layer)
        states = (states.chunk(len(heads), dim=1) for states in (query_BHSD, key_BKSD, value_BKSD))
        parts = zip(heads, *states, strict=True)
        return torch.cat([self._attend(unit, *part, scale) for unit, *part in parts], dim=2)
