"""The study's tables: means over seeds, differences, and fixed sets of the same sparsity."""

import importlib
import math
from pathlib import Path

import pytest


def test_the_study_shows_seeds_and_differences(monkeypatch):
    """Three seeds of one target, each beside the static layers chosen for it, and beside heads of one seed."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    show = importlib.import_module("show_quality")

    def rows(method, routers, sparsity, right, nats):
        facts = dict(method=method, routers=routers, seq_len=4096, sparsity=sparsity, n=10)
        scores = [1] * right + [0] * (10 - right)
        yield dict(facts, task="count", accuracy=right / 10, scores=scores)
        yield dict(facts, task="plain", perplexity=math.exp(nats), scores=[nats - 0.1, nats + 0.1] * 5)

    names = [f"layer-0.65-{seed}" for seed in range(3)]
    every = [
        *rows("dense", None, 0.0, 10, 1.0),
        *(row for seed, name in enumerate(names) for row in rows("routed", name, 0.7, 9 - seed, 1.0)),
        *(row for seed, name in enumerate(names) for row in rows("static", name, 0.6, 5 + seed // 2, 1.1)),
        *rows("best-static", names[0], 0.6, 6, 1.1),
        *rows("best-static-fewer", names[0], 0.8, 2, 1.1),
        *rows("head", "head-0.65-0", 0.65, 8, 1.0),
    ]
    lines = [line.split(" | ") for line in show.differences(every, 4096).splitlines()]
    found = {(line[0].strip("| "), line[1]): line[2] for line in lines[2:]}
    assert found["routed (0.65)", "dense"] == "-20.0 (-30.0 to -10.0)"
    assert found["routed (0.65)", "static (0.65)"] == "+26.7 (+10.0 to +40.0)"
    assert found["routed (0.65)", "best-static (0.65)"] == "+20.0 (+10.0 to +30.0)"
    assert found["routed (0.65)", "head (0.65)"] == "+0.0 (-10.0 to +10.0)"
    assert found["head (0.65)", "dense"] == "-20.0"
    assert found["routed (0.65)", "best-static-fewer (0.65)"] == "+60.0 (+50.0 to +70.0)"
    mixed = show.at_equal_sparsity(every, 4096)  # half of the inputs with 6 of 10 right, half with 2
    line = "0.700 (0.700 to 0.700) | 0.800 (0.700 to 0.900) | 0.400 (0.400 to 0.400) | +40.0 (+30.0 to +50.0) |"
    assert f"| routed (0.65), all inputs | {line}" in mixed
    beyond = show.at_equal_sparsity(
        [{**row, "sparsity": 0.9} if row["routers"] == names[1] else row for row in every], 4096
    )
    assert "| 0.700 (0.700 to 0.700) | 0.800 (0.700 to 0.900) |" in beyond  # a seed beyond both sets
    (mean,) = [row for row in show.seeds_as_one(every) if (row["method"], row["task"]) == ("routed", "count")]
    assert mean["accuracy"] == pytest.approx(0.8)
