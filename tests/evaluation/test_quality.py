"""Evaluating by method: what each one forces, and going on."""

import json
import math

import numpy as np
import pytest
import torch
from helpers.command import flux
from helpers.shipped import SPARSE

from flux_attention import FluxConfig, attach
from flux_attention.evaluation import quality
from flux_attention.evaluation.quality import Evaluation, best_layers, random_routes
from flux_attention.shipped import load_shipped
from flux_attention.tasks.scoring import evaluate

#: Tokens of a sample, more than sparse layers see.
LENGTH = 256


@pytest.fixture(scope="module")
def setting(haystack, short_adapter):
    """The shipped model without routers, its text, and an adapter."""
    model, tokenizer, routing = load_shipped()
    routing.detach()
    return model, tokenizer, haystack, short_adapter


def make(setting, **changes):
    values = dict(families=["single_needle", "plain"], lengths=[LENGTH], samples=3, calibration=1)
    model, tokenizer, haystack, adapter = setting
    return Evaluation(model, tokenizer, [adapter], haystack, **{**values, **changes})


def untimed(rows):
    return [{fact: value for fact, value in row.items() if fact != "seconds"} for row in rows]


def test_best_layers_are_the_best_of_all_sets():
    """Greedy search takes 3 first; together 5 and 9 are better. A look at few samples may mistake a set."""
    worth = {3: 5.0, 5: 1.0, 8: 2.0, 9: 0.1}
    asked = []

    def value(chosen, few):
        asked.append((tuple(chosen), few))
        both = {5, 9} <= set(chosen)
        return 20.0 * (both and not few), sum(worth[layer] for layer in chosen)

    assert best_layers(value, list(worth), 2) == [5, 9]
    assert [few for _, few in asked].count(True) == 6 == len(set(asked[:6]))
    assert best_layers(value, list(worth), 1) == [3] and best_layers(value, list(worth), 0) == []
    # Of more than ten sets those that look worst are not judged again.
    asked.clear()
    best_layers(lambda chosen, few: (asked.append(few), sum(chosen))[1:], range(6), 3)
    assert asked == [True] * 20 + [False] * 10


def test_random_routes_are_seeded_and_of_the_size_asked_for(setting):
    samples = make(setting).make("single_needle", LENGTH, 6)
    routes = random_routes(samples, 10, 3)
    assert (routes.sum(1) == 3).all() and torch.equal(routes, random_routes(samples, 10, 3))
    assert not torch.equal(routes, random_routes(samples, 10, 3, seed=1))
    assert len({tuple(row.tolist()) for row in routes}) > 1


def test_rows_are_what_forcing_by_hand_gives(setting):
    evaluation = make(setting)
    rows = {(row["task"], row["method"]): row for row in evaluation.rows()}
    methods = ("dense", "sparse", "routed", "static", "random")
    assert set(rows) == {(family, method) for family in evaluation.families for method in methods}
    assert all(len(row["scores"]) == 3 for row in rows.values())
    routed = [sum(rows[family, "routed"]["fa_rate"].values()) for family in evaluation.families]
    count = math.ceil(sum(routed) / 2 - 1e-6)
    assert 0 < count < 10
    static = rows["plain", "static"]["full_layers"]
    assert len(static) == count and rows["single_needle", "static"]["full_layers"] == static
    assert rows["plain", "static"]["sparsity"] == rows["plain", "random"]["sparsity"] == 1 - count / 10
    assert rows["plain", "dense"]["esr"] == 0 < rows["plain", "static"]["esr"] < rows["plain", "sparse"]["esr"] < 1
    assert rows["plain", "dense"]["sparsity"] == 0 and rows["plain", "sparse"]["sparsity"] == 1
    model, _, _, adapter = setting
    routing = attach(model, adapter)
    try:
        for method, spec in (("dense", "full"), ("sparse", "sparse"), ("static", static), ("routed", None)):
            with routing.force(spec):
                scores = evaluate(model, evaluation.make("plain", LENGTH, 3), routing)
            assert rows["plain", method]["perplexity"] == pytest.approx(scores.perplexity, abs=1e-4)
            assert rows["plain", method]["low"] < scores.perplexity < rows["plain", method]["high"]
    finally:
        routing.detach()


def test_dense_is_exact_whatever_full_layers_compute(setting):
    model, tokenizer, haystack, _ = setting
    blocks = FluxConfig(full={"pattern": "block_sparse", "threshold": 0.05, "select": "mass"}, **SPARSE)
    rows = {}
    for name, config in (("exact", FluxConfig(**SPARSE)), ("blocks", blocks)):
        made = dict(families=["plain"], lengths=[2048], samples=2, methods=["dense", "forced"], force=["full"])
        rows[name] = list(Evaluation(model, tokenizer, [], haystack, config=config, **made).rows())
    dense, forced = ([row["perplexity"] for row in rows[name]] for name in ("exact", "blocks"))
    assert forced[0] == dense[0] == dense[1] != forced[1]


def test_the_best_static_layers_are_found_once_and_used_for_all(setting, monkeypatch):
    """The search's own choice, by hand: accuracy of the questions first, then the loss of all families."""
    evaluation = make(setting, methods=["best-static"], calibration=2)
    values = []

    def search(value, layers, count, tell):
        values.append([value([2, 5], few) for few in (True, False)])
        return [2, 5]

    monkeypatch.setattr(quality, "best_layers", search)
    rows = [row for row in evaluation.rows() if row["method"] == "best-static"]
    assert [row["task"] for row in rows] == evaluation.families and len(values) == 1
    assert all(row["full_layers"] == [2, 5] and row["sparsity"] == 0.8 for row in rows)
    again = [row for row in evaluation.rows(rows[:1]) if row["method"] == "best-static"]
    assert untimed(again) == untimed(rows) and len(values) == 1
    sizes = []
    monkeypatch.setattr(quality, "best_layers", lambda value, layers, count, tell: sizes.append(count) or [])
    both = make(setting, methods=["routed", "best-static", "best-static-fewer"], calibration=2)
    found = {row["method"]: row for row in both.rows()}
    full = np.mean([sum(row["fa_rate"].values()) for row in both.rows() if row["method"] == "routed"])
    assert sizes[:2] == [math.ceil(full - 1e-6), math.ceil(full - 1e-6) - 1]
    assert found["best-static-fewer"]["sparsity"] == 1  # nothing was chosen
    routing = attach(setting[0], setting[3])
    try:
        for count, (accuracy, loss) in zip((1, 2), values[0], strict=True):
            some = [evaluation.make(task, LENGTH, count, quality.CALIBRATION_SEED) for task in evaluation.families]
            needle, plain = (evaluate(setting[0], samples, routing, routes=[2, 5]) for samples in some)
            assert accuracy == needle.accuracy
            assert -loss == pytest.approx((np.mean(needle.nats) + np.mean(plain.nats)) / 2, abs=1e-5)
    finally:
        routing.detach()


def test_head_adapters_have_methods_of_their_own(setting, tmp_path):
    model, tokenizer, haystack, _ = setting
    routing = attach(model, FluxConfig(**SPARSE, granularity="head"))
    torch.manual_seed(0)
    for router in routing.routers.values():
        torch.nn.init.normal_(router.head[-1].weight, std=3.0)
        router.head[-1].bias.data.zero_()
    routing.save_pretrained(tmp_path / "heads")
    routing.detach()
    sizes = dict(samples=2, calibration=1, batch_size=1)
    evaluation = Evaluation(model, tokenizer, [str(tmp_path / "heads")], haystack, ["plain"], [LENGTH], **sizes)
    rows = {row["method"]: row for row in evaluation.rows()}
    assert list(rows) == ["dense", "sparse", "head", "head-static"]
    units = rows["head"]["fa_rate"]
    assert list(units)[:3] == ["0.0", "0.1", "1.0"] and 0 < sum(units.values()) < len(units)
    full = sum(rows["head-static"]["fa_rate"].values())
    assert full == math.ceil(sum(units.values()) - 1e-6) and set(rows["head-static"]["fa_rate"].values()) <= {0.0, 1.0}


def test_what_is_done_is_not_measured_again(setting, tmp_path, monkeypatch):
    evaluation = make(setting, methods=["dense", "sparse"])
    ran = []
    real = quality.evaluate
    monkeypatch.setattr(quality, "evaluate", lambda *a: ran.append(1) or real(*a))

    class Stop(Exception):
        pass

    told = []

    def stop(what, done, total, *more):
        told.append((what, done, total))
        if told.count(("answering", 9, 12)) == 2:  # three rows of three samples are there, the next one begins
            raise Stop

    with pytest.raises(Stop):
        quality.run(evaluation, tmp_path, False, stop)
    assert len(json.loads((tmp_path / "quality.json").read_text())["rows"]) == 3
    monkeypatch.setenv("FLUX_COMMIT", "later")
    rows = quality.run(evaluation, tmp_path, False, lambda *far: None)
    assert len(ran) == 4 and len(rows) == 4
    results = json.loads((tmp_path / "quality.json").read_text())
    assert results["meta"]["commit"] == "later"
    assert ["commit" in row for row in results["rows"]] == [True, True, True, False]  # which are of the commit before
    monkeypatch.setenv("FLUX_COMMIT", "latest")
    quality.run(evaluation, tmp_path, False, lambda *far: None)  # nothing is left to measure
    assert json.loads((tmp_path / "quality.json").read_text()) == results
    with pytest.raises(ValueError, match=r"other settings \(samples\)"):
        quality.run(make(setting, methods=["dense"], samples=2), tmp_path, False, lambda *far: None)
    assert len(quality.run(make(setting, methods=["dense"], samples=2), tmp_path, True, lambda *far: None)) == 2


def test_wrong_requests_are_refused(setting):
    for changes, message in (
        (dict(families=["poems"]), r"unknown families \['poems'\]"),
        (dict(methods=["magic"]), r"unknown methods \['magic'\]"),
        (dict(lengths=[LENGTH, 16384]), "16384 tokens do not fit into the model's 8192 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            make(setting, **changes)
    model, tokenizer, haystack, _ = setting
    with pytest.raises(ValueError, match="at least one adapter"):
        Evaluation(model, tokenizer, [], haystack, ["plain"], [1024])


def test_the_command_evaluates_the_shipped_model(tmp_path):
    arguments = ["--families", "multi_key,plain", "--lengths", "1K", "--samples", "2", "--methods", "dense,routed"]
    text = tmp_path / "text.py"
    text.write_text("def f(x):\n    return x\n" * 400)
    result = flux("eval", "shipped", *arguments, "--text", str(text), "--output", str(tmp_path / "o"))
    assert result.returncode == 0, result.stderr
    assert "routed (routers)" in result.stdout and (tmp_path / "o" / "report.html").exists()
    results = json.loads((tmp_path / "o/quality.json").read_text())
    assert results["meta"]["settings"]["model"] == "flux-attention/shipped"  # not where this machine has it
    wrong = flux("eval", "shipped", "--families", "poems", "--text", str(text), "--output", str(tmp_path / "p"))
    assert wrong.returncode == 1 and "unknown families" in wrong.stderr and len(wrong.stderr.splitlines()) == 1
