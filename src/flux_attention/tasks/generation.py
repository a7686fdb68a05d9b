"""Generates answers to samples' prompts, greedily and in batches, with the routes that each prompt got."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch

from flux_attention.routes import RouteSpec
from flux_attention.tasks.metrics import score_answer
from flux_attention.tasks.samples import Sample
from flux_attention.tasks.scoring import pad, rows_of

#: Overrides what a model's own generation settings ask for: samples, or a penalty for what a copy has to repeat.
GREEDY = dict(do_sample=False, num_beams=1, repetition_penalty=1.0, temperature=None, top_p=None, top_k=None)


#: Tokens beyond the reference's; many models work a problem out at length before they tell the result.
SLACK, ROOM_TO_WORK_OUT = 24, 160


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
    tokens : list of list of int
        The answers as they were generated, with the token that ends a turn where there was room for it.
    """

    texts: list[str]
    full: list[list[bool]]
    tokens: list[list[int]]


def room_for(samples: Sequence[Sample]) -> int:
    """Return how many tokens to generate at most: as the references need, half as many again, and some more."""

    def needed(sample: Sample) -> int:
        works_out = sample.question is not None and sample.question.task_class == "maths"
        return len(sample.answer_ids) * 3 // 2 + (ROOM_TO_WORK_OUT if works_out else SLACK)

    return max(map(needed, samples))


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
        Default: as each sample's reference answer needs, and some more.
    routes : str, float, sequence of int, or torch.Tensor, optional
        What ``routing.force`` takes, a tensor with a row for each sample included; default: what is in force.
    routing : Routing, optional
        The attached routers' handle, if any.
    progress : callable
        Told after each batch how many answers it gave.
    """
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    order = sorted(range(len(samples)), key=lambda index: -len(samples[index].prompt_ids))
    texts, tokens, full = [""] * len(samples), [[]] * len(samples), [[]] * len(samples) if routing is not None else []
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
                eos_token_id=sorted(ends) or None,
                pad_token_id=fill,
                **GREEDY,
            )
        new = output[:, ids.shape[1] :].tolist()
        if max_new_tokens is None:  # an answer does not depend on what shares its batch
            new = [row[: room_for([sample])] for row, sample in zip(new, batch, strict=True)]
        answers = tokenizer.batch_decode(new, skip_special_tokens=True)
        for row, index in enumerate(chosen):
            texts[index] = answers[row]
            ended = next((place for place, token in enumerate(new[row]) if token in ends), len(new[row]))
            tokens[index] = new[row][: ended + 1]
            if routing is not None:
                full[index] = routing.routes.routes_BL[row].tolist()
        progress(len(batch))
    return Answers(texts, full, tokens)


def score_answers(
    model,
    tokenizer,
    samples: Sequence[Sample],
    batch_size: int,
    routes: RouteSpec | None = None,
    routing=None,
    progress: Callable[[int], object] = lambda done: None,
) -> tuple[list[float], list[list[bool]]]:
    """
    Score what a model generates to samples that were made from questions; see ``generate_answers``.

    Returns
    -------
    scores : list of float
        By each question's metric.
    full : list of list of bool
        Routes, True = full attention.
    """
    answers = generate_answers(model, tokenizer, samples, batch_size, routes=routes, routing=routing, progress=progress)
    pairs = zip(samples, answers.texts, strict=True)
    return [score_answer(sample.question, text) for sample, text in pairs], answers.full


def with_answers(samples: Sequence[Sample], tokens: Sequence[Sequence[int]]) -> list[Sample]:
    """Put other answers in place of the samples' last ones."""
    found = []
    for sample, answer in zip(samples, tokens, strict=True):
        prompt = sample.prompt_ids
        ids = np.concatenate([prompt, np.asarray(answer, np.int32)])
        found.append(replace(sample, input_ids=ids, answers=[*sample.answers[:-1], (len(prompt), len(ids))]))
    return found
