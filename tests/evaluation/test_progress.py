"""How far an evaluation is: what is counted, and what is left out as it is there."""

import pytest
from helpers.models import randomize
from transformers import AutoModelForCausalLM, AutoTokenizer

from flux_attention import FluxConfig, attach
from flux_attention.evaluation.methods import METHODS, NATURAL_METHODS
from flux_attention.evaluation.progress import Tally
from flux_attention.evaluation.quality import Evaluation


def test_a_sample_of_twice_the_tokens_is_twice_the_work():
    told = []
    tally = Tally("answering", {100: 4, 200: 4}, lambda *far: told.append(far))
    tally.leave_out(2, 100)
    count = tally.start(100, "the first")
    count(2)
    tally.start(200, "the next")(4)
    assert told == [
        ("answering", 0, 6, "the first", 0.0),
        ("answering", 2, 6, "the first", 0.2),
        ("answering", 2, 6, "the next", 0.2),
        ("answering", 6, 6, "the next", 1.0),
    ]


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """A ranking, routers and routers by head for the tiny model, as folders."""
    model, folder = AutoModelForCausalLM.from_pretrained(base), tmp_path_factory.mktemp("adapters")
    kinds = dict(ranking=dict(ranking=(2, 0, 1), budget=0.34), routers={}, ends=dict(decide="ends"))
    for name, more in (kinds | dict(heads=dict(granularity="head"))).items():
        routing = attach(model, FluxConfig(sink=8, window=24, **more))
        if name != "ranking":
            randomize(routing)
        routing.save_pretrained(folder / name)
        routing.detach()
    return folder


@pytest.mark.parametrize(
    "names, methods, options",
    [
        ([], METHODS, dict(budgets=[0.34, 0.67], force=["0.5", "1"])),
        ([], ["dense", "static"], {}),
        (["ranking"], METHODS, dict(budgets=[0.34, 0.67])),
        (["ranking", "routers"], METHODS, {}),
        (["routers"], ["dense", "random"], {}),
        (["routers"], ["routed-ends"], {}),
        (["ends"], METHODS, {}),
    ],
)
def test_as_many_samples_are_counted_as_are_measured(base, adapters, names, methods, options):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    folders, config = [str(adapters / name) for name in names], None if names else FluxConfig(sink=8, window=24)
    sizes = dict(lengths=[64, 80], samples=2, calibration=1, config=config)
    evaluation = Evaluation(model, tokenizer, folders, None, ["prose"], methods=methods, **sizes, **options)
    told = []
    rows = list(evaluation.rows(progress=lambda what, *far: told.append(far) if what == "answering" else None))
    assert len(rows) == 2 * evaluation.kinds
    assert told[0][:2] == (0, 2 * len(rows)) and told[-1][:2] == (2 * len(rows), 2 * len(rows))
    assert told[-1][3] == 1.0
    again = list(evaluation.rows(rows, lambda *far: told.append(far)))
    assert again == rows and all(row["seconds"] > 0 for row in rows)
    assert all(row["kv_bytes"] <= row["baseline_kv_bytes"] for row in rows)


def test_heads_are_judged_by_what_they_generate(base, adapters):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    kinds = ["look_up", "prose"]
    sizes = dict(lengths=[256], samples=3, calibration=1, batch_size=3)
    evaluation = Evaluation(model, tokenizer, [str(adapters / "heads")], None, kinds, methods=NATURAL_METHODS, **sizes)
    rows = list(evaluation.rows())
    methods = ["dense", "sparse", "head", "head-static"]
    assert [(row["method"], row["task"]) for row in rows] == [(method, kind) for method in methods for kind in kinds]
    assert len(rows) == evaluation.kinds * len(kinds) and not any("kv_bytes" in row for row in rows)
    assert all("accuracy" in row for row in rows if row["task"] == "look_up")
    chosen = {str(row["fa_rate"]) for row in rows if row["method"] == "head-static"}
    assert len(chosen) == 1  # one set for every input
    assert list(evaluation.rows(rows)) == rows


def test_heads_are_counted_but_save_no_kv_cache(base, adapters, haystack):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    sizes = dict(lengths=[64], samples=2, calibration=1)
    evaluation = Evaluation(model, tokenizer, [str(adapters / "heads")], haystack, ["plain"], methods=METHODS, **sizes)
    rows = list(evaluation.rows())
    assert [row["method"] for row in rows] == ["dense", "sparse", "head", "head-static"]
    assert len(rows) == evaluation.kinds and not any("kv_bytes" in row for row in rows)
