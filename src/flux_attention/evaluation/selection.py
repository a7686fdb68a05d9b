"""Chooses full layers and heads for a method: greedily, of all sets, by what routers like, or at random."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import torch

from flux_attention.progress import Progress, silent
from flux_attention.tasks.samples import Sample
from flux_attention.tasks.scoring import evaluate


def greedy_order(loss: Callable[[list[int]], float], layers: Sequence[int], count: int) -> list[int]:
    """
    Order ``count`` layers to run full: from all sparse, the one that lowers the loss most is added, again and again.

    Parameters
    ----------
    loss : callable
        Of a list of full layers; called about ``count`` × layers times.
    """
    chosen: list[int] = []
    while len(chosen) < count:
        losses = {layer: loss([*chosen, layer]) for layer in layers if layer not in chosen}
        chosen.append(min(losses, key=losses.__getitem__))
    return chosen


def best_layers(
    value: Callable[[list[int], bool], tuple[float, ...]],
    layers: Sequence[int],
    count: int,
    progress: Progress = silent,
) -> list[int]:
    """
    Find the ``count`` layers of highest value to run full, of all such sets.

    Parameters
    ----------
    value : callable
        Of a list of full layers; and whether to judge it on few samples, as all sets are at first, or on all of them,
        as the best ten are then.
    progress : Progress
        Told how far the search is.
    """
    few, total = [], math.comb(len(layers), count)
    for number, chosen in enumerate(itertools.combinations(layers, count), 1):
        progress("trying all sets of layers", number, total, f"{count} of {len(layers)}")
        few.append((value(list(chosen), True), list(chosen)))
    few.sort(key=lambda pair: pair[0], reverse=True)
    return max((chosen for _, chosen in few[:10]), key=lambda chosen: value(chosen, False))


def liked_routes(routing, samples: Sequence[Sample], count: int, progress: Progress = silent) -> torch.Tensor:
    """Return bool (U,): the ``count`` layers or heads whose routers give full attention most probability on average."""
    liked = torch.zeros(len(routing.units))
    for number, sample in enumerate(samples, 1):
        progress("choosing static heads", number, len(samples))
        evaluate(routing.model, [sample], routing)
        liked += routing.routes.logits_BL2[0].softmax(-1)[:, 1]
    return torch.zeros(len(liked), dtype=torch.bool).scatter(0, liked.topk(count).indices, True)


def random_routes(samples: Sequence[Sample], layers: int, count: int, seed: int = 0) -> torch.Tensor:
    """Return bool (N, L): ``count`` full layers, drawn anew for each sample."""
    routes = torch.zeros(len(samples), layers, dtype=torch.bool)
    for row in range(len(samples)):
        routes[row, random.Random(f"{seed}-{samples[row].family}-{row}").sample(range(layers), count)] = True
    return routes
