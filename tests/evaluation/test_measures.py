"""What a row says of its samples' scores."""

import json
import math

import numpy as np
import pytest

from flux_attention.evaluation.measures import answer_measures, token_measures
from flux_attention.tasks.scoring import Scores


def test_right_and_wrong_answers_have_wilsons_interval_and_scores_in_between_their_own_spread():
    found = answer_measures([1.0, 0.0, 1.0, 1.0])
    assert found == {"accuracy": 0.75, "low": 0.3006, "high": 0.9544, "scores": [1, 0, 1, 1]}
    scores = np.random.default_rng(0).uniform(0.2, 0.4, 30)
    found = answer_measures(list(scores))
    error = 1.96 * scores.std(ddof=1) / math.sqrt(30)
    assert found["accuracy"] == pytest.approx(scores.mean(), abs=1e-4)
    assert (found["low"], found["high"]) == pytest.approx((scores.mean() - error, scores.mean() + error), abs=2e-4)
    wide = answer_measures([0.01, 0.99])
    assert (wide["low"], wide["high"]) == (0.0, 1.0)  # no score is beyond


def test_text_has_its_perplexity_and_a_single_text_no_interval():
    found = token_measures(Scores(right=[False, False], nats=[1.0, 2.0]), is_text=True)
    assert found["perplexity"] == pytest.approx(math.exp(1.5), abs=1e-4) and found["scores"] == [1.0, 2.0]
    assert found["low"] < found["perplexity"] < found["high"]
    alone = token_measures(Scores(right=[False], nats=[1.0]), is_text=True)
    assert (alone["low"], alone["high"]) == (None, None)
    json.dumps(alone, allow_nan=False)
    assert token_measures(Scores(right=[True, False], nats=[1.0, 2.0]), is_text=False)["accuracy"] == 0.5
