"""Where the routes of one forward pass come from: one class for each source, all asked in the same way.

A decision is about *units*: the routed layers, or, to compare with, their KV heads. An engine makes one for each batch
of prompts, shows it the query states that it wants to read, asks it for each unit's routes, and finishes it.

Shape suffixes: B batch, S query length, H query heads, D head dim, U units.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from flux_attention.errors import UnsupportedModelError
from flux_attention.router import LayerRouter, Pooling, hard_route, soft_route
from flux_attention.routes import Unit, parse_routes, unit_name

REENTRANT = (
    "the gates carry no gradient: reentrant gradient checkpointing runs layers without one; enable it with "
    "gradient_checkpointing_kwargs={'use_reentrant': False}"
)


@dataclass(frozen=True)
class Decided:
    """
    What a finished decision came to, all on the CPU.

    Attributes
    ----------
    routes_BU : torch.Tensor
        bool, True = full attention.
    logits_BU2 : torch.Tensor or None
        float32, the routers' outputs for [SA, FA]; None where no router ran.
    gates_BU : torch.Tensor or None
        float32, straight-through decisions with gradients; in training only.
    """

    routes_BU: torch.Tensor
    logits_BU2: torch.Tensor | None = None
    gates_BU: torch.Tensor | None = None


class Decision(ABC):
    """Where the routes of one batch of prompts come from; ``units`` are what it is about."""

    units: tuple[Unit, ...]
    #: Whether ``observe`` is to be called with every unit's query states before its routes are asked for.
    reads_queries = False

    def observe(self, unit: Unit, query_BSHD: torch.Tensor) -> None:
        """Read a unit's query states before rotary embedding; called where ``reads_queries``."""
        raise RuntimeError(f"{type(self).__name__} reads no query states")

    @abstractmethod
    def routes(self, unit: Unit) -> list[bool]:
        """Return the sequences' routes in a unit, True = full attention."""

    def gate(self, unit: Unit) -> torch.Tensor | None:
        """Return float32 (B,), straight-through routes with gradients, in training; else None."""
        return None

    def logits(self, unit: Unit) -> torch.Tensor | None:
        """Return float32 (B, 2), the router's outputs for [SA, FA] behind a unit's routes; None where none ran."""
        return None

    @abstractmethod
    def finish(self) -> Decided | None:
        """Return all that was decided, once every unit took part; None if nothing was."""


class Forced(Decision):
    """
    Routes that are known beforehand, sequence by sequence.

    Parameters
    ----------
    units : tuple of Unit
    routes_BU : torch.Tensor
        bool, True = full attention.
    """

    def __init__(self, units: tuple[Unit, ...], routes_BU: torch.Tensor):
        self.units, self.routes_BU = units, routes_BU

    def routes(self, unit: Unit) -> list[bool]:
        """See ``Decision.routes``."""
        return self.routes_BU[:, self.units.index(unit)].tolist()

    def finish(self) -> Decided:
        """See ``Decision.finish``."""
        return Decided(self.routes_BU)


class Static(Forced):
    """
    One fixed set of full units for every sequence.

    Parameters
    ----------
    units : tuple of Unit
    full : sequence of Unit
        Those that attend fully.
    short : sequence of bool
        Of each sequence whether it runs full in all of them.
    """

    def __init__(self, units: tuple[Unit, ...], full: Sequence[Unit], short: Sequence[bool]):
        routes_BU = parse_routes(list(full), len(short), units)
        super().__init__(units, routes_BU | torch.tensor(short, device="cpu")[:, None])


class PooledQueries(Decision):
    """
    Decides nothing: runs everything full, and keeps what routers read of the query states.

    Parameters
    ----------
    units : tuple of Unit
    pooling : Pooling
        What they read of each sequence.

    Attributes
    ----------
    pooled : dict of Unit to torch.Tensor
        float32 (B, D), each unit's router's input.
    """

    reads_queries = True

    def __init__(self, units: tuple[Unit, ...], pooling: Pooling):
        self.units, self.pooling = units, pooling
        self.pooled: dict[Unit, torch.Tensor] = {}

    def observe(self, unit: Unit, query_BSHD: torch.Tensor) -> None:
        """See ``Decision.observe``."""
        with torch.autocast(query_BSHD.device.type, enabled=False):
            self.pooled[unit] = self.pooling(query_BSHD)

    def routes(self, unit: Unit) -> list[bool]:
        """See ``Decision.routes``."""
        return [True] * len(self.pooling.lengths)

    def finish(self) -> None:
        """See ``Decision.finish``."""


class RoutedBeforehand(Forced):
    """
    Hard, deterministic routes by trained routers, which have read the prompts' ends before.

    Parameters
    ----------
    units : tuple of Unit
    logits_BU2 : torch.Tensor
        float32 on the CPU, the routers' outputs for [SA, FA].
    short : sequence of bool
        Of each sequence whether it runs full, whatever the routers say.

    Raises
    ------
    ValueError
        If the routers' outputs are not finite.
    """

    def __init__(self, units: tuple[Unit, ...], logits_BU2: torch.Tensor, short: Sequence[bool]):
        for place, unit in enumerate(units):
            check_finite(logits_BU2[:, place], unit)
        self.logits_BU2 = logits_BU2
        super().__init__(units, hard_route(logits_BU2) | torch.tensor(short, device="cpu")[:, None])

    def logits(self, unit: Unit) -> torch.Tensor:
        """See ``Decision.logits``."""
        return self.logits_BU2[:, self.units.index(unit)]

    def finish(self) -> Decided:
        """See ``Decision.finish``."""
        return Decided(self.routes_BU, self.logits_BU2)


class SoftBeforehand(Forced):
    """
    Straight-through Gumbel-Softmax decisions by routers that have read the prompts' ends before: for training.

    Parameters
    ----------
    units : tuple of Unit
    logits_BU2 : torch.Tensor
        float32, the routers' outputs, with gradients.
    temperature, noise_BU2
        As in ``Soft``.
    """

    def __init__(
        self,
        units: tuple[Unit, ...],
        logits_BU2: torch.Tensor,
        temperature: float | torch.Tensor,
        noise_BU2: torch.Tensor | None = None,
    ):
        _check_noise(noise_BU2, tuple(logits_BU2.shape))
        self.logits_BU2 = logits_BU2.detach().cpu()
        self.gates_BU = soft_route(logits_BU2, temperature, noise_BU2)
        super().__init__(units, (self.gates_BU.detach() > 0.5).cpu())

    def gate(self, unit: Unit) -> torch.Tensor:
        """
        See ``Decision.gate``.

        Raises
        ------
        ValueError
            In a layer that runs without gradients though the gates have some.
        """
        if self.gates_BU.requires_grad and not torch.is_grad_enabled():
            raise ValueError(REENTRANT)
        return self.gates_BU[:, self.units.index(unit)]

    def finish(self) -> Decided:
        """See ``Decision.finish``."""
        return Decided(self.routes_BU, self.logits_BU2, self.gates_BU.cpu())


def budgets_of(budget: float | torch.Tensor | None, pooled_BD: torch.Tensor) -> torch.Tensor | None:
    """Return float32 (B,) on the pooled queries' device, of one budget for all sequences or one for each."""
    if isinstance(budget, float | int):  # filled there: the host does not wait
        return torch.full(pooled_BD.shape[:1], float(budget), device=pooled_BD.device)
    return budget if budget is None else budget.to(pooled_BD.device)


def check_finite(logits_B2: torch.Tensor, unit: Unit) -> None:
    """
    Refuse what a router makes of NaN.

    Raises
    ------
    ValueError
        With the sequences, and where it may come from.
    """
    if not math.isfinite(logits_B2.sum().item()):
        bad = [row for row, values in enumerate(logits_B2) if not values.isfinite().all()]
        raise ValueError(
            f"the router of layer {unit_name(unit)} read NaN or infinite query states in sequences {bad} of the "
            "batch; the model's hidden states have overflowed (fp16?), its weights are damaged, or the routers are"
        )


def _check_noise(noise: torch.Tensor | None, expected: tuple[int, ...]) -> None:
    if noise is not None and noise.shape != expected:
        raise ValueError(f"the noise has shape {tuple(noise.shape)}, expected {expected}: sequences, routed layers, 2")


class _LogitsCopy:
    """
    A router's logits on their way to the host.

    How a row is computed depends on its route, so the host must read it: the one synchronisation of a layer's prefill.
    It does so when attention is reached; by then the device has projections and rotary embedding to work on.
    """

    def __init__(self, logits_B2: torch.Tensor):
        self.event = None
        if logits_B2.is_cuda:
            self.values = torch.empty(logits_B2.shape, dtype=logits_B2.dtype, pin_memory=True)
            self.values.copy_(logits_B2, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(logits_B2.device))
        else:
            self.values = logits_B2.cpu()

    def read(self, unit: Unit) -> torch.Tensor:
        """Return float32 (B, 2) on the CPU."""
        if self.event is not None:
            self.event.synchronize()
        check_finite(self.values, unit)
        return self.values


class _ByRouters(Decision):
    """What decisions by routers share: each unit's router reads the pooled query states, in float32."""

    reads_queries = True

    def __init__(
        self,
        units: tuple[Unit, ...],
        routers: Mapping[Unit, LayerRouter],
        pooling: Pooling,
        budget: float | torch.Tensor | None = None,
    ):
        self.units, self.routers, self.pooling, self.budget = units, routers, pooling, budget
        self.finished = False
        self._logits: dict[Unit, torch.Tensor] = {}
        self._routes: dict[Unit, list[bool]] = {}

    def _read(self, unit: Unit, query_BSHD: torch.Tensor) -> torch.Tensor:
        router, device = self.routers[unit], query_BSHD.device
        if next(router.parameters()).device != device:
            router.to(device)
        with torch.autocast(device.type, enabled=False):
            pooled_BD = self.pooling(query_BSHD)
            return router(pooled_BD, budgets_of(self.budget, pooled_BD))

    def logits(self, unit: Unit) -> torch.Tensor:
        """See ``Decision.logits``."""
        return self._logits[unit]

    def _all_logits(self) -> torch.Tensor:
        logits = [self._logits[unit] for unit in self.units]
        return torch.stack([each.to(logits[0].device) for each in logits], dim=1).cpu()


class Routed(_ByRouters):
    """
    Hard, deterministic routes by trained routers, which read the prompt while it is computed.

    Parameters
    ----------
    units : tuple of Unit
    routers : mapping of Unit to LayerRouter
    pooling : Pooling
        What they read of each prompt.
    short : sequence of bool
        Of each sequence whether it runs full, whatever the routers say.
    budget : float or torch.Tensor, optional
        The Ω_MSR that routers which take one are told; of all sequences, or float32 (B,).
    """

    def __init__(
        self,
        units: tuple[Unit, ...],
        routers: Mapping[Unit, LayerRouter],
        pooling: Pooling,
        short: Sequence[bool],
        budget: float | torch.Tensor | None = None,
    ):
        super().__init__(units, routers, pooling, budget)
        self.short = short
        self._copies: dict[Unit, _LogitsCopy] = {}

    def observe(self, unit: Unit, query_BSHD: torch.Tensor) -> None:
        """See ``Decision.observe``; layers that gradient checkpointing computes again are not read again."""
        if self.finished:
            return
        if unit in self._copies or unit in self._routes:
            raise UnsupportedModelError(f"layer {unit_name(unit)} computes its query twice, so it cannot be routed")
        with torch.no_grad():  # a hard route has no gradient, and checkpointing would count what its graph keeps
            self._copies[unit] = _LogitsCopy(self._read(unit, query_BSHD))

    def routes(self, unit: Unit) -> list[bool]:
        """See ``Decision.routes``; waits for the router if need be."""
        if unit not in self._routes:
            if unit not in self._copies:
                raise UnsupportedModelError(
                    f"layer {unit_name(unit)} did not show its query states to its router, as if its attention module "
                    "had been replaced; detach, and attach again"
                )
            self._logits[unit] = logits = self._copies.pop(unit).read(unit)
            routes = hard_route(logits).tolist()
            self._routes[unit] = [short or route for short, route in zip(self.short, routes, strict=True)]
        return self._routes[unit]

    def finish(self) -> Decided:
        """See ``Decision.finish``."""
        self.finished = True
        routes_BU = torch.tensor([self.routes(unit) for unit in self.units]).T
        return Decided(routes_BU, self._all_logits())


class Soft(_ByRouters):
    """
    Straight-through Gumbel-Softmax decisions, through which gradients flow to the routers: for training.

    Gradient checkpointing computes layers again after ``finish``, and then shows their query states once more.

    Parameters
    ----------
    units, routers, pooling, budget
        As in ``Routed``.
    temperature : float or torch.Tensor
        τ.
    noise_BU2 : torch.Tensor, optional
        float32, the Gumbel noise; drawn where it is not given.

    Raises
    ------
    ValueError
        For noise of another shape.
    """

    def __init__(
        self,
        units: tuple[Unit, ...],
        routers: Mapping[Unit, LayerRouter],
        pooling: Pooling,
        temperature: float | torch.Tensor,
        noise_BU2: torch.Tensor | None = None,
        budget: float | torch.Tensor | None = None,
    ):
        super().__init__(units, routers, pooling, budget)
        self.temperature, self.noise_BU2 = temperature, noise_BU2
        self._gates: dict[Unit, torch.Tensor] = {}
        _check_noise(noise_BU2, (len(pooling.lengths), len(units), 2))

    def observe(self, unit: Unit, query_BSHD: torch.Tensor) -> None:
        """See ``Decision.observe``."""
        if unit in self._gates and not self.finished:
            raise UnsupportedModelError(f"layer {unit_name(unit)} computes its query twice, so it cannot be routed")
        logits = self._read(unit, query_BSHD)
        noise = None if self.noise_BU2 is None else self.noise_BU2[:, self.units.index(unit)]
        gate = soft_route(logits, self.temperature, noise)
        self._logits[unit], self._gates[unit] = logits.detach(), gate

    def routes(self, unit: Unit) -> list[bool]:
        """See ``Decision.routes``; waits for the gates if need be."""
        if unit not in self._routes:
            self._routes[unit] = (self._gates[unit].detach() > 0.5).tolist()
        return self._routes[unit]

    def gate(self, unit: Unit) -> torch.Tensor:
        """See ``Decision.gate``; of a layer that is computed again, once."""
        # A kept gate would hold all that its router's input is made of.
        return self._gates.pop(unit) if self.finished else self._gates[unit]

    def finish(self) -> Decided:
        """
        See ``Decision.finish``.

        Raises
        ------
        ValueError
            If the gates carry no gradient though the routers are to be trained.
        """
        gates = [self._gates[unit] for unit in self.units]
        trained = any(parameter.requires_grad for unit in self.units for parameter in self.routers[unit].parameters())
        if trained and torch.is_grad_enabled() and not gates[0].requires_grad:
            raise ValueError(REENTRANT)
        self.finished = True
        gates_BU = torch.stack([gate.to(gates[0].device) for gate in gates], dim=1).cpu()
        self._routes = dict(zip(self.units, (gates_BU.detach() > 0.5).T.tolist(), strict=True))
        self._gates = {}  # whose graph holds the checkpoints, which hold the forward pass that asks this decision
        return Decided(gates_BU.detach() > 0.5, self._all_logits(), gates_BU)
