"""Scores a model, routed or not, on generated samples.

A sample's answer is right if every one of its tokens is the most likely one given the tokens before it: exactly
then greedy generation gives this answer. One forward pass scores prompt and answer; routes are decided by the
prompt alone, and answer tokens see sink and window in sparse layers, as in decode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import fmean, stdev

import numpy as np
import torch
import torch.nn.functional as F

from flux_attention.routes import RouteSpec
from flux_attention.tasks.samples import Sample


@dataclass
class Scores:
    """
    Holds per-sample results, in order.

    Attributes
    ----------
    right : list of bool
        Whether the whole answer is right.
    nats : list of float
        Mean loss of the answer's tokens (for ``plain``: of the second half of the text).
    full : list of list of bool
        Routes, True = full attention; empty for a model without routers.
    """

    right: list[bool] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    full: list[list[bool]] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return fmean(self.right)

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss."""
        return float(np.exp(fmean(self.nats)))

    @property
    def msr(self) -> float:
        """Mean Ω_MSR."""
        return 1 - fmean(map(fmean, self.full))

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        n, p, z = len(self.right), self.accuracy, 1.96
        centre, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (centre - width) / (1 + z * z / n), (centre + width) / (1 + z * z / n)

    @property
    def perplexity_interval(self) -> tuple[float, float]:
        """95 % interval of the perplexity, from the spread of the samples' losses."""
        error = 1.96 * stdev(self.nats) / math.sqrt(len(self.nats)) if len(self.nats) > 1 else math.inf
        return math.exp(fmean(self.nats) - error), math.exp(fmean(self.nats) + error)


def pad(
    rows: Sequence[np.ndarray], device: torch.device, fill: int = 0, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Stack sequences of unequal lengths.

    Returns
    -------
    ids, mask : torch.Tensor
        int64 (B, S), and 1 where tokens are real; no mask where all are.
    """
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), fill, np.int64), np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    real = None if mask.all() else torch.from_numpy(mask).to(device)
    return torch.from_numpy(ids).to(device), real


def rows_of(routes: RouteSpec | None, chosen: Sequence[int]) -> RouteSpec | None:
    """Return the routes of some samples: of a tensor with a row for each sample these rows, else what is given."""
    return routes[list(chosen)] if isinstance(routes, torch.Tensor) and routes.ndim == 2 else routes


def answer_losses(model, samples: Sequence[Sample], **kwargs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """
    Compute the loss of each sample's answer tokens, and whether each is the most likely one.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With or without routers; ``kwargs`` go to its decoder.
    samples : sequence of Sample
        Of any lengths; shorter ones are padded on the right, behind a mask.

    Returns
    -------
    losses, right : list of torch.Tensor
        One 1-D tensor a sample: float32 nats (with gradients where they are enabled), bool.
    """
    ids, mask = pad([sample.input_ids for sample in samples], model.device)
    hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False, **kwargs).last_hidden_state
    losses, right = [], []
    for row, sample in enumerate(samples):
        start, end = sample.answers[-1]
        logits = model.get_output_embeddings()(hidden[row, start - 1 : end - 1]).float()
        losses.append(F.cross_entropy(logits, ids[row, start:end], reduction="none"))
        right.append(logits.argmax(-1) == ids[row, start:end])
    return losses, right


@torch.no_grad()
def evaluate(
    model,
    samples: Sequence[Sample],
    routing=None,
    batch_size: int = 1,
    routes: RouteSpec | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> Scores:
    """
    Score ``samples``.

    Parameters
    ----------
    routing : Routing, optional
        The attached routers' handle, if any.
    batch_size : int
        Samples a forward; they may have unequal lengths.
    routes : str, float, sequence of int, or torch.Tensor, optional
        What ``routing.force`` takes, a tensor with a row for each sample included; default: what is in force.
    progress : callable
        Told after each batch how many samples it had.
    """
    scores = Scores()
    for first in range(0, len(samples), batch_size):
        batch = samples[first : first + batch_size]
        lengths = {} if routing is None else {"prompt_lengths": [len(sample.prompt_ids) for sample in batch]}
        some = rows_of(routes, range(first, first + len(batch)))
        with nullcontext() if some is None else routing.force(some):
            losses, right = answer_losses(model, batch, **lengths)
        scores.nats += [loss.mean().item() for loss in losses]
        scores.right += [bool(tokens.all()) for tokens in right]
        if routing is not None:
            scores.full += routing.routes.routes_BL.tolist()
        progress(len(batch))
    return scores
