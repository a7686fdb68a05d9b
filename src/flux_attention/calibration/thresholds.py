"""Thresholds of block-sparse full layers: which are tried, what share of the blocks they select, what they lose."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from flux_attention.config import FluxConfig
from flux_attention.patterns import BlockSparse, Full, Pattern, full_pattern

#: Thresholds that are judged, those that select fewer blocks first.
TRIED = {"maximum": (0.2, 0.1, 0.05, 0.025, 0.015, 0.01), "mass": (0.8, 0.9, 0.95, 0.98, 0.99)}
#: Nats a token by which a layer's threshold alone may raise the loss, where layers have thresholds of their own.
LIMITS = (0.0, 0.001, 0.003, 0.01)


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


@dataclass(frozen=True)
class Alone(BlockSparse):
    """Is ``BlockSparse`` in one layer; others attend exactly."""

    layer: int = field(default=0, kw_only=True)

    def of_layer(self, layer: int) -> Pattern:
        """See ``Pattern.of_layer``."""
        return self if layer == self.layer else Full()


def of_layers(rises: Mapping[int, Sequence[float]], tried: Sequence[float]) -> list[dict[int, float]]:
    """
    Give each layer the threshold that selects fewest blocks of those that raise the loss by no more than a limit.

    A threshold counts if all that select more blocks than it keep the limit, too; where none does, it is the last one.

    Parameters
    ----------
    rises : dict of int to sequence of float
        By how much the loss is above exact attention's, with one layer block-sparse at each of the thresholds.
    tried : sequence of float
        Those that select fewer blocks first.

    Returns
    -------
    list of dict of int to float
        For each of ``LIMITS`` the layers' thresholds, each set once; not those where all layers have the same.
    """
    found: list[dict[int, float]] = []
    for limit in LIMITS:
        chosen = {}
        for layer, mine in rises.items():
            within = len(tried) - 1
            while within > 0 and max(mine[within - 1 :]) <= limit:
                within -= 1
            chosen[layer] = tried[within]
        if len(set(chosen.values())) > 1 and chosen not in found:
            found.append(chosen)
    return found


def grouped(rows: Sequence[Mapping[str, Any]], dense: Mapping[str, Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Group the rows of ``dense``'s families by threshold, in the rows' order."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["task"] in dense:
            groups.setdefault(json.dumps(row["threshold"]), []).append(row)
    return list(groups.values())


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
    found = []
    for some in grouped(rows, dense):
        right = [row["accuracy"] for row in some if row["accuracy"] is not None]
        found.append(
            {
                "threshold": some[0]["threshold"],
                "density": fmean(row["density"] for row in some),
                "rise": max(row["nats"] - dense[row["task"]]["nats"] for row in some),
                "accuracy": fmean(right) if right else None,
            }
        )
    return found
