"""Ranking layers and judging budgets: against the stock model under masks, interrupted runs, and rows made by hand."""

import json
from dataclasses import replace
from itertools import product
from statistics import fmean

import numpy as np
import pytest
import torch
from helpers.models import ids, tiny_model
from helpers.oracles import oracle_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_attention import CalibrationError, FluxConfig, attach
from flux_attention.calibration import calibrator
from flux_attention.calibration.calibrator import (
    Calibrator,
    answered,
    choose_budget,
    choose_threshold,
    dense_of,
    eliminate,
    threshold_rows,
)
from flux_attention.calibration.samples import CalibrationSet
from flux_attention.calibration.thresholds import LIMITS, by_threshold, of_layers
from flux_attention.patterns import BlockSparse, full_pattern, sparse_pattern
from flux_attention.tasks import generation
from flux_attention.tasks.questions import Question
from flux_attention.tasks.samples import Sample

CONFIG = FluxConfig(sink=4, window=9, pool_size=6)
LAYERS = 6


def model():
    return tiny_model("llama", num_hidden_layers=LAYERS)


def sample(seed, family, metric=None, length=60):
    question = metric and Question("", "?", "", ("x",), family, metric, f"class of {family}")
    return Sample(ids(1, length, seed)[0].numpy().astype(np.int32), [(50, length)], family, question or None)


def some_samples():
    ranked = [sample(seed, "first" if seed % 2 else "second") for seed in range(3)]
    judged = {"first": [sample(10, "first"), sample(11, "first")], "second": [sample(12, "second")]}
    return CalibrationSet(ranked, judged, dict(length=60))


def calibrator_of(model, samples=None, **options):
    return Calibrator(attach(model, CONFIG), None, samples or some_samples(), **options)


def expected_loss(stock, sample, full):
    """The answer's loss by the stock model, each layer under its pattern's dense mask."""
    (start, end), tokens = sample.answers[0], torch.from_numpy(sample.input_ids.astype(np.int64))[None]
    patterns = {True: full_pattern(CONFIG), False: sparse_pattern(CONFIG)}
    masks = {layer: patterns[layer in full].mask(len(sample.input_ids), start) for layer in range(LAYERS)}
    logits = oracle_logits(stock, tokens, masks)[0, start - 1 : end - 1]
    return torch.nn.functional.cross_entropy(logits, tokens[0, start:end]).item()


def oracle_ranking(stock, samples, removed):
    """Rank by backward elimination that takes out so many layers a round; losses are those of the stock model."""

    def loss(full):
        families = {}
        for each in samples.ranked:
            families.setdefault(each.family, []).append(expected_loss(stock, each, full))
        return fmean(map(fmean, families.values()))

    left, found = set(range(LAYERS)), []
    for count in removed:
        losses = {layer: loss(left - {layer}) for layer in left}
        cheap = sorted(left, key=losses.__getitem__)[:count]
        found += cheap
        left -= set(cheap)
    return found[::-1]


@pytest.mark.parametrize("rounds, removed", [(1, [6]), (2, [3, 3]), (4, [2, 1, 2, 1]), (6, [1] * 6), (8, [1] * 6)])
def test_layers_are_ranked_by_what_sparing_them_costs(rounds, removed):
    stock, samples = model(), some_samples()
    ranking = calibrator_of(model()).rank(rounds)
    assert list(ranking) == oracle_ranking(stock, samples, removed)
    assert len(set(ranking)) == LAYERS and list(ranking) != list(range(LAYERS))


def test_rounds_rank_layers_that_stand_in_for_each_other():
    asked = []

    def loss(full):
        asked.append(full)
        return 3.0 * (not {3, 5} & set(full)) + 1.0 * (8 not in full) + 0.1 * (9 not in full)

    layers = [3, 5, 8, 9]
    # Alone, neither 3 nor 5 is missed, so leave-one-out has them last; when one is out, the other one is needed most.
    assert eliminate(loss, layers, 1) == [8, 9, 3, 5] and len(asked) == 4
    assert eliminate(loss, layers, 4)[0] in (3, 5) and len(asked) == 4 + 4 + 3 + 2 + 1
    assert eliminate(loss, layers, 9) == eliminate(loss, layers, 4)


def test_budgets_are_judged_by_the_loss_of_nested_sets():
    stock = model()
    routed = calibrator_of(model())
    ranking = (4, 1, 0, 5, 3, 2)
    rows = routed.judge(ranking)
    sets = {}
    for row in rows:
        assert row["full_layers"] == sorted(ranking[: len(row["full_layers"])])
        assert row["sparsity"] == 1 - len(row["full_layers"]) / LAYERS and row["accuracy"] is None
        sets.setdefault(len(row["full_layers"]), set()).add(row["task"])
        judged = routed.samples.judged[row["task"]]
        losses = [expected_loss(stock, each, set(row["full_layers"])) for each in judged]
        assert row["nats"] == pytest.approx(fmean(losses), abs=2e-4) and row["n"] == len(losses)
    assert sets == {count: {"first", "second"} for count in (6, 5, 4, 3, 2, 1, 0)}


class Stop(BaseException):
    pass


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    whole = calibrator_of(model(), folder=tmp_path / "whole")
    expected_ranking = whole.rank(1)
    expected = whole.judge(expected_ranking)
    calls, evaluate = [], calibrator.evaluate

    def counted(*arguments, **options):
        calls.append(arguments)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(calibrator, "evaluate", counted)

    def stop_at(what, when):
        def progress(stage, done, total):
            if (stage, done) == (what, when):
                raise Stop

        return progress

    for what, when in (("ranking layers", 4), ("judging budgets", 3), (None, None)):
        stopped = calibrator_of(model(), folder=tmp_path / "parts", progress=stop_at(what, when))
        try:
            ranking = stopped.rank(1)
            rows = stopped.judge(ranking)
        except Stop:
            continue
    assert ranking == expected_ranking and rows == expected
    assert len(calls) == LAYERS + len(expected)
    calibrator_of(model(), folder=tmp_path / "parts", restart=True).rank(1)
    assert len(calls) == 2 * LAYERS + len(expected)


def test_figures_of_other_settings_are_not_mixed(tmp_path):
    calibrator_of(model(), folder=tmp_path).rank()
    other = CalibrationSet([], {}, dict(length=70))
    with pytest.raises(ValueError, match=r"holds results of other settings \(length, tokens\).*or --restart"):
        calibrator_of(model(), other, folder=tmp_path)
    samples = some_samples()
    other = CalibrationSet([*samples.ranked[:2], sample(99, "first")], samples.judged, samples.settings)
    with pytest.raises(ValueError, match=r"holds results of other settings \(tokens\)"):
        calibrator_of(model(), other, folder=tmp_path)


def test_what_dense_does_not_answer_is_refused_by_name(monkeypatch):
    judged = {name: [sample(20, name, "match")] for name in ("first", "second")}
    routed = calibrator_of(model(), CalibrationSet([], judged, {}))
    given = {"first": "x", "second": "no"}

    asked = []

    def generate(model, tokenizer, samples, *arguments, **options):
        asked.append((samples[0].family, len(options["routes"])))
        return type("Answers", (), dict(full=[], texts=[given[samples[0].family]]))

    monkeypatch.setattr(generation, "generate_answers", generate)
    rows = routed.judge(tuple(range(LAYERS)))
    assert answered(rows) == ["first"]
    assert asked == [("first", 6), ("second", 6), *(("first", count) for count in (5, 4, 3, 2, 1, 0))]
    given["first"] = "neither"
    routed.rows.clear()
    with pytest.raises(CalibrationError, match=r"answers none of the families.*first 0.00, second 0.00"):
        routed.judge_dense()


def test_families_that_dense_does_not_answer_do_not_rank(monkeypatch):
    judged = {"first": [sample(20, "first", "match")], "second": [sample(21, "second", "match")]}
    routed = calibrator_of(model(), CalibrationSet(some_samples().ranked, judged, {}))

    def generate(model, tokenizer, samples, *arguments, **options):
        return type("Answers", (), dict(full=[], texts=["x" if samples[0].family == "first" else "no"]))

    monkeypatch.setattr(generation, "generate_answers", generate)
    both = routed.rank()
    routed.judge_dense()
    assert routed.counted == {"first"}
    stock, only = model(), next(each for each in routed.samples.ranked if each.family == "first")
    losses = {layer: expected_loss(stock, only, set(range(LAYERS)) - {layer}) for layer in range(LAYERS)}
    assert list(routed.rank(1)) == sorted(losses, key=losses.__getitem__, reverse=True) != list(both)


def test_losses_that_are_no_numbers_are_refused():
    broken = model()
    broken.model.embed_tokens.weight.data[some_samples().ranked[0].input_ids[0]] = float("nan")
    with pytest.raises(CalibrationError, match="the loss of second is nan"):
        calibrator_of(broken).rank()


def test_figures_of_other_weights_are_not_mixed(tmp_path):
    calibrator_of(model(), folder=tmp_path).rank()
    other = model()
    other.model.layers[3].self_attn.v_proj.weight.data.mul_(-1)
    with pytest.raises(ValueError, match=r"holds results of other settings \(weights\)"):
        calibrator_of(other, folder=tmp_path)


BLOCKS = {"pattern": "block_sparse", "select": "mass", "from_tokens": 0}


def long_samples():
    """Of more than two blocks, so that some can be left out."""
    judged = {}
    for seed, family in enumerate(("first", "second")):
        made = sample(seed, family, length=420)
        judged[family] = [Sample(made.input_ids, [(400, 420)], family)]
    return CalibrationSet([some[0] for some in judged.values()], judged, dict(length=420))


def test_thresholds_are_judged_where_full_layers_are_block_sparse(monkeypatch, tmp_path):
    monkeypatch.setitem(calibrator.TRIED, "mass", (0.01, 0.6, 1.0))
    own, seen = {1: 0.6, 3: 1.0, 4: 0.01}, []
    monkeypatch.setattr(calibrator, "of_layers", lambda *found: seen.append(found) or [own])
    routed, full, told = calibrator_of(model(), long_samples(), folder=tmp_path), [1, 3, 4], []
    routed.progress = lambda *told_of: told.append(told_of)
    exact = routed.routing.full
    # On a GPU a prompt so short would attend exactly.
    pattern = BlockSparse(select="mass", from_tokens=10**6)
    rows = routed.judge_thresholds(full, pattern, [])
    assert routed.routing.full is exact and told[-1] == ("judging thresholds", 8, 8)
    named = {str(layer): value for layer, value in own.items()}
    expected = list(product((0.01, 0.6, 1.0, named), ("first", "second")))
    assert [(row["threshold"], row["task"]) for row in rows] == expected
    for row in rows:
        routing = attach(model(), replace(CONFIG, full={**BLOCKS, "threshold": row["threshold"]}))
        expected = calibrator.evaluate(routing.model, routed.samples.judged[row["task"]], routing, 1, full).nats
        assert row["nats"] == pytest.approx(expected[0], abs=1e-5) and row["full_layers"] == full
    least, more, most = ([row for row in rows if row["threshold"] == value] for value in (0.01, 0.6, 1.0))
    # Of ten causal blocks the diagonal and the first ones are in always.
    assert all(row["density"] == 0.7 for row in least) and all(row["density"] == 1.0 for row in most)
    assert all(0.7 <= row["density"] <= 1 for row in more)
    for row in most:
        judged = routed.samples.judged[row["task"]]
        assert row["nats"] == pytest.approx(expected_loss(model(), judged[0], set(full)), abs=2e-4)
    assert least[0]["nats"] != most[0]["nats"]
    # Of the layers alone: all of the others' blocks are selected here, which is exact attention.
    ((rises, tried),) = seen
    assert set(rises) == set(full) and tried == (0.01, 0.6, 1.0)
    for layer, threshold in product(full, tried):
        alone = {str(other): threshold if other == layer else 1.0 for other in full}
        routing = attach(model(), replace(CONFIG, full={**BLOCKS, "threshold": alone}))
        nats = calibrator.evaluate(routing.model, routed.samples.ranked, routing, 1, full).nats
        base = [expected_loss(model(), sample, set(full)) for sample in routed.samples.ranked]
        assert rises[layer][tried.index(threshold)] == pytest.approx(fmean(nats) - fmean(base), abs=2e-4)
    assert rises[4][0] != rises[3][0]

    monkeypatch.setattr(calibrator, "evaluate", None)  # all is there
    again = calibrator_of(model(), long_samples(), folder=tmp_path)
    assert again.judge_thresholds(full, pattern, []) == rows == threshold_rows(tmp_path, full, pattern)
    assert threshold_rows(tmp_path, full, BlockSparse()) == threshold_rows(tmp_path, [1, 3], pattern) == []


def test_answers_are_generated_with_what_is_judged(monkeypatch):
    asked = []

    def generate(model, tokenizer, samples, *arguments, **options):
        asked.append((samples[0].family, options["routing"].full.threshold, options["routes"]))
        return type("Answers", (), dict(full=[], texts=["x"]))

    monkeypatch.setattr(generation, "generate_answers", generate)
    monkeypatch.setitem(calibrator.TRIED, "maximum", (0.2, 0.1))
    judged = {name: [sample(20, name, "match")] for name in ("first", "second")}
    monkeypatch.setattr(calibrator, "of_layers", lambda *rises: [])
    made = CalibrationSet([sample(21, "second")], judged, {})
    rows = calibrator_of(model(), made).judge_thresholds([2, 0], BlockSparse(), ["first"])
    assert asked == [("first", 0.2, [0, 2]), ("first", 0.1, [0, 2])]
    assert [row["accuracy"] for row in rows] == [1.0, None] * 2


@pytest.mark.parametrize(
    "table, threshold",
    [
        ({0.2: {"a": (1.1, 1.0)}, 0.1: {"a": (1.04, 0.99)}, 0.05: {"a": (1.0, 1.0)}}, 0.1),
        ({0.2: {"a": (1.0, 0.9)}, 0.1: {"a": (1.0, 1.0)}}, 0.1),  # answers are lost
        ({0.2: {"a": (1.0, 1.0)}, 0.1: {"a": (1.2, 1.0)}}, 0.2),
        ({0.2: {"a": (1.2, 1.0)}, 0.1: {"a": (float("nan"), 1.0)}}, None),
    ],
)
def test_the_threshold_that_selects_fewest_blocks_and_loses_nothing_is_chosen(table, threshold):
    dense = rows_of({0: {"a": (1.0, 1.0), "b": (1.0, 0.1)}})
    table = {value: {**families, "b": (9.0, None)} for value, families in table.items()}  # b: dense does not answer it
    rows = [dict(row, threshold=row["sparsity"], density=1 - row["sparsity"]) for row in rows_of(table)]
    found = dense_of([*({**row, "sparsity": 0.5, "nats": 7.0} for row in dense), *dense], answered(dense))
    assert found == {"a": dense[0]}
    assert choose_threshold(rows, found, answered(dense), tolerance=0.05, max_lost=0.02) == threshold
    points = by_threshold(rows, found)
    assert [point["threshold"] for point in points] == list(table)
    nats, right = table[0.2]["a"]
    assert points[0] == dict(threshold=0.2, density=0.8, rise=nats - 1.0, accuracy=right)


def test_thresholds_by_layer_are_chosen_if_they_select_fewest_blocks():
    dense = rows_of({0: {"a": (1.0, 1.0)}})
    own = {"1": 0.2, "3": 0.05}
    row = rows_of({0.5: {"a": (1.0, 1.0)}})[0]
    rows = [dict(row, threshold=0.1, density=0.4), dict(row, threshold=own, density=0.3)]
    assert choose_threshold(rows, dense_of(dense, ["a"]), ["a"]) == own
    assert [point["threshold"] for point in by_threshold(rows, dense_of(dense, ["a"]))] == [0.1, own]
    rows[1]["nats"] = 2.0
    assert choose_threshold(rows, dense_of(dense, ["a"]), ["a"]) == 0.1


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from([-0.01, 0.0, 0.002, 0.02]), min_size=3, max_size=3), min_size=2, max_size=4))
def test_a_layers_threshold_selects_fewest_blocks_within_a_limit(rises):
    tried = (0.2, 0.1, 0.05)
    sets = [
        {
            layer: next((tried[i] for i in range(3) if max(mine[i:]) <= limit), tried[-1])
            for layer, mine in enumerate(rises)
        }
        for limit in LIMITS
    ]
    found = of_layers(dict(enumerate(rises)), tried)
    assert found == [some for i, some in enumerate(sets) if len(set(some.values())) > 1 and some not in sets[:i]]


def rows_of(table):
    """Rows from {budget: {family: (nats, accuracy)}}."""
    return [
        dict(task=task, sparsity=budget, nats=nats, accuracy=accuracy, metric="match",
             method="static-nll" if budget else "dense")
        for budget, families in table.items()
        for task, (nats, accuracy) in families.items()
    ]  # fmt: skip


@pytest.mark.parametrize(
    "table, budget",
    [
        # The loss falls while answers are lost.
        ({0: {"a": (1.0, 1.0)}, 0.5: {"a": (0.99, 0.99)}, 0.75: {"a": (0.9, 0.9)}}, 0.5),
        # Answers stay while a family's loss rises, be it one that no answers are asked of.
        ({0: {"a": (1.0, 1.0), "p": (3.0, None)}, 0.5: {"a": (1.0, 1.0), "p": (3.1, None)}}, 0),
        ({0: {"a": (1.0, 1.0), "p": (3.0, None)}, 0.5: {"a": (1.0, 1.0), "p": (3.04, None)}}, 0.5),
        # The mean over families counts, and families that dense does not answer do not.
        ({0: {"a": (1.0, 1.0), "b": (1.0, 0.9)}, 0.5: {"a": (1.0, 0.97), "b": (1.0, 0.92)}}, 0.5),
        ({0: {"a": (1.0, 1.0), "b": (1.0, 0.3)}, 0.5: {"a": (1.0, 1.0), "b": (9.0, None)}}, 0.5),
        # What is not a number loses.
        ({0: {"a": (1.0, 1.0)}, 0.5: {"a": (1.0, 1.0)}, 1.0: {"a": (float("nan"), 1.0)}}, 0.5),
        # A larger budget may be good where a smaller one was not.
        ({0: {"a": (1.0, 1.0)}, 0.5: {"a": (1.0, 0.9)}, 0.75: {"a": (1.0, 1.0)}}, 0.75),
    ],
)
def test_the_largest_budget_that_loses_nothing_is_chosen(table, budget):
    rows = rows_of(table)
    assert choose_budget(rows, answered(rows), tolerance=0.05, max_lost=0.02) == budget


def test_losses_of_reference_answers_are_not_mixed_with_those_of_own_ones(tmp_path):
    calibrator_of(model(), folder=tmp_path).rank(1)
    path = tmp_path / "calibration.json"
    written = json.loads(path.read_text())
    del written["meta"]["settings"]["answers"]  # as earlier versions wrote it
    path.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"holds results of other settings \(answers\)"):
        calibrator_of(model(), folder=tmp_path)
