"""Scores generated text against what a question expects, as RULER and LongBench do; every score is from 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flux_attention.tasks.questions import Question


#: Of any script.
WORD = re.compile(r"[^\W_]+")


def match(text: str, expected: tuple[str, ...]) -> float:
    """Return the share of the expected strings that occur in ``text`` as whole words, in any case."""
    spaced = " ".join(text.split()).casefold()
    found = [re.search(rf"(?<!\w){re.escape(' '.join(each.split()).casefold())}(?!\w)", spaced) for each in expected]
    return sum(each is not None for each in found) / len(expected)


def similarity(first: Sequence, second: Sequence) -> float:
    """Return twice the length of the longest common subsequence, divided by the sum of both lengths."""
    row = [0] * (len(second) + 1)
    for left in first:
        diagonal = 0
        for column, right in enumerate(second, 1):
            diagonal, row[column] = row[column], diagonal + 1 if left == right else max(row[column], row[column - 1])
    return 2 * row[-1] / (len(first) + len(second)) if first or second else 1.0


def rouge_l(text: str, expected: tuple[str, ...]) -> float:
    """Return ROUGE-L's F1, of the reference that is the nearest; words are compared without signs, in any case."""
    words = WORD.findall(text.casefold())
    return max(
        similarity(words, reference) if (reference := WORD.findall(each.casefold())) else 0.0 for each in expected
    )


def edit(text: str, expected: tuple[str, ...]) -> float:
    """Return how alike the first lines of code are, letter by letter; fences and comments are passed over."""
    lines = [line for line in text.splitlines() if line.strip() and not re.match(r"\s*(```|#|//)", line)]
    return max(similarity("\n".join(lines[: each.count("\n") + 1]).strip(), each.strip()) for each in expected)


#: How each metric scores a text; perplexity is not about generated text.
METRICS: dict[str, Callable[[str, tuple[str, ...]], float] | None] = {
    "match": match,
    "rouge-l": rouge_l,
    "edit": edit,
    "perplexity": None,
}


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
