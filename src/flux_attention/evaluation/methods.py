"""Names the ways of choosing full layers, which ``quality`` explains, and makes the checks that need no model."""

from __future__ import annotations

from collections.abc import Sequence

METHODS = ("dense", "sparse", "routed", "static", "best-static", "best-static-fewer", "random", "head", "head-static")
#: Those that try every set: 120 of three layers of 10, 94 million of nine of 36.
EXHAUSTIVE = ("best-static", "best-static-fewer")
DEFAULT_METHODS = tuple(method for method in METHODS if method not in EXHAUSTIVE)


def check_adapters(adapters: Sequence[str]) -> None:
    """
    Refuse an evaluation of no adapter.

    Raises
    ------
    ValueError
        With what it is needed for.
    """
    if not adapters:
        raise ValueError("name at least one adapter: its pattern says what sparse attention is")


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
