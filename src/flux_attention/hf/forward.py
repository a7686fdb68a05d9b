"""The forward pass of a routed decoder: asks its decision for each layer's routes, groups rows, attends, stores.

Shape suffixes: B batch, S query length, T key length, H query heads, K KV heads, D head dim, R rows of one group.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from flux_attention import kernels
from flux_attention.decision import Decision, Unit
from flux_attention.errors import UnsupportedModelError
from flux_attention.hf.cache.buffers import take_rows
from flux_attention.hf.cache.groups import AttentionGroup, prompt_groups
from flux_attention.hf.inputs import Inputs
from flux_attention.hf.packed import PackedAttention
from flux_attention.hf.support import QueryShape
from flux_attention.patterns import Pattern
from flux_attention.routes import Routes, layer_of


@dataclass(frozen=True)
class Finished:
    """What a forward pass that decided came to: ``routes``, and in training ``gates_BU`` with gradients."""

    routes: Routes
    gates_BU: torch.Tensor | None


class _RefuseGradients(torch.autograd.Function):
    """Passes attention over cached keys on, and refuses gradients: what is cached has none."""

    @staticmethod
    def forward(ctx, output):
        return output.view_as(output)

    @staticmethod
    def backward(ctx, *gradients):
        raise UnsupportedModelError(
            "gradients do not flow through a routed KV cache: call the model on the whole sequence with use_cache=False"
        )


class ForwardPass:
    """
    One forward call of the decoder (a ``ForwardContext``).

    Parameters
    ----------
    inputs : Inputs
        Tokens and cache.
    decision : Decision or None
        Where routes come from; None if the cache has them.
    units : tuple of Unit
        What is routed.
    shapes : dict of int to QueryShape
        Each routed layer's.
    sparse, full : Pattern
        What sparse and full layers compute.
    """

    is_step = False

    def __init__(
        self,
        inputs: Inputs,
        decision: Decision | None,
        units: tuple[Unit, ...],
        shapes: dict[int, QueryShape],
        sparse: Pattern,
        full: Pattern,
    ):
        self.layout, self.prompt_lengths, self.layers = inputs.layout, inputs.prompt_lengths, inputs.layers
        self.batch, self.is_prompt, self.contexts = len(inputs.layout.lengths), inputs.is_prompt, inputs.contexts
        self.decision, self.units, self.shapes, self.sparse, self.full = decision, units, shapes, sparse, full
        self.reads_queries = decision is not None and decision.reads_queries
        self.routed: Collection[int] = shapes.keys()
        self.is_packed = inputs.layout.starts is not None
        lengths = inputs.layout.lengths
        # A single sequence goes the way of a batch of one.
        is_pack = self.is_packed and len(lengths) > 1
        self.packed = PackedAttention(lengths, inputs.prompt_lengths, sparse, full) if is_pack else None
        self.attended: set[int] = set()
        self.finished = False

    def observe(self, layer: int, output: torch.Tensor, source: torch.Tensor) -> None:
        """See ``ForwardContext.observe``."""
        self._show(layer, self.shapes[layer].states(output, self.layout.width, source))

    def _show(self, layer: int, query_BSHD: torch.Tensor) -> None:
        self.decision.observe(layer, query_BSHD)

    def finish(self) -> Finished | None:
        """
        See ``ForwardContext.finish``.

        Raises
        ------
        UnsupportedModelError
            If a layer did not take part.
        """
        self.finished = True
        missing = sorted(set(self.routed) - self.attended)
        if missing:
            raise UnsupportedModelError(
                f"layers {missing} did not call the registered attention function, so this model (or this way of "
                "calling it, such as early exit) cannot be routed; call detach() to use it as it was"
            )
        if self.decision is None:
            return None
        decided = self.decision.finish()
        if decided is None:
            return None
        lengths = tuple(self.contexts)
        routes = Routes(decided.routes_BU, decided.logits_BU2, self.units, lengths, self.sparse, self.full)
        return Finished(routes, decided.gates_BU)

    def attend(self, layer: int, query_BHSD, key_BKSD, value_BKSD, scale: float) -> torch.Tensor:
        """See ``ForwardContext.attend``."""
        if layer in self.attended and not self.finished:
            raise UnsupportedModelError(f"layer {layer} calls attention twice in a call, so it cannot be routed")
        self.attended.add(layer)
        if value_BKSD.shape[-1] != query_BHSD.shape[-1]:
            raise UnsupportedModelError(
                f"values have {value_BKSD.shape[-1]} dimensions a head, queries {query_BHSD.shape[-1]}; routed layers "
                "need the same"
            )
        states = tuple(self.layout.left_align(states) for states in (query_BHSD, key_BKSD, value_BKSD))
        if layer in self.layers:
            output = self._through_cache(layer, *states, scale)
            if output.requires_grad and not self.is_prompt:
                output = _RefuseGradients.apply(output)
        else:
            output = self._by_route(layer, *states, scale)
        return self.layout.restore(output).transpose(1, 2).contiguous()

    def _through_cache(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        cached = self.layers[layer]
        if self.decision is not None:
            cached.route(self.decision.routes(layer))
        if self.layout.width == 1 and self.layout.is_uniform and not self.is_prompt:
            # A single token takes the place that leaves the window: stored first, all is read without a copy.
            cached.append(key, value, self.layout)
            return self._by_group(layer, cached.decode_groups(), query, scale)
        if self.is_prompt:
            groups = prompt_groups(cached.routes, self.layout, key, value)
        else:
            groups = cached.continuation_groups(key, value, self.layout.lengths)
        output = self._by_group(layer, groups, query, scale)
        cached.append(key, value, self.layout)  # behind attention, which the device waits for
        return output

    def _by_route(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """Attend without a cache."""
        return self._by_unit(layer, query, key, value, scale)

    def _by_unit(self, unit: Unit, query, key, value, scale: float) -> torch.Tensor:
        """Compute the branch of each sequence's route in a unit, in training mixed with the other one."""
        gate_B = self.decision.gate(unit)
        gate_B = None if gate_B is None else gate_B.to(query.device)
        if self.packed is None:
            routes, layer = self.decision.routes(unit), layer_of(unit)

            def branch(chosen: bool) -> torch.Tensor:
                rows = [route == chosen for route in routes]
                return self._by_group(layer, prompt_groups(rows, self.layout, key, value), query, scale)
        else:
            # Of gates the host need not know what they are.
            routes = kernels.index_on(query.device, self.decision.routes(unit)) if gate_B is None else gate_B.detach()
            full_B = routes > 0.5

            def branch(chosen: bool) -> torch.Tensor:
                return self.packed(full_B if chosen else ~full_B, query, key, value, scale)

        output = branch(True)
        return output if gate_B is None else self._mixed(gate_B, output, lambda: branch(False), query.dtype)

    def _by_group(self, layer: int, groups: list[AttentionGroup], query: torch.Tensor, scale: float) -> torch.Tensor:
        if len(groups) == 1 and groups[0].queries == query.shape[2] and len(groups[0].rows) == self.batch:
            return self._one(layer, groups[0], query, scale)
        output = None
        for group in groups:
            part = self._one(layer, group, take_rows(query, group.rows)[:, :, : group.queries], scale)
            if output is None:  # of the dtype that attention gives, which autocast may have chosen
                output = torch.zeros(query.shape, dtype=part.dtype, device=query.device)
            output[kernels.index_on(query.device, group.rows), :, : group.queries] = part
        return torch.zeros_like(query) if output is None else output

    def _one(self, layer: int, group: AttentionGroup, query_RHSD: torch.Tensor, scale: float) -> torch.Tensor:
        if group.is_decode:
            return kernels.decode(query_RHSD, group.key_RKTD, group.value_RKTD, group.lengths, scale)
        pattern = (self.full if group.route else self.sparse).of_layer(layer)
        if not self.is_prompt:
            pattern = pattern.later
        prompt_lengths = [self.prompt_lengths[row] for row in group.rows]
        return pattern.prefill(query_RHSD, group.key_RKTD, group.value_RKTD, scale, prompt_lengths)

    def _mixed(
        self, gate_B: torch.Tensor, chosen: torch.Tensor, compute_other: Callable[[], torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        """
        Compute O = z · FA + (1 − z) · SA, with the gate z of each sequence and ``chosen`` where its route is.

        As z is 0 or 1, the gradients of query, key and value flow through the chosen branch alone; the other one is
        needed for the gate's gradient, ⟨∂L/∂O, FA − SA⟩, and so forward only.
        """
        gate = gate_B[:, None, None, None]
        if self.layout.starts is not None:  # (1, 1, S, 1): each token has its sequence's gate
            lengths = kernels.index_on(gate.device, self.layout.lengths)
            gate = gate.repeat_interleave(lengths, output_size=self.layout.width).view(1, 1, -1, 1)
        gate = gate.to(dtype)  # behind the repetition: its backward is a sum over the tokens, in float32
        with torch.no_grad():
            other = compute_other()
            difference = torch.where(gate > 0.5, chosen - other, other - chosen)
        return chosen + (gate - gate.detach()) * difference
