"""Evaluations of a real model, merged from parts, and the tables made of them."""

import importlib
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from flux_attention import FluxConfig, attach
from flux_attention.evaluation.base import adapter_hash

FAMILIES = ["look_up", "worked_maths", "prose"]
META = dict(device="a GPU", torch="2", triton="3", transformers="5", commit="abc", date="2026-01-02")
PATTERN = {"sparse": {"pattern": "streaming", "sink": 8, "window": 24}, "full": {"pattern": "full"}}
#: Full layers of the tiny model's three, of each method.
LAYERS = {"dense": (0, 1, 2), "sparse": (), "static-nll": (2,), "routed": (0,), "routed-ends": (0,)}
LAYERS |= {"head": (0,), "head-static": (1,)}


@pytest.fixture
def merger(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("real_models")


@pytest.fixture
def show(monkeypatch, tmp_path, merger):
    """The module that makes the tables, and a function that merges folders into the file that they are made of."""
    module, tables = importlib.import_module("show_real"), importlib.import_module("show_tables")

    def from_folders(folders):
        rows, meta, _ = merger.merge(folders)
        result = {"meta": {**meta, "weights": "of the Hub"}, "rows": json.loads(json.dumps(rows))}
        for each in (module, tables):
            monkeypatch.setattr(each, "load", lambda name: result)
        return module

    return from_folders


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """A ranking and routers for the tiny model."""
    model, folder = AutoModelForCausalLM.from_pretrained(base), tmp_path_factory.mktemp("somewhere")
    kinds = (
        ("one", dict(ranking=(2, 0, 1), budget=0.0)),
        ("two", dict(pool_size=16)),
        ("heads", dict(granularity="head")),
    )
    for name, more in kinds:
        routing = attach(model, FluxConfig(sink=8, window=24, **more))
        routing.save_pretrained(folder / name)
        routing.detach()
    return folder


def scores(family, right):
    """Ten samples, of which so many are right; of prose nats that grow as answers get worse."""
    return (
        [2 - right / 10 + place / 100 for place in range(10)] if family == "prose" else [1] * right + [0] * (10 - right)
    )


def rows_of(method, right, adapter=None, length=4096, families=FAMILIES, **more):
    """Rows of a method, which answers as many look-ups as ``right`` says, and all of maths but one."""
    for family in families:
        found = scores(family, 9 if family == "worked_maths" else right)
        mean = sum(found) / 10
        yield {
            **dict(task=family, method=method, seq_len=length, routers=adapter, model="tiny", n=10),
            **dict(sparsity=round(1 - len(LAYERS[method]) / 3, 4), task_class=family, metric="match"),
            **({"perplexity": 2.0} if family == "prose" else {"accuracy": mean}),
            **dict(low=0, high=1, scores=found),
            "fa_rate": {str(layer): float(layer in LAYERS[method]) for layer in range(3)},
            **more,
        }


@pytest.fixture
def write(tmp_path, adapters):
    """A function that writes an evaluation's folder, as ``flux-attention eval`` does."""

    def to(name, rows, adapter=None, **changes):
        path, rows = None if adapter is None else str(adapters / adapter), list(rows)
        settings = {
            **dict(
                model="some/Tiny", dtype="bfloat16", device="a GPU", samples=10, calibration=8, chat=True, text="1f"
            ),
            "families": FAMILIES,
            "lengths": list(dict.fromkeys(row["seq_len"] for row in rows)),
            "adapters": [] if path is None else [[path, adapter_hash(path)]],
            **(PATTERN if path is None else {}),
        }
        meta = {**META, **{fact: changes.pop(fact) for fact in META if fact in changes}}
        data = {"meta": {**meta, "settings": {**settings, **changes}}, "rows": [{**r, "routers": path} for r in rows]}
        (tmp_path / name).mkdir()
        (tmp_path / name / "quality.json").write_text(json.dumps(data))
        return tmp_path / name

    return to


@pytest.fixture
def parts(write, adapters):
    """Folders of a whole evaluation: look-ups are answered by dense, worse by few full layers, not at all by none."""
    fixed = dict(budget=0.67, full_layers=[2])
    return [
        adapters / "one",
        write("routed", rows_of("routed", 8), "two"),
        write("ends", rows_of("routed-ends", 8), "two", date="2026-01-03"),
        write("dense", rows_of("dense", 10)),
        write("sparse", rows_of("sparse", 0)),
        write("fixed", rows_of("static-nll", 4, **fixed), "one"),
        adapters / "two",
    ]


def test_parts_become_one_file(merger, parts, write, adapters):
    fixed = dict(budget=0.9, full_layers=[])
    begun = write("begun", [*rows_of("static-nll", 1, families=FAMILIES[:2], **fixed)], "one")
    few = [{**row, "n": 9} if row["task"] == "prose" else row for row in rows_of("dense", 3, length=8192)]
    rows, meta, unfinished = merger.merge([*parts, begun, write("few", few)])
    assert [(row["method"], row["routers"]) for row in rows[::3]] == [
        ("dense", None),
        ("static-nll", "calibrated"),
        ("routed", "trained"),
        ("routed-ends", "trained"),
        ("sparse", None),
    ]
    assert [row["task"] for row in rows] == FAMILIES * 5
    assert unfinished == [
        "static-nll (calibrated) at 0.9, 4,096 tokens: 2 of 3 families",
        "dense, 8,192 tokens: 2 of 3 families",
    ]
    assert rows[3]["scores"] == [1] * 4 + [0] * 6
    assert ["fa_rate" in row for row in rows[::3]] == [False, False, True, True, False]
    assert {fact: meta[fact] for fact in META} == {**META, "date": "2026-01-03"}
    assert meta["adapters"]["calibrated"]["ranking"] == [2, 0, 1] and meta["adapters"]["trained"]["decide"] == "prefill"
    assert meta["settings"]["sparse"] == PATTERN["sparse"] and meta["settings"]["samples"] == {"4096": 10, "8192": 10}
    assert str(adapters) not in json.dumps([rows, meta])  # it says what adapters are, not where they lay


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"text": "2e"}, "differ in text"),
        ({"chat": False}, "differ in chat"),
        ({"families": FAMILIES[:2]}, "differ in families"),
        ({"sparse": {**PATTERN["sparse"], "window": 16}}, "differ in sparse"),
        ({"samples": 12}, "has 12 samples of 4,096 tokens, but 10 are expected"),
        ({}, "look_up by dense a second time"),
    ],
)
def test_parts_of_other_samples_are_refused(merger, parts, write, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        merger.merge([*parts, write("other", rows_of("dense", 10), **changes)])


def test_rows_of_another_commit_name_it_and_adapters_have_names_of_ones_own(merger, parts, write, adapters):
    later = write("later", rows_of("static-nll", 4, budget=0.33, full_layers=[2, 0]), "one", commit="def")
    rows, meta, _ = merger.merge([*parts[1:-1], f"by need={adapters / 'one'}", later, parts[-1]])
    assert meta["commit"] == "abc" and "by need" in meta["adapters"]
    commits = {(row["method"], row.get("budget")): row.get("commit") for row in rows}
    assert commits["static-nll", 0.33] == "def" and commits["static-nll", 0.67] is commits["dense", None] is None


def test_an_adapter_has_to_be_there(merger, parts):
    with pytest.raises(ValueError, match="judged an adapter of no folder that was named"):
        merger.merge(parts[:-1])


def test_tables_say_what_was_reached(show, parts):
    made = show(parts)
    lines = [line.split(" | ") for line in made.aims().splitlines()[2:]]
    assert [line[-1].split(":")[0] for line in lines] == ["**no**", "**no**", "yes", "yes"]
    # Of two kinds of questions, one is as with dense: 4 and 8 of 10 look-ups are 30 and 10 points less in all.
    cells = [line[-1].split(" ±")[0].split(": ")[1] for line in lines]
    assert cells == ["−30.0", "−10.0", "+40.0", "+0.0"]
    assert "30 of 30 scores are the same" in lines[3][-1]
    text = made.length_tables()
    assert "lose nothing beyond chance: worked maths." in text
    found = {tuple(line.split(" | ")[:2]): line.split(" | ")[2:5] for line in text.splitlines() if " ± " in line}
    assert set(found) == {
        *((f"| {method}", "dense") for method in ("routed (trained)", "routed-ends (trained)", "sparse")),
        ("| static-nll (calibrated) at 0.67", "dense"),
        ("| routed-ends (trained)", "routed (trained)"),
        *((f"| {method} (trained)", "static-nll (calibrated) at 0.67") for method in ("routed", "routed-ends")),
    }
    some = found["| routed (trained)", "static-nll (calibrated) at 0.67"]
    assert [cell.split(" ±")[0] for cell in some] == [
        "+20.0",
        "+40.0",
        "+40.0",
    ]  # all, look-ups, those that need layers


def change(folder, **facts):
    """Give all rows of an evaluation other facts."""
    path = folder / "quality.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "rows": [{**row, **facts} for row in data["rows"]]}))


def test_sets_of_other_sparsity_are_not_set_beside_routers(show, parts):
    change(parts[5], sparsity=0.6)
    made = show(parts)
    assert "routed (trained) | static-nll" not in made.length_tables()
    assert made.aims().splitlines()[4].endswith("| not measured |")


def test_the_aim_at_sparsity_is_missed_by_less_sparse_routes(show, parts, write):
    better = [parts[0], write("better", rows_of("routed", 10), "two"), *parts[3:]]
    assert "| yes: +0.0" in show(better).aims().splitlines()[3]
    change(better[1], sparsity=0.625)
    assert "| **no**: +0.0" in show(better).aims().splitlines()[3]


def test_routes_are_told_apart_by_kind_where_they_differ(show, parts):
    made = show(parts)
    assert "| routed (trained) | all | 0 | 0.34 |" in made.route_table()
    assert (
        "| dense | all | all | 1.00 |" in made.route_table() and "| sparse | all | none | 0.01 |" in made.route_table()
    )
    assert "Calibrated: layers by need are 2, 0, 1. The default budget is 0." in made.route_table()
    data = json.loads((parts[1] / "quality.json").read_text())
    data["rows"][0]["fa_rate"] = {"0": 1.0, "1": 0.25, "2": 0.0}
    (parts[1] / "quality.json").write_text(json.dumps(data))
    text = show(parts).route_table()
    assert "| routed (trained) | 4,096 tokens: look up | 0, 1 (25%) |" in text
    assert "| routed (trained) | 4,096 tokens: worked maths, prose | 0 |" in text


def test_heads_are_named_with_their_layers_and_keep_a_dense_cache(show, parts, write, adapters):
    def halves(method, layer):
        rates = {f"{each}.{head}": float(each == layer or head == 1) for each in range(3) for head in range(2)}
        return rows_of(method, 8, fa_rate=rates)

    some = [*halves("head", 0), *halves("head-static", 1)]
    made = show([*parts, adapters / "heads", write("by-head", some, "heads")])
    assert "| head (trained by head) | all | 0.0, 0.1, 1.1, 2.1 | 1.00 |" in made.route_table()
    assert "| head-static (trained by head) | all | 0.1, 1.0, 1.1, 2.1 | 1.00 |" in made.route_table()
    assert "| head (trained by head) | head-static (trained by head) | +0.0" in made.length_tables()
