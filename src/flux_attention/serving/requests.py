"""What a single request may wish of its routes, by ``vllm_xargs`` over HTTP or ``SamplingParams.extra_args``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flux_attention.config import FluxConfig
from flux_attention.errors import ServingError
from flux_attention.routes import RouteSpec, parse_routes, read_spec

#: The arguments that a request may bring.
ROUTES, BUDGET = "flux_routes", "flux_budget"


@dataclass(frozen=True)
class Wish:
    """
    What a request asks for.

    Attributes
    ----------
    routes : str, float, sequence of int, or None
        Forced routes, as ``Routing.force`` takes them.
    budget : float or None
        Share of sparse layers, for adapters that take one: the request's, else the server's.
    """

    routes: RouteSpec | None
    budget: float | None

    @classmethod
    def of(cls, params: Any, config: FluxConfig, layers: Sequence[int]) -> Wish:
        """
        Read a request's sampling parameters.

        Raises
        ------
        ServingError
            For wishes that mean nothing, or that this adapter cannot fulfil.
        """
        given = getattr(params, "extra_args", None) or {}
        if unknown := sorted(key for key in given if key.startswith("flux_") and key not in (ROUTES, BUDGET)):
            raise ServingError(f"unknown arguments {unknown}, expected {ROUTES} or {BUDGET}")
        routes, budget = given.get(ROUTES), given.get(BUDGET)
        if routes is not None and budget is not None:
            raise ServingError(f"{ROUTES} and {BUDGET} are both there: forced routes leave nothing to a budget")
        return cls(_routes(routes, layers), _budget(budget, config))


def _routes(given: Any, layers: Sequence[int]) -> RouteSpec | None:
    if given is None:
        return None
    try:
        spec = read_spec(given) if isinstance(given, str) else given
        if isinstance(spec, bool) or not isinstance(spec, str | float | int | list):
            raise ValueError("expected full, sparse, a ratio such as 0.75, or a list of layers")
        if isinstance(spec, int):  # JSON has no 1.0
            spec = float(spec)
        parse_routes(spec, 1, layers)
    except (ValueError, TypeError) as error:
        raise ServingError(f"{ROUTES} is {given!r}: {error}") from None
    return spec


def _budget(given: Any, config: FluxConfig) -> float | None:
    if given is None:
        return config.budget
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 1:
        raise ServingError(f"{BUDGET} is {given!r}, expected a number between 0 and 1, the share of sparse layers")
    if config.budget is None:
        raise ServingError(
            f"{BUDGET} is {given!r}, but the server's routers take no budget and decide themselves; leave it out, or "
            f"force routes by {ROUTES}"
        )
    return float(given)
