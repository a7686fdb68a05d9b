"""Names the ways of choosing full layers, which ``quality`` explains, and makes the checks that need no model."""

from __future__ import annotations

from collections.abc import Sequence

from flux_attention.config import FluxConfig

#: What each has full.
ABOUT = {
    "dense": "every layer",
    "sparse": "none",
    "routed": "what the layer routers decide",
    "static": "one set of layers for every input, chosen greedily by loss on calibration samples",
    "best-static": "the same, but of all sets the one that answers most of them: for models of few layers",
    "best-static-fewer": "the same, of one layer fewer",
    "random": "a random set for every input",
    "head": "what routers of granularity head decide, for each KV head",
    "head-static": "one set of KV heads for every input: those that such routers like best on calibration samples",
    "static-nll": "the first layers of a calibrated adapter's ranking, at each budget",
    "routed-ends": "what the layer routers decide by the prompt's two ends alone",
    "forced": "the layers that --force names",
}
METHODS = tuple(ABOUT)
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


def routed_method(config: FluxConfig) -> str | None:
    """Name the method of what decides in an adapter: None where nothing does, as its full layers are fixed."""
    if config.ranking is not None:
        return None
    return "head" if config.granularity == "head" else {"prefill": "routed", "ends": "routed-ends"}[config.decide]


def count_kinds(
    methods: Sequence[str], configs: Sequence[FluxConfig], budgets: Sequence[float] | None, force: Sequence[str]
) -> int:
    """Count the ways of choosing full layers that an evaluation measures; the parameters are those of ``missing``."""
    asked, deciding = set(methods), list(map(routed_method, configs))
    count = len(asked & {"dense", "sparse"}) + len(force) * ("forced" in asked)
    for method in deciding:
        if method is None:
            count += len(budgets or [None]) * ("static-nll" in asked)
            continue
        followers = asked & set(("head-static",) if method == "head" else SIZED)
        count += len(followers) + bool(followers or method in asked)
        count += method == "routed" and "routed-ends" in asked
    if not any(deciding):
        count += len(budgets or []) * len(asked & set(SIZED))
    return count


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
