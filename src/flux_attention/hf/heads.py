"""Routing by KV head instead of by layer: what whole layers are compared with, in quality alone.

The predecessor method decides for each head. Here each KV head of a layer, with the query heads that share it, is
decided on by the layer's router from the head's own queries. The KV cache keeps every token of all heads, and there is
no kernel: heads of different lengths in one layer are what routing by layer avoids.

Shape suffixes: B batch, S query length, T key length, H query heads, K KV heads, D head dim, U units of one layer.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from flux_attention.hf.forward import ForwardPass


class HeadForwardPass(ForwardPass):
    """A forward pass in which a layer's KV heads take turns, each by its own route."""

    def _heads(self, layer: int) -> list[tuple[int, int]]:
        return [unit for unit in self.units if isinstance(unit, tuple) and unit[0] == layer]

    def _show(self, layer: int, query_BSHD: torch.Tensor) -> None:
        heads = self._heads(layer)
        for unit, query in zip(heads, query_BSHD.chunk(len(heads), dim=2), strict=True):
            self.decision.observe(unit, query)

    def _by_route(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        heads = self._heads(layer)
        states = (states.chunk(len(heads), dim=1) for states in (query, key, value))
        parts = zip(heads, *states, strict=True)
        return torch.cat([self._by_unit(unit, *part, scale) for unit, *part in parts], dim=1)

    def _through_cache(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        cached = self.layers[layer]
        if self.decision is not None:
            cached.route(list(zip(*(self.decision.routes(unit) for unit in self._heads(layer)), strict=True)))
        if self.is_prompt:
            output = self._by_route(layer, query, key, value, scale)
            cached.append(key, value, self.layout)
            return output
        cached.append(key, value, self.layout)
        return self._behind_prompt(layer, query, scale)

    def _behind_prompt(self, layer: int, query_BHSD: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend to what the layer's cache holds, the queries' own keys included, by masks."""
        cached, device = self.layers[layer], query_BHSD.device
        full_UB = torch.tensor(cached.routes, device=device).T
        length_B1, new_B1 = (torch.tensor(n, device=device)[:, None] for n in (cached.lengths, self.layout.lengths))
        place_BS = length_B1 - new_B1 + torch.arange(query_BHSD.shape[2], device=device)
        i_BS1 = place_BS.minimum(length_B1 - 1)[:, :, None]  # padding sees what the last token does: of nothing, NaN
        j_T = torch.arange(max(cached.lengths), device=device)
        causal_BST = j_T <= i_BS1
        near_BST = causal_BST & ((j_T < cached.sink) | (i_BS1 - j_T < cached.window))
        (key_BKTD,), (value_BKTD,) = cached.buffers[True].read(list(range(self.batch)), [slice(len(j_T))])
        states = (states.chunk(len(full_UB), dim=1) for states in (query_BHSD, key_BKTD, value_BKTD))
        outputs = []
        for full_B, query, key, value in zip(full_UB, *states, strict=True):
            mask = torch.where(full_B[:, None, None], causal_BST, near_BST)[:, None]
            key, value = (states.expand(-1, query.shape[1], -1, -1) for states in (key, value))
            outputs.append(scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale))
        return torch.cat(outputs, dim=1)
