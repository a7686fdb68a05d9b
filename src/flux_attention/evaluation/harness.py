"""Score a model, routed or not, on generated samples.

A sample's answer is right if every one of its tokens is the most likely one given the tokens before it: exactly
then greedy generation gives this answer. One forward pass scores prompt and answer; routes are decided by the
prompt alone, and answer tokens see sink and window in sparse layers, as in decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F

from flux_attention.evaluation.tasks import Sample


@dataclass
class Scores:
    """
    Per-sample results, in order.

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


def answer_losses(model, samples: Sequence[Sample], **kwargs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """
    Loss of each sample's answer tokens, and whether each is the most likely one.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With or without routers; ``kwargs`` go to its decoder.
    samples : sequence of Sample
        All of the same number of tokens.

    Returns
    -------
    losses, right : list of torch.Tensor
        One 1-D tensor a sample: float32 nats (with gradients where they are enabled), bool.
    """
    ids = torch.from_numpy(np.stack([sample.input_ids for sample in samples]).astype(np.int64)).to(model.device)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False, **kwargs).last_hidden_state
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
) -> Scores:
    """
    Score ``samples``.

    Parameters
    ----------
    routing : Routing, optional
        The attached routers' handle, if any; use ``routing.force`` around the call to compare routes.
    batch_size : int
        Samples a forward; samples of one call have the same number of tokens.
    """
    scores = Scores()
    for first in range(0, len(samples), batch_size):
        batch = samples[first : first + batch_size]
        lengths = {} if routing is None else {"prompt_lengths": [len(sample.prompt_ids) for sample in batch]}
        losses, right = answer_losses(model, batch, **lengths)
        scores.nats += [loss.mean().item() for loss in losses]
        scores.right += [bool(tokens.all()) for tokens in right]
        if routing is not None:
            scores.full += routing.routes.routes_BL.tolist()
    return scores
