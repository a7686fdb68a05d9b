"""Gives pages of sparse layers back: a KV cache group for each layer, and a coordinator that frees what lies between.

vLLM hands pages out by KV cache group, and all layers of a group share a block table. Routes differ by layer and by
request, so each layer becomes a group of its own; all groups draw from one pool. A sparse layer of a request then keeps
its sink, its window, and the pages that these begin and end in.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec

#: Requests whose routes tell how many pages the next one will need.
REMEMBERED = 64


@dataclass(frozen=True, kw_only=True)
class LayerSpec(FullAttentionSpec):
    """
    Describes the KV cache of one layer, which shares no block table with others.

    Attributes
    ----------
    layer : int
        The model's index of the layer.
    """

    layer: int

    @classmethod
    def of(cls, spec: FullAttentionSpec, layer: int) -> LayerSpec:
        """Describe the cache that ``spec`` describes as that of one layer."""
        return cls(**{field.name: getattr(spec, field.name) for field in fields(spec)}, layer=layer)

    @classmethod
    def merge(cls, specs: list[LayerSpec]) -> LayerSpec:
        """Return what all of ``specs`` say; vLLM takes an AssertionError for a no."""
        assert all(spec == specs[0] for spec in specs), "layers that are routed share no block table"
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        """Whether all of these layers may share a block table."""
        return all(spec == self for spec in kv_cache_specs.values())


def pages_kept(tokens: int, page: int, sink: int, window: int) -> int:
    """Count the pages that a sparse layer holds of a request of ``tokens`` tokens, before the next one comes."""
    first, last = gap(tokens, page, sink, window)
    return -(-tokens // page) - max(0, last - first)


def gap(tokens: int, page: int, sink: int, window: int) -> tuple[int, int]:
    """
    Find the pages that no token behind the first ``tokens`` sees in a sparse layer.

    Returns
    -------
    first, last : int
        From ``first`` on, and before ``last``. A request's first page always stays: routes are kept by it.
    """
    return max(1, -(-sink // page)), max(0, tokens - window + 1) // page


def pages_needed(tokens: int, page: int, sink: int, window: int, full: float, sparse: float) -> int:
    """Count the pages of a request with so many full and so many sparse layers, rounded up."""
    return math.ceil(full * -(-tokens // page) + sparse * pages_kept(tokens, page, sink, window))


class PageCoordinator:
    """
    Stands before a coordinator of vLLM's, one for which each layer is a group.

    It frees the pages that sparse layers see no more, and asks the groups only when a request enters a new page: all of
    them are asked at every step otherwise, for every request.

    Parameters
    ----------
    own : KVCacheCoordinator
        vLLM's.
    layers : sequence of int
        The routed layers.
    sink, window : int
        Tokens.
    routes : mapping of str to list of bool
        Of each request that is known whether each routed layer is full; others may be added at any time.
    in_flight : int
        Tokens of a request that may be computed while none of its pages are given back.
    expected : float, optional
        Full layers that a request has whose routes are not known yet; default: as those before it, all at first.
    """

    def __init__(
        self,
        own: Any,
        layers: Sequence[int],
        sink: int,
        window: int,
        routes: Mapping[str, list[bool]],
        in_flight: int,
        expected: float | None = None,
    ):
        self.own, self.routes, self.sink, self.window, self.in_flight = own, routes, sink, window, in_flight
        specs = [group.kv_cache_spec for group in own.kv_cache_config.kv_cache_groups]
        where = {spec.layer: place for place, spec in enumerate(specs)}
        #: The managers of the routed layers, in their order: there are no others.
        self.managers = [own.single_type_managers[where[layer]] for layer in layers]
        self.page = self.managers[0].block_size
        self.expected, self.last = expected, deque(maxlen=REMEMBERED)
        #: Of each request its pages in each layer, freed ones included, and the end of what was freed.
        self.held: dict[str, int] = {}
        self.freed: dict[str, int] = {}
        self.nothing = tuple([] for _ in specs)
        #: Pages that were given back since they were taken from here, for a debugging server.
        self.returned: list[int] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def learn(self, routes: Mapping[str, list[bool]]) -> None:
        """Remember how many layers new requests run full."""
        self.last.extend(sum(layers) for layers in routes.values())

    def expected_full(self) -> float:
        """Return how many full layers a request will have whose routes are not known."""
        if self.expected is not None:
            return self.expected
        return sum(self.last) / len(self.last) if self.last else len(self.managers)

    def expected_pages(self, request_id: str, tokens: int) -> int:
        """Count the pages that a request takes at most until all of its ``tokens`` tokens are computed, rounded up."""
        routes = self.routes.get(request_id)
        full = self.expected_full() if routes is None else sum(routes)
        sparse, dense = len(self.managers) - full, len(self.managers) * -(-tokens // self.page)
        passing = sparse * -(-min(tokens, self.in_flight) // self.page)
        return min(dense, pages_needed(tokens, self.page, self.sink, self.window, full, sparse) + math.ceil(passing))

    # What vLLM calls at every step.

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, apply_admission_cap: bool = False, **kwargs: Any
    ) -> int:
        """Count the pages that a request still needs; where all of it has to fit, as it will be routed."""
        wanted, held = -(-num_tokens // self.page), self.held.get(request_id, 0)
        if wanted <= held:
            return 0
        if apply_admission_cap:
            return max(0, self.expected_pages(request_id, num_tokens) - self._in_use(request_id, held))
        return (wanted - held) * len(self.nothing)

    def _in_use(self, request_id: str, held: int) -> int:
        routes, end = self.routes.get(request_id), self.freed.get(request_id, 0)
        first, _ = gap(0, self.page, self.sink, self.window)
        returned = 0 if routes is None else (len(routes) - sum(routes)) * max(0, end - first)
        return held * len(self.nothing) - returned

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> tuple[list, ...]:
        """Take the pages that a request needs for so many tokens in all."""
        wanted = -(-num_tokens // self.page)
        if wanted <= self.held.get(request_id, 0):
            return self.nothing
        self.held[request_id] = wanted
        return self.own.allocate_new_blocks(request_id, num_tokens, *args, **kwargs)

    def remove_skipped_blocks(self, request_id: str, computed: int, *args: Any, **kwargs: Any) -> None:
        """Give the pages back that a request's sparse layers see no more after ``computed`` tokens."""
        routes = self.routes.get(request_id)
        if routes is None:
            return
        first, last = gap(computed, self.page, self.sink, self.window)
        last = min(last, self.held.get(request_id, 0))
        if last <= max(first, self.freed.get(request_id, 0)):
            return
        self.freed[request_id] = last
        for manager, full in zip(self.managers, routes, strict=True):
            if not full:
                self._note(manager.req_to_blocks[request_id][first:last])
                manager._remove_blocks_in_range(request_id, first, last)

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing, without asking every manager: prefixes are not cached."""

    def free(self, request_id: str) -> None:
        """Give all of a request's pages back."""
        self._forget(request_id)
        self.own.free(request_id)

    def pop_blocks_for_free(self, request_id: str) -> list:
        """Let go of a request, whose pages vLLM gives back later."""
        self._forget(request_id)
        return self.own.pop_blocks_for_free(request_id)

    def take_returned(self) -> list[int]:
        """Return the pages that were given back since the last call."""
        found, self.returned = self.returned or [], []
        return found

    def _note(self, blocks: Sequence[Any]) -> None:
        if self.returned is not None:
            self.returned += [block.block_id for block in blocks if not block.is_null]

    def _forget(self, request_id: str) -> None:
        if self.returned is not None:
            for manager in self.own.single_type_managers:
                self._note(manager.req_to_blocks.get(request_id, ()))
        self.held.pop(request_id, None)
        self.freed.pop(request_id, None)
