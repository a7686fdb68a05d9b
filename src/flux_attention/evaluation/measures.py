"""Turns what samples scored into a row's measure, with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from flux_attention.tasks.scoring import Scores


def token_measures(scores: Scores, is_text: bool) -> dict[str, Any]:
    """Return the measure with its interval, and what it is the mean of: right or wrong, or nats a token, by sample."""
    if is_text:
        each = [round(nats, 4) for nats in scores.nats]
        return {"perplexity": round(scores.perplexity, 4), **_interval(scores.perplexity_interval), "scores": each}
    return answer_measures(list(map(int, scores.right)))


def answer_measures(scores: Sequence[float]) -> dict[str, Any]:
    """
    Return the mean score of answers, with its interval, and the scores.

    Where all are right or wrong the interval is Wilson's, which holds for few samples too; scores in between, such as
    ROUGE-L's, lie much closer together than that allows for, so theirs is by their own spread.
    """
    each = [int(score) if score in (0, 1) else round(score, 4) for score in scores]
    mean = fmean(each)
    if all(score in (0, 1) for score in each) or len(each) < 2:
        interval = Scores(right=each).accuracy_interval
    else:
        error = 1.96 * stdev(each) / math.sqrt(len(each))
        interval = mean - error, min(1.0, mean + error)
    return {"accuracy": round(mean, 4), **_interval(interval), "scores": each}


def _interval(interval: tuple[float, float]) -> dict[str, float | None]:
    if math.isinf(interval[1]):  # of a single text
        return {"low": None, "high": None}
    return {"low": round(max(0.0, interval[0]), 4), "high": round(interval[1], 4)}
