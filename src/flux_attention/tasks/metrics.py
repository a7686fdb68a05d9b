"""Scores generated text against what a question expects, as RULER and LongBench do; every score is from 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flux_attention.tasks.questions import Question


def match(text: str, expected: tuple[str, ...]) -> float:
    """Return the share of the expected strings that occur in ``text`` as whole words, in any case."""
    spaced = " ".join(text.split()).casefold()
    found = [re.search(rf"(?<!\w){re.escape(' '.join(each.split()).casefold())}(?!\w)", spaced) for each in expected]
    return sum(each is not None for each in found) / len(expected)


METRICS: dict[str, Callable[[str, tuple[str, ...]], float] | None] = {"match": match, "perplexity": None}


def score_answer(question: Question, text: str) -> float:
    """
    Score what a model answered.

    Parameters
    ----------
    text : str
        The generated answer.

    Raises
    ------
    ValueError
        For a question whose metric is perplexity, which generated text does not have.
    """
    metric = METRICS[question.metric]
    if metric is None:
        raise ValueError(f"{question.family} is scored by {question.metric}, which tasks.scoring.evaluate computes")
    return metric(text, question.expected)
