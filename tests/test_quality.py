"""Evaluating by method: what each one forces, intervals, going on, and the report."""

import importlib.util
import json
import math
import re
import xml.dom.minidom
from pathlib import Path

import numpy as np
import pytest
import torch
from command import flux
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_attention import shipped
from flux_attention.evaluation import quality
from flux_attention.evaluation.harness import Scores, evaluate
from flux_attention.evaluation.quality import Evaluation, best_layers, greedy_layers, random_routes
from flux_attention.evaluation.report import comparisons, difference, heat_map, short_names, summary, write_report
from flux_attention.evaluation.tasks import Haystack
from flux_attention.evaluation.text import local_texts
from flux_attention.shipped import load_shipped


@pytest.fixture(scope="module")
def setting():
    model, tokenizer, routing = load_shipped()
    routing.detach()
    return model, tokenizer, Haystack(local_texts(True, max_chars=200_000), tokenizer)


def make(setting, **changes):
    values = dict(families=["single_needle", "plain"], lengths=[1024], samples=3, calibration=1)
    model, tokenizer, haystack = setting
    return Evaluation(model, tokenizer, [str(shipped.ROUTERS)], haystack, **{**values, **changes})


def test_greedy_layers_take_what_lowers_the_loss_most():
    worth = {3: 5.0, 5: 1.0, 8: 2.0, 9: 0.1}
    asked = []

    def loss(chosen):
        asked.append(chosen)
        return -sum(worth[layer] for layer in chosen) - 3.0 * ({5, 9} <= set(chosen))

    assert greedy_layers(loss, list(worth), 2) == [3, 8]
    assert len(asked) == 4 + 3
    assert greedy_layers(loss, list(worth), 0) == []
    assert greedy_layers(loss, list(worth), 4) == [3, 5, 8, 9]


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
    samples = make(setting).make("single_needle", 1024, 6)
    routes = random_routes(samples, 10, 3)
    assert (routes.sum(1) == 3).all() and torch.equal(routes, random_routes(samples, 10, 3))
    assert not torch.equal(routes, random_routes(samples, 10, 3, seed=1))
    assert len({tuple(row.tolist()) for row in routes}) > 1


def test_rows_are_what_forcing_by_hand_gives(setting):
    evaluation = make(setting)
    rows = {(row["task"], row["method"]): row for row in evaluation.rows()}
    methods = ("dense", "sparse", "routed", "static", "random")
    assert set(rows) == {(family, method) for family in evaluation.families for method in methods}
    routed = [sum(rows[family, "routed"]["fa_rate"].values()) for family in evaluation.families]
    count = math.ceil(sum(routed) / 2 - 1e-6)
    static = rows["plain", "static"]["full_layers"]
    assert len(static) == count and rows["single_needle", "static"]["full_layers"] == static
    assert rows["plain", "static"]["sparsity"] == rows["plain", "random"]["sparsity"] == 1 - count / 10
    assert rows["plain", "dense"]["sparsity"] == 0 and rows["plain", "sparse"]["sparsity"] == 1
    model, tokenizer, haystack = setting
    from flux_attention import attach

    routing = attach(model, shipped.ROUTERS)
    try:
        for method, spec in (("dense", "full"), ("sparse", "sparse"), ("static", static), ("routed", None)):
            with routing.force(spec):
                scores = evaluate(model, evaluation.make("plain", 1024, 3), routing)
            assert rows["plain", method]["perplexity"] == pytest.approx(scores.perplexity, abs=1e-4)
            assert rows["plain", method]["low"] < scores.perplexity < rows["plain", method]["high"]
    finally:
        routing.detach()


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
    assert again == rows and len(values) == 1
    sizes = []
    monkeypatch.setattr(quality, "best_layers", lambda value, layers, count, tell: sizes.append(count) or [])
    both = make(setting, methods=["routed", "best-static", "best-static-fewer"], calibration=2)
    found = {row["method"]: row for row in both.rows()}
    full = np.mean([sum(row["fa_rate"].values()) for row in both.rows() if row["method"] == "routed"])
    assert sizes[:2] == [math.ceil(full - 1e-6), math.ceil(full - 1e-6) - 1]
    assert found["best-static-fewer"]["sparsity"] == 1  # nothing was chosen
    from flux_attention import attach

    routing = attach(setting[0], shipped.ROUTERS)
    try:
        for count, (accuracy, loss) in zip((1, 2), values[0], strict=True):
            some = [evaluation.make(task, 1024, count, quality.CALIBRATION_SEED) for task in evaluation.families]
            needle, plain = (evaluate(setting[0], samples, routing, routes=[2, 5]) for samples in some)
            assert accuracy == needle.accuracy
            assert -loss == pytest.approx((np.mean(needle.nats) + np.mean(plain.nats)) / 2, abs=1e-5)
    finally:
        routing.detach()


def test_head_adapters_have_methods_of_their_own(setting, tmp_path):
    from flux_attention import FluxConfig, attach

    model, tokenizer, haystack = setting
    routing = attach(model, FluxConfig(sink=64, window=704, pool_size=16, granularity="head"))
    torch.manual_seed(0)
    for router in routing.routers.values():
        torch.nn.init.normal_(router.head[-1].weight, std=3.0)
        router.head[-1].bias.data.zero_()
    routing.save_pretrained(tmp_path / "heads")
    routing.detach()
    sizes = dict(samples=2, calibration=1, batch_size=1)
    evaluation = Evaluation(model, tokenizer, [str(tmp_path / "heads")], haystack, ["plain"], [1024], **sizes)
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

    def stop(text):
        if len(ran) == 3:
            raise Stop

    with pytest.raises(Stop):
        quality.run(evaluation, tmp_path, False, stop)
    assert len(json.loads((tmp_path / "quality.json").read_text())["rows"]) == 3
    monkeypatch.setenv("FLUX_COMMIT", "later")
    rows = quality.run(evaluation, tmp_path, False, lambda text: None)
    assert len(ran) == 4 and len(rows) == 4
    results = json.loads((tmp_path / "quality.json").read_text())
    assert results["meta"]["commit"] == "later"
    assert ["commit" in row for row in results["rows"]] == [True, True, True, False]  # which are of the commit before
    monkeypatch.setenv("FLUX_COMMIT", "latest")
    quality.run(evaluation, tmp_path, False, lambda text: None)  # nothing is left to measure
    assert json.loads((tmp_path / "quality.json").read_text()) == results
    with pytest.raises(ValueError, match=r"other settings \(samples\)"):
        quality.run(make(setting, methods=["dense"], samples=2), tmp_path, False, lambda text: None)
    assert len(quality.run(make(setting, methods=["dense"], samples=2), tmp_path, True, lambda text: None)) == 2


def test_wrong_requests_are_refused(setting):
    for changes, message in (
        (dict(families=["poems"]), r"unknown families \['poems'\]"),
        (dict(methods=["magic"]), r"unknown methods \['magic'\]"),
        (dict(lengths=[1024, 16384]), "16384 tokens do not fit into the model's 8192 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            make(setting, **changes)
    model, tokenizer, haystack = setting
    with pytest.raises(ValueError, match="at least one adapter"):
        Evaluation(model, tokenizer, [], haystack, ["plain"], [1024])


@settings(deadline=None)
@given(st.integers(1, 200), st.data())
def test_wilsons_interval_solves_its_equation(n, data):
    right = data.draw(st.integers(0, n))
    scores = Scores(right=[True] * right + [False] * (n - right))
    for bound in scores.accuracy_interval:
        assert -1e-9 <= bound <= 1 + 1e-9
        assert (scores.accuracy - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / n, abs=1e-9)


def row(task, method, value, routers=None, length=4096, sparsity=0.5):
    measured = {"perplexity": value} if task == "plain" else {"accuracy": value}
    facts = dict(task=task, method=method, routers=routers, seq_len=length, n=10, sparsity=sparsity)
    return {**facts, **measured, "low": value - 0.1, "high": value + 0.1, "fa_rate": {"0": 0.25, "3": 1.0}}


def sem(values):
    return values.std(ddof=1) / math.sqrt(len(values))


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_differences_are_those_of_a_paired_test(n, seed):
    random = np.random.default_rng(seed)
    answers = random.integers(0, 2, (2, 2, n))  # method, family, sample
    nats = random.normal(1.0, 0.5, (2, n))
    methods = [
        [{"task": task, "scores": answers[method, place].tolist()} for place, task in enumerate(("copy", "count"))]
        + [{"task": "plain", "scores": nats[method].tolist()}]
        for method in range(2)
    ]
    (points, width), (ratio, spread) = difference(*methods)
    assert points == pytest.approx(100 * (answers[0].mean() - answers[1].mean()))
    # The mean of two families has the variance of their sum over four. Half a sample of each kind, written as whole
    # ones of a test twice as large.
    errors = []
    for change in answers[0] - answers[1]:
        padded = np.concatenate([change, change, [1, -1, 0, 0]])
        errors.append(padded.std() / math.sqrt(n + 2))
    assert width == pytest.approx(196 * np.hypot(*errors) / 2)
    assert ratio == pytest.approx(np.exp(nats[0].mean()) / np.exp(nats[1].mean()))
    assert spread == pytest.approx(ratio * 1.96 * sem(nats[0] - nats[1]))
    assert difference(methods[0], [{"task": "copy", "accuracy": 0.5}]) == (None, None)
    assert difference(methods[0], [{"task": "copy", "scores": [1]}]) == (None, None)
    alike, width = difference([{"task": "copy", "scores": [1] * n}], [{"task": "copy", "scores": [1] * n}])[0]
    assert alike == 0.0 and width == pytest.approx(196 / (n + 2))


def test_what_is_set_beside_what(setting):
    rows = list(make(setting, samples=2).rows())
    assert all(len(row["scores"]) == 2 for row in rows)
    found = [tuple(line[:2]) for line in comparisons(rows)]
    assert found == [
        ("sparse", "dense"),
        ("routed (routers)", "dense"),
        ("routed (routers)", "static (routers)"),
        ("routed (routers)", "random (routers)"),
        ("static (routers)", "dense"),
        ("random (routers)", "dense"),
    ]
    assert comparisons([row("copy", "dense", 0.5), row("copy", "routed", 0.5, "a")]) == []


def test_the_report_shows_every_number(tmp_path):
    rows = [row("copy", "dense", 0.875, sparsity=0.0), row("plain", "dense", 3.125, sparsity=0.0)]
    rows += [row("copy", "routed", 0.75, "a/<x>"), row("plain", "routed", 3.25, "a/<x>")]
    rows += [row("copy", "routed", 0.5, "a/y"), row("copy", "static", 0.25, "a/y")]
    assert short_names(rows) == {"a/<x>": "<x>", "a/y": "y"}
    assert short_names([*rows, row("copy", "routed", 0.5, "b/y")])["b/y"] == "b/y"
    path = tmp_path / "quality.json"
    path.write_text(json.dumps({"meta": {"device": "cpu", "settings": {"samples": 10}}, "rows": rows}))
    page, markdown = write_report(path, tmp_path / "out")
    page, markdown = page.read_text(), markdown.read_text()
    for number in ("0.875", "3.125", "0.750", "3.250", "0.500", "0.250"):
        assert number in page and number in markdown
    assert "routed (&lt;x&gt;)" in page and "<x>" not in page
    outside = r"""(src|href)\s*=\s*["'](?!#|data:)|url\((?!#)|@import|<script|<link"""
    assert re.findall(outside, page) == []
    for figure in re.findall(r"<svg.*?</svg>", page, re.S):
        xml.dom.minidom.parseString(figure)
    assert page.count("<svg") == 3 and "currentColor" in page and "prefers-color-scheme: dark" in page
    dense = next(each for each in summary(rows) if each["method"] == "dense")
    assert (dense["accuracy"], dense["perplexity"], dense["sparsity"]) == (0.875, 3.125, 0.0)
    path.write_text(json.dumps({"meta": {}, "rows": []}))
    with pytest.raises(ValueError, match="no quality rows"):
        write_report(path, tmp_path)


def test_the_heat_map_of_heads_has_their_layers():
    rows = [
        {**row(task, "head", 0.5, "x"), "fa_rate": rates}
        for task, rates in (
            ("copy", {"2.0": 1.0, "2.1": 0.0, "5.0": 0.25, "5.1": 0.25}),
            ("plain", {"2.0": 0.0, "2.1": 0.0, "5.0": 1.0, "5.1": 0.5}),
        )
    ]
    axes = heat_map(rows, 4096, "x").axes[0]
    assert axes.images[0].get_array().tolist() == [[0.5, 0.25], [0.0, 0.75]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "5"]


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


def _script(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_study_shows_seeds_and_differences(monkeypatch, capsys):
    """Three seeds of one target, each beside the static layers chosen for it, and beside heads of one seed."""
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(root / "benchmarks")
    show = _script(root / "benchmarks/show_quality.py", "show_quality")

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
    show.differences(every, 4096)
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    found = {(line[0].strip("| "), line[1]): line[2] for line in lines[3:]}
    assert found["routed (0.65)", "dense"] == "-20.0 (-30.0 to -10.0)"
    assert found["routed (0.65)", "static (0.65)"] == "+26.7 (+10.0 to +40.0)"
    assert found["routed (0.65)", "best-static (0.65)"] == "+20.0 (+10.0 to +30.0)"
    assert found["routed (0.65)", "head (0.65)"] == "+0.0 (-10.0 to +10.0)"
    assert found["head (0.65)", "dense"] == "-20.0"
    assert found["routed (0.65)", "best-static-fewer (0.65)"] == "+60.0 (+50.0 to +70.0)"
    show.at_equal_sparsity(every, 4096)  # half of the inputs with 6 of 10 right, half with 2
    line = "0.700 (0.700 to 0.700) | 0.800 (0.700 to 0.900) | 0.400 (0.400 to 0.400) | +40.0 (+30.0 to +50.0) |"
    assert f"| routed (0.65), all inputs | {line}" in capsys.readouterr().out
    show.at_equal_sparsity([{**row, "sparsity": 0.9} if row["routers"] == names[1] else row for row in every], 4096)
    assert "| 0.700 (0.700 to 0.700) | 0.800 (0.700 to 0.900) |" in capsys.readouterr().out  # a seed beyond both sets
    (mean,) = [row for row in show.seeds_as_one(every) if (row["method"], row["task"]) == ("routed", "count")]
    assert mean["accuracy"] == pytest.approx(0.8)


def test_parts_of_the_study_are_merged_if_measured_alike(tmp_path, monkeypatch):
    study = _script(Path(__file__).parents[1] / "recipes/study/run.py", "study")
    monkeypatch.setattr(study, "write_report", lambda path, folder: (path, path))
    settings = dict(
        adapters=[], model="m", dtype="bfloat16", samples=2, calibration=1, text="t", families=["count"], lengths=[1024]
    )
    meta = dict(device="a", torch="1", transformers="1", commit="c", settings=settings)
    row = dict(task="count", seq_len=4096, sparsity=0.0, n=2, accuracy=0.5)
    for name, commit, rows in (
        ("one", "c", [dict(row, method="dense", routers=None), dict(row, method="routed", routers="one")]),
        ("two", "c", [dict(row, method="dense", routers=None), dict(row, method="routed", routers="two")]),
        ("other", "d", [dict(row, method=m, routers=r) for m, r in (("dense", None), ("routed", "other"))]),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({"meta": {**meta, "commit": commit}, "rows": rows}))
    parts = [tmp_path / "one.json", tmp_path / "two.json"]
    study.merge(parts, tmp_path / "all.json")
    assert len(json.loads((tmp_path / "all.json").read_text())["rows"]) == 3
    study.merge([*parts, tmp_path / "other.json"], tmp_path / "all.json")
    rows = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert {row["routers"]: row.get("commit") for row in rows} == {None: None, "one": None, "two": None, "other": "d"}
    for fact, value, found in (("samples", 3, r"\['2', '3'\]"), ("model", "n", r"\['m', 'n'\]")):
        more = {"meta": {**meta, "settings": {**settings, fact: value}}, "rows": []}
        (tmp_path / "more.json").write_text(json.dumps(more))
        with pytest.raises(SystemExit, match=f"measured with {fact} {found}"):
            study.merge([*parts, tmp_path / "more.json"], tmp_path / "all.json")
