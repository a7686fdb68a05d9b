"""lm-eval's tasks by method where nothing is routed by input."""

import pytest

from flux_attention import FluxConfig, attach
from flux_attention.shipped import load_shipped

pytest.importorskip("lm_eval")


def test_tasks_without_routers(tasks, tmp_path, own_tasks_only):
    """Forced sets by a pattern alone; a ranking at two budgets; what is there is not measured again."""
    from flux_attention.evaluation.lm_harness import TaskEvaluation

    model, tokenizer, routing = load_shipped()
    routing.detach()
    ranking = attach(model, FluxConfig(sink=16, window=64, ranking=(6, 8, 0, 1, 2, 3, 4, 5, 7, 9), budget=0.9))
    ranking.save_pretrained(tmp_path / "ranking")
    ranking.detach()

    def make(adapters, **shared):
        arguments = dict(samples=2, include_path=str(tasks), config=FluxConfig(sink=16, window=64), **shared)
        return TaskEvaluation(model, tokenizer, adapters, ["flux_choice"], **arguments)

    rows = list(make([], force=["0.5", "6,8"]).rows())
    kinds = [(row["method"], row.get("force"), row["sparsity"]) for row in rows]
    assert kinds == [("dense", None, 0), ("sparse", None, 1), ("forced", "0.5", 0.5), ("forced", "6,8", 0.8)]
    assert all(row["routers"] is None and row["model"] == "shipped" for row in rows)
    more = list(make([str(tmp_path / "ranking")], force=["6,8"], budgets=[0.9, 0.8]).rows(rows))
    assert more[:3] == [rows[0], rows[1], rows[3]]
    sets = [(row["method"], row["budget"], row["full_layers"], row["sparsity"]) for row in more[3:]]
    assert sets == [("static-nll", 0.9, [6], 0.9), ("static-nll", 0.8, [6, 8], 0.8)]
    assert more[4]["scores"] == rows[3]["scores"]
