"""One forward call of a routed decoder: which tokens are real, which routes are decided, and attention by route.

Knows nothing of transformers: ``attach`` makes a ``Call`` for each forward and its hooks feed it.

Shape suffixes: B batch, S query length, T key length, H query heads, K KV heads, D head dim, R rows of one view.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from flux_attention import kernels
from flux_attention.cache import RoutedLayer, Tokens, View, prompt_views, take_rows
from flux_attention.patterns import Full, Streaming
from flux_attention.router import hard_route, pool_query, pooled_slots, soft_route
from flux_attention.routes import Routes, parse_routes

if TYPE_CHECKING:
    from flux_attention.attach import Routing


class UnsupportedModelError(ValueError):
    """A model or a call that routing cannot serve; the message says what was found and what is supported."""


#: The forward call that this thread is in: a ``Call``, or a ``generation.DecodeStep``.
current: ContextVar[Any] = ContextVar("flux_call", default=None)


class _Decision:
    """
    A router's logits on their way to the host.

    How a row is computed depends on its route, so the host must read it: the one synchronisation of a layer's prefill.
    It does so when attention is reached; by then the device has projections and rotary embedding to work on.
    """

    def __init__(self, layer: int, logits_B2: torch.Tensor):
        self.layer, self.event = layer, None
        if logits_B2.is_cuda:
            self.values = torch.empty(logits_B2.shape, dtype=logits_B2.dtype, pin_memory=True)
            self.values.copy_(logits_B2, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(logits_B2.device))
        else:
            self.values = logits_B2.cpu()

    def logits(self) -> torch.Tensor:
        """float32 (B, 2) on the CPU."""
        if self.event is not None:
            self.event.synchronize()
        if not math.isfinite(self.values.sum().item()):
            bad = [row for row, values in enumerate(self.values) if not values.isfinite().all()]
            raise ValueError(
                f"the router of layer {self.layer} read NaN or infinite query states in sequences {bad} of the batch; "
                "the model's hidden states have overflowed (fp16?), its weights are damaged, or the routers are"
            )
        return self.values


class Call:
    """
    One forward call of the decoder.

    Parameters
    ----------
    routing : Routing
        The attached routers.
    tokens : Tokens
        Which of the call's tokens are real.
    prompt_lengths : list of int
        Real tokens of each row that its router may read.
    layers : dict of int to RoutedLayer
        The routed layers of the KV cache; empty without a cache.
    """

    is_step = False  # unlike a ``generation.DecodeStep``

    def __init__(self, routing: Routing, tokens: Tokens, prompt_lengths: list[int], layers: dict[int, RoutedLayer]):
        self.routing, self.tokens, self.prompt_lengths, self.layers = routing, tokens, prompt_lengths, layers
        self.batch = len(tokens.lengths)
        first = self.layers.get(routing.layers[0])
        self.is_prompt = first is None or first.seen == 0
        self.decides = first is None or first.undecided
        self.past = [0] * self.batch if self.is_prompt else list(first.lengths)
        self.attended: set[int] = set()
        self.finished = False
        # What this call decides, by layer: routes, or soft gates in training.
        self.routes: dict[int, list[bool] | _Decision] = {}
        self.logits: dict[int, torch.Tensor] = {}
        self.gates: dict[int, torch.Tensor] = {}
        self.forced: torch.Tensor | None = None
        if self.decides:
            # Of each row, all that its routers' decision is about; and whether that is too short to be routed.
            self.contexts = [old + new for old, new in zip(self.past, prompt_lengths, strict=True)]
            self.short = [length < routing.min_tokens for length in self.contexts]
            if routing.forced is not None:
                self.forced = parse_routes(routing.forced, self.batch, routing.units)
            elif routing.temperature is None and all(self.short):
                self.forced = parse_routes("full", self.batch, routing.units)
        # Whether both branches run and the gates carry gradients; kept here as recomputation may come after the
        # `soft` block has ended.
        self.temperature = routing.temperature if self.decides and self.forced is None else None
        self.noise = routing.noise
        if self.soft and self.noise is not None and self.noise.shape != (self.batch, len(routing.units), 2):
            raise ValueError(
                f"the noise has shape {tuple(self.noise.shape)}, expected {(self.batch, len(routing.units), 2)}: "
                "sequences, routed layers, 2"
            )
        if self.decides and not self.is_prompt and min(tokens.lengths) == 0:
            raise ValueError("cannot re-route: a sequence of the batch has no new token to read")
        self._pooled: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def soft(self) -> bool:
        """Whether both branches run and the gates carry gradients."""
        return self.temperature is not None

    def decide(self, layer: int, query_BSHD: torch.Tensor) -> None:
        """Decide one layer's routes from its query states."""
        if self.forced is not None:
            self._set(layer, self.forced[:, self.routing.units.index(layer)].tolist())
            return
        if layer in self.routes and not self.finished:
            raise UnsupportedModelError(f"layer {layer} computes its query twice in a call, so it cannot be routed")
        router = self.routing.router(layer)
        device = query_BSHD.device
        if next(router.parameters()).device != device:
            router.to(device)
        columns, weights = self._pooled_columns(device)
        with torch.autocast(device.type, enabled=False):  # routers decide in float32
            logits = router(pool_query(query_BSHD, columns, weights))
        if self.soft:
            self.logits[layer] = logits.detach()
            noise = None if self.noise is None else self.noise[:, self.routing.units.index(layer)]
            self.gates[layer] = soft_route(logits, self.temperature, noise)
            self.routes[layer] = (self.gates[layer].detach() > 0.5).tolist()
            return
        self._set(layer, _Decision(layer, logits.detach()))

    def _set(self, layer: int, routes: list[bool] | _Decision) -> None:
        self.routes[layer] = routes
        if layer in self.layers:
            self.layers[layer].decide(partial(self.routes_of, layer))

    def routes_of(self, layer: int) -> list[bool]:
        """The rows' routes in one layer; waits for the router if need be."""
        decision = self.routes[layer]
        if isinstance(decision, _Decision):
            self.logits[layer] = decision.logits()
            routes = hard_route(self.logits[layer]).tolist()
            self.routes[layer] = [short or route for short, route in zip(self.short, routes, strict=True)]
        return self.routes[layer]

    def _pooled_columns(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._pooled:
            slots, weights = pooled_slots(torch.tensor(self.prompt_lengths), self.routing.config.pool_size)
            if self.tokens.starts is not None:
                slots = slots + torch.tensor(self.tokens.starts)[:, None]
            elif self.tokens.columns_BS is not None:
                slots = self.tokens.columns_BS.cpu().gather(1, slots)
            self._pooled[device] = slots.to(device), weights.to(device)
        return self._pooled[device]

    def finish(self) -> None:
        """Check that every layer took part, and publish what was decided."""
        self.finished = True
        routing = self.routing
        missing = sorted(set(routing.units) - self.attended)
        if missing:
            raise UnsupportedModelError(
                f"layers {missing} did not call the registered attention function, so this model (or this way of "
                "calling it, such as early exit) cannot be routed; call detach() to use it as it was"
            )
        if not self.decides:
            return
        if self.soft:
            trained = any(parameter.requires_grad for parameter in routing.routers.parameters())
            if trained and torch.is_grad_enabled() and not self.gates[routing.units[0]].requires_grad:
                raise ValueError(
                    "the gates carry no gradient: reentrant gradient checkpointing runs layers without one; enable it "
                    "with gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            routing.gates = torch.stack([self.gates[unit].cpu() for unit in routing.units], dim=1)
            decided = routing.gates.detach() > 0.5
            self.gates = {}  # whose graph holds the checkpoints, which hold this call
        else:
            decided = torch.tensor([self.routes_of(unit) for unit in routing.units]).T
        logits = None
        if self.forced is None:
            logits = torch.stack([self.logits[unit].cpu() for unit in routing.units], dim=1)
        routing.routes = Routes(decided, logits, routing.units, tuple(self.contexts), routing.pattern)

    # Attention of one layer.

    def attend(self, layer: int, query_BHSD, key_BKSD, value_BKSD, scale: float) -> torch.Tensor:
        """Attention output (B, S, H, D) of one layer, each row by its own route."""
        if layer in self.attended and not self.finished:
            raise UnsupportedModelError(f"layer {layer} calls attention twice in a call, so it cannot be routed")
        self.attended.add(layer)
        if value_BKSD.shape[-1] != query_BHSD.shape[-1]:
            raise UnsupportedModelError(
                f"values have {value_BKSD.shape[-1]} dimensions a head, queries {query_BHSD.shape[-1]}; routed layers "
                "need the same"
            )
        query = self.tokens.pack(query_BHSD)
        if layer in self.layers:
            cached = self.layers[layer]
            if cached.pending is not None:  # compiled layers leave the cache to us
                cached.update(key_BKSD, value_BKSD)
            output = self._by_view(cached.take_views(), query, scale)
            cached.store()
        else:
            key, value = self.tokens.pack(key_BKSD), self.tokens.pack(value_BKSD)
            output = self._by_route(self.routes_of(layer), query, key, value, scale)
            if self.soft:
                output = self._mixed(layer, output, query, key, value, scale)
        return self.tokens.unpack(output).transpose(1, 2).contiguous()

    def _by_route(self, routes: list[bool], query, key, value, scale: float) -> torch.Tensor:
        if self.tokens.starts is not None:
            return self._by_sequence(routes, query, key, value, scale)
        return self._by_view(prompt_views(routes, self.tokens, key, value), query, scale)

    def _by_view(self, views: list[View], query: torch.Tensor, scale: float) -> torch.Tensor:
        if len(views) == 1 and views[0].queries == query.shape[2] and len(views[0].rows) == self.batch:
            return self._one(views[0], query, scale)
        output = torch.zeros_like(query)
        for view in views:
            part = self._one(view, take_rows(query, view.rows)[:, :, : view.queries], scale)
            output[kernels.index_on(query.device, view.rows), :, : view.queries] = part
        return output

    def _by_sequence(self, routes: list[bool], query, key, value, scale: float) -> torch.Tensor:
        """Of sequences packed into one row, each alone; those of one route and length are computed together."""
        groups: dict[tuple[bool, int], list[int]] = {}
        for row, length in enumerate(self.tokens.lengths):
            groups.setdefault((routes[row], length), []).append(row)
        # By one split: the gradient of a slice would be as large as the whole pack, for each sequence.
        sequences = [states.split(self.tokens.lengths, dim=2) for states in (query, key, value)]
        outputs: list[torch.Tensor] = [query] * self.batch
        for (route, length), rows in groups.items():
            parts = [torch.cat([states[row] for row in rows]) for states in sequences]
            output = self._one(View(rows, route, length, *parts[1:], None), parts[0], scale)
            for row, part in zip(rows, output.split(1), strict=True):
                outputs[row] = part
        return torch.cat(outputs, dim=2)

    def _one(self, view: View, query_RHSD: torch.Tensor, scale: float) -> torch.Tensor:
        if view.is_decode:
            return kernels.decode(query_RHSD, view.key_RKTD, view.value_RKTD, view.lengths, scale)
        sparse = self.routing.pattern
        if not self.is_prompt:  # what sparse rows keep allows sink + window only
            sparse = Streaming(sparse.sink, sparse.window)
        pattern = Full() if view.route else sparse
        prompt_lengths = [self.prompt_lengths[row] for row in view.rows]
        return pattern.prefill(query_RHSD, view.key_RKTD, view.value_RKTD, scale, prompt_lengths)

    def _mixed(self, layer: int, chosen, query, key, value, scale: float) -> torch.Tensor:
        """
        O = z · FA + (1 − z) · SA, with the straight-through gate z of each sequence and ``chosen`` where z is one.

        As z is 0 or 1, the gradients of query, key and value flow through the chosen branch alone; the other one is
        needed for the gate's gradient, ⟨∂L/∂O, FA − SA⟩, and so forward only.
        """
        gate = self.gates[layer][:, None, None, None]
        if self.finished:  # computed again, by checkpointing: it would keep all that its router's input is made of
            del self.gates[layer]
        if self.tokens.starts is not None:  # (1, 1, S, 1): each token has its sequence's gate
            lengths = torch.tensor(self.tokens.lengths, device=gate.device)
            gate = gate.repeat_interleave(lengths, output_size=self.tokens.width).view(1, 1, -1, 1)
        gate = gate.to(query.dtype)  # behind the repetition: its backward is a sum over the tokens, in float32
        with torch.no_grad():
            other = self._by_route([not route for route in self.routes_of(layer)], query, key, value, scale)
            difference = torch.where(gate > 0.5, chosen - other, other - chosen)
        return chosen + (gate - gate.detach()) * difference
