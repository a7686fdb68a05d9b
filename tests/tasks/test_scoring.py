"""Scores and their intervals."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_attention.tasks.scoring import Scores


@settings(deadline=None)
@given(st.integers(1, 200), st.data())
def test_wilsons_interval_solves_its_equation(n, data):
    right = data.draw(st.integers(0, n))
    scores = Scores(right=[True] * right + [False] * (n - right))
    for bound in scores.accuracy_interval:
        assert -1e-9 <= bound <= 1 + 1e-9
        assert (scores.accuracy - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / n, abs=1e-9)
