"""Names the ways of choosing full layers, which ``quality`` explains, and makes the checks that need no model."""

from __future__ import annotations

from collections.abc import Sequence

from flux_attention.config import FluxConfig

METHODS = (
    *("dense", "sparse", "routed", "static", "best-static", "best-static-fewer", "random", "head", "head-static"),
    *("static-nll", "routed-ends", "forced"),
)
#: Those that try every set: 120 of three layers of 10, 94 million of nine of 36.
EXHAUSTIVE = ("best-static", "best-static-fewer")
DEFAULT_METHODS = tuple(method for method in METHODS if method not in (*EXHAUSTIVE, "routed-ends"))
#: Of questions in words: real models have too many layers to try all that are left, again and again.
NATURAL_METHODS = tuple(method for method in DEFAULT_METHODS if method != "static")
#: Those whose number of full layers is that of routers, or of a budget.
SIZED = ("static", *EXHAUSTIVE, "random")


def check_adapters(adapters: Sequence[str], config: FluxConfig | None = None) -> None:
    """
    Refuse an evaluation of no adapter and no pattern.

    Raises
    ------
    ValueError
        With what it is needed for.
    """
    if not adapters and config is None:
        raise ValueError("name at least one adapter, or a pattern: it says what sparse attention is")


def missing(
    method: str, configs: Sequence[FluxConfig], budgets: Sequence[float] | None = None, force: Sequence[str] = ()
) -> str | None:
    """
    Say what a method lacks to be measured here; None if nothing.

    Parameters
    ----------
    configs : sequence of FluxConfig
        The adapters'.
    budgets : sequence of float, optional
    force : sequence of str
        Routes to force.
    """
    routers = {config.granularity for config in configs if config.ranking is None}
    if method in ("routed", "routed-ends") and "layer" not in routers:
        return "an adapter with routers: name one by --routers"
    if method in ("head", "head-static") and "head" not in routers:
        return "an adapter with routers by head: name one by --routers"
    if method == "static-nll" and all(config.ranking is None for config in configs):
        return "an adapter with a ranking of layers: make one by flux-attention calibrate, name it by --routers"
    if method == "forced" and not force:
        return "routes to force: name them by --force"
    if method in SIZED and not routers and not budgets:
        return "a number of full layers: name an adapter with routers, whose number it is, or --budgets"
    return None


def check_methods(
    methods: Sequence[str], configs: Sequence[FluxConfig], budgets: Sequence[float] | None, force: Sequence[str]
) -> None:
    """
    Refuse methods that cannot be measured here, and budgets that none of them would use; see ``missing``.

    Raises
    ------
    ValueError
        With what is missing.
    """
    for method in methods:
        if lacks := missing(method, configs, budgets, force):
            raise ValueError(f"the method {method} needs {lacks}")
    ranked, routers = ([config for config in configs if (config.ranking is None) == without] for without in (0, 1))
    users = {*(("static-nll",) if ranked else ()), *(() if routers else SIZED)}
    if budgets and not users & set(methods):
        raise ValueError(
            "budgets are for adapters with a ranking of layers (static-nll), which flux-attention calibrate makes, and "
            f"where no adapter has routers for {', '.join(SIZED)}: leave --budgets out, or ask for one of these"
        )


def check_lengths(lengths: Sequence[int], positions: int | None) -> None:
    """
    Refuse samples that are longer than the model's positions.

    Raises
    ------
    ValueError
        With both numbers.
    """
    if positions and max(lengths) > positions:
        raise ValueError(
            f"samples of {max(lengths)} tokens do not fit into the model's {positions} positions: shorten them, or "
            "extend the positions by rope_parameters in its configuration"
        )
