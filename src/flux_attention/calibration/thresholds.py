"""Thresholds of block-sparse full layers: which are tried, what share of the blocks they select, what they lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from flux_attention.config import FluxConfig
from flux_attention.patterns import BlockSparse, full_pattern

#: Thresholds that are judged, those that select fewer blocks first.
TRIED = {"maximum": (0.2, 0.1, 0.05, 0.03, 0.02, 0.01), "mass": (0.8, 0.9, 0.95, 0.98, 0.99)}


def unset_threshold(config: FluxConfig) -> BlockSparse | None:
    """Return the full layers' pattern if it is block-sparse and no threshold is given: then one is to be chosen."""
    pattern = full_pattern(config)
    return pattern if isinstance(pattern, BlockSparse) and config.full.get("threshold") is None else None


@dataclass(frozen=True)
class Watched(BlockSparse):
    """Is ``BlockSparse``, and notes what share of the blocks each call selects."""

    densities: list[float] = field(default_factory=list)

    def attend(self, query_BHSD, key_BKTD, value_BKTD, scale):
        """See ``BlockSparse.attend``."""
        self.densities.append(self.density(query_BHSD, key_BKTD, scale))
        return super().attend(query_BHSD, key_BKTD, value_BKTD, scale)


def by_threshold(
    rows: Sequence[Mapping[str, Any]], dense: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, float | None]]:
    """
    Sum rows of families up by threshold.

    Parameters
    ----------
    rows : sequence of dict
        As ``Calibrator.judge_thresholds`` gives them.
    dense : dict of str to dict
        Of the families that count, the row with all layers full and exact.

    Returns
    -------
    list of dict
        ``threshold``, mean ``density``, ``rise`` of the loss in nats a token above all layers full and exact, of the
        worst family, and mean ``accuracy``, None where nothing is asked; in the rows' order.
    """
    groups: dict[float, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["task"] in dense:
            groups.setdefault(row["threshold"], []).append(row)
    found = []
    for threshold, some in groups.items():
        right = [row["accuracy"] for row in some if row["accuracy"] is not None]
        found.append(
            {
                "threshold": threshold,
                "density": fmean(row["density"] for row in some),
                "rise": max(row["nats"] - dense[row["task"]]["nats"] for row in some),
                "accuracy": fmean(right) if right else None,
            }
        )
    return found
