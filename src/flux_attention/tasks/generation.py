"""Generates answers to samples' prompts, greedily and in batches, with the routes that each prompt got."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from flux_attention.routes import RouteSpec
from flux_attention.tasks.samples import Sample
from flux_attention.tasks.scoring import pad, rows_of


@dataclass(frozen=True)
class Answers:
    """
    Holds what a model generated, in the samples' order.

    Attributes
    ----------
    texts : list of str
        The answers, without special tokens.
    full : list of list of bool
        Routes, True = full attention; empty for a model without routers.
    """

    texts: list[str]
    full: list[list[bool]]


def room_for(samples: Sequence[Sample]) -> int:
    """Return how many tokens to generate at most: the longest reference's, and half as many again, and some."""
    return max(len(sample.answer_ids) * 3 // 2 for sample in samples) + 24


@torch.no_grad()
def generate_answers(
    model,
    tokenizer,
    samples: Sequence[Sample],
    batch_size: int = 1,
    max_new_tokens: int | None = None,
    routes: RouteSpec | None = None,
    routing=None,
    progress: Callable[[int], object] = lambda done: None,
) -> Answers:
    """
    Generate an answer to each sample's prompt: the most likely tokens, up to the end of the turn.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With or without routers.
    batch_size : int
        Prompts a call of ``generate``; they are padded on the left, so prompts of like lengths share one.
    max_new_tokens : int, optional
        Default: as the batch's reference answers need, and some more.
    routes : str, float, sequence of int, or torch.Tensor, optional
        What ``routing.force`` takes, a tensor with a row for each sample included; default: what is in force.
    routing : Routing, optional
        The attached routers' handle, if any.
    progress : callable
        Told after each batch how many answers it gave.
    """
    order = sorted(range(len(samples)), key=lambda index: -len(samples[index].prompt_ids))
    texts, full = [""] * len(samples), [[]] * len(samples) if routing is not None else []
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    for first in range(0, len(samples), batch_size):
        chosen = order[first : first + batch_size]
        batch = [samples[index] for index in chosen]
        ids, mask = pad([sample.prompt_ids for sample in batch], model.device, fill, left=True)
        some = rows_of(routes, chosen)
        with nullcontext() if some is None else routing.force(some):
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=room_for(batch) if max_new_tokens is None else max_new_tokens,
                do_sample=False,
                pad_token_id=fill,
            )
        answers = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        for row, index in enumerate(chosen):
            texts[index] = answers[row]
            if routing is not None:
                full[index] = routing.routes.routes_BL[row].tolist()
        progress(len(batch))
    return Answers(texts, full)
