"""Routing by KV head instead of by layer: what whole layers are compared with, in quality alone.

The predecessor method decides for each head. Here each KV head of a layer, with the query heads that share it, is
decided on by the layer's router from the head's own queries. There is no KV cache for it and no kernel: heads of
different lengths in one layer are what routing by layer avoids.

Shape suffixes: B batch, S query length, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch

from flux_attention.attach import Routing
from flux_attention.call import Call, UnsupportedModelError
from flux_attention.router import LayerRouter


class HeadCall(Call):
    """One forward call in which a layer's KV heads take turns, each by its own route."""

    def decide(self, layer: int, query_BSHD: torch.Tensor) -> None:
        """Decide on every KV head of one layer."""
        for unit, query in zip(self._units(layer), query_BSHD.chunk(self._heads, dim=2), strict=True):
            super().decide(unit, query)

    def attend(self, layer: int, query_BHSD, key_BKSD, value_BKSD, scale: float) -> torch.Tensor:
        """Attention output (B, S, H, D) of one layer."""
        states = (states.chunk(self._heads, dim=1) for states in (query_BHSD, key_BKSD, value_BKSD))
        parts = zip(self._units(layer), *states, strict=True)
        return torch.cat([super(HeadCall, self).attend(unit, *part, scale) for unit, *part in parts], dim=2)

    @property
    def _heads(self) -> int:
        return self.routing.config.base_model.num_kv_heads

    def _units(self, layer: int) -> list[tuple[int, int]]:
        return [(layer, head) for head in range(self._heads)]


class HeadRouting(Routing):
    """
    Routers that decide on KV heads; made by ``attach`` for a configuration whose granularity is ``head``.

    ``routes`` and ``gates`` have a column for each KV head of each routed layer; Ω_MSR is the share of sparse heads.
    For scoring and training: forward calls keep no KV cache, so ``generate`` is refused.
    """

    call_type = HeadCall

    @property
    def units(self) -> tuple[tuple[int, int], ...]:
        """The KV heads that are decided on: (layer, head)."""
        return tuple((layer, head) for layer in self.layers for head in range(self.config.base_model.num_kv_heads))

    def router(self, unit: tuple[int, int]) -> LayerRouter:
        """The router of the head's layer."""
        return self.routers[str(unit[0])]

    def _begin(self, kwargs: dict[str, Any]) -> Call:
        if kwargs.get("past_key_values") is not None:
            raise UnsupportedModelError(
                "routers of granularity 'head' are for comparison: they score and train without a KV cache, and cannot "
                "generate; attach routers of granularity 'layer'"
            )
        kwargs["use_cache"] = False
        return super()._begin(kwargs)
