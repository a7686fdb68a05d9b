"""Decisions can be watched layer by layer while a prompt is read, and single layers pinned, within a ``with`` block.

Shape suffixes: B batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch

from flux_attention.decision import Decided, Decision
from flux_attention.routes import Unit

#: Is told a unit, the sequences' routes in it (True = full attention), and the router's float32 (B, 2) for [SA, FA];
#: None where no router ran.
Tell = Callable[[Unit, list[bool], torch.Tensor | None], None]


@dataclass(frozen=True)
class Watch:
    """What a ``watching`` block asks for: whom to tell, and routes of single units whatever is decided."""

    tell: Tell
    pins: Mapping[Unit, bool] = field(default_factory=dict)


#: Of this thread or task, as ``Routing.force`` is; the last one counts.
_watches: ContextVar[tuple[Watch, ...]] = ContextVar("flux_watches", default=())


@contextlib.contextmanager
def watching(tell: Tell, pins: Mapping[Unit, bool] | None = None) -> Iterator[None]:
    """
    Watch what this thread's prefills decide within a ``with`` block, each layer when it is about to attend.

    Parameters
    ----------
    tell : callable
        Called with the unit, the sequences' routes and the router's logits, in the thread that computes. What it raises
        ends the forward call: the way to stop a long prompt between two layers.
    pins : mapping of Unit to bool, optional
        Units that run full (True) or sparse (False) whatever is decided. Unlike ``Routing.force`` it leaves the others
        to the routers, which read what the pinned layers make of the prompt; routers of pinned layers are read, too.

    The forward call raises ValueError for pins of units that are not routed.
    """
    watch = Watch(tell, dict(pins or {}))
    _watches.set((*_watches.get(), watch))
    try:
        yield
    finally:  # blocks of generators may end in another order than they began
        _watches.set(tuple(other for other in _watches.get() if other is not watch))


def watched(decision: Decision) -> Decision:
    """Return the decision as it is, or, within ``watching``, one that tells and pins."""
    watches = _watches.get()
    return _Watched(decision, watches[-1]) if watches else decision


class _Watched(Decision):
    """Passes a decision's routes on: tells of them, and puts pinned ones in their place."""

    def __init__(self, decision: Decision, watch: Watch):
        if unknown := [unit for unit in watch.pins if unit not in decision.units]:
            raise ValueError(f"cannot pin {unknown}, expected some of {list(decision.units)}")
        self.decision, self.watch = decision, watch
        self.units, self.reads_queries = decision.units, decision.reads_queries
        self._told: set[Unit] = set()

    def observe(self, unit: Unit, query_BSHD: torch.Tensor) -> None:
        """See ``Decision.observe``."""
        self.decision.observe(unit, query_BSHD)

    def routes(self, unit: Unit) -> list[bool]:
        """See ``Decision.routes``."""
        routes = self.decision.routes(unit)
        if unit in self.watch.pins:
            routes = [bool(self.watch.pins[unit])] * len(routes)
        if unit not in self._told:
            self._told.add(unit)
            self.watch.tell(unit, routes, self.decision.logits(unit))
        return routes

    def logits(self, unit: Unit) -> torch.Tensor | None:
        """See ``Decision.logits``."""
        return self.decision.logits(unit)

    def gate(self, unit: Unit) -> torch.Tensor | None:
        """See ``Decision.gate``."""
        return self.decision.gate(unit)

    def finish(self) -> Decided | None:
        """See ``Decision.finish``."""
        decided = self.decision.finish()
        if decided is None or not self.watch.pins:
            return decided
        routes_BU = decided.routes_BU.clone()
        for unit, is_full in self.watch.pins.items():
            routes_BU[:, self.units.index(unit)] = is_full
        return replace(decided, routes_BU=routes_BU)
