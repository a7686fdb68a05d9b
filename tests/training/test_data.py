"""Sources of a recipe: files, datasets, generated questions."""

import json

import pytest
from helpers.training import record

from flux_attention.errors import DataError
from flux_attention.training import RecipeError, load_data
from flux_attention.training.records import PLAIN


def test_sources_that_cannot_be_read_are_named(recipe, tokenizer, tmp_path):
    for source, error, message in (
        ({"path": str(tmp_path / "none.jsonl")}, DataError, "cannot read .*none.jsonl: No such file"),
        ({"path": str(tmp_path / "none.parquet")}, DataError, "cannot read .*none.parquet"),
        ({"file": "x"}, RecipeError, "neither of"),
        ({"path": "x.jsonl", "lines": 3}, RecipeError, r"unknown keys \['lines'\]"),
        ({"generated": 0, "tasks": {}}, RecipeError, "how many sequences"),
        ({"generated": 5}, RecipeError, "have no target"),
        ({"generated": 5, "tasks": None}, RecipeError, "tasks is None, expected dict"),
        (
            {"generated": 5, "tasks": {"plain": "Code"}, "lengths": ["a"]},
            RecipeError,
            "expected a list of whole numbers",
        ),
        ({"generated": 5, "tasks": {"poems": PLAIN}}, RecipeError, r"unknown families \['poems'\]"),
        ({"generated": 5, "tasks": []}, RecipeError, r"tasks is \[\], expected dict"),
        ({"generated": 5, "tasks": {}}, RecipeError, "of 0 families"),
        (
            {"generated": 5, "tasks": {"multi_key": PLAIN}, "lengths": [256], "max_chars": 10**5},
            ValueError,
            "cannot hold",
        ),
        ({"path": "x.jsonl", "limit": "2"}, RecipeError, "limit is '2'"),
        ({"path": "x.jsonl", "limit": 0}, RecipeError, "limit is 0"),
        ({"path": "x.jsonl", "chat_template": "no"}, RecipeError, "chat_template is 'no'"),
    ):
        recipe.data, recipe.max_length = [source], 512
        with pytest.raises(error, match=message):
            load_data(recipe, tokenizer)
    recipe.data = []
    with pytest.raises(DataError, match="there is no data"):
        load_data(recipe, tokenizer)


def test_parquet_gives_the_same_sequences(recipe, tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    records = [record(("Single QA", "Code")[i % 2], i) for i in range(5)] + [{"text": "import os\n" * 20}]
    columns = dict.fromkeys([*records[0], "text"])  # which every row has
    datasets.Dataset.from_list([{**columns, **one} for one in records]).to_parquet(tmp_path / "d.parquet")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    found = []
    for name in ("d.parquet", "d.jsonl"):
        recipe.data = [{"path": str(tmp_path / name)}]
        data, report = load_data(recipe, tokenizer)
        found.append([(number, e.input_ids.tolist(), e.task) for items in data for number, e in items])
    assert found[0] == found[1] and len(found[0]) == 6


def test_a_dataset_is_read_by_name_and_split(recipe, tokenizer, tmp_path, monkeypatch):
    """A folder as the Hub holds one: configurations in the card, a file for each split."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "questions"
    folder.mkdir()
    files = [("qa", "train", 3), ("qa", "validation", 2), ("code", "train", 4)]
    card = "---\nconfigs:\n"
    for name in ("qa", "code"):
        card += f"- config_name: {name}\n  data_files:\n"
        card += "".join(f"  - {{split: {s}, path: {n}-{s}.jsonl}}\n" for n, s, _ in files if n == name)
    (folder / "README.md").write_text(f"{card}---\n")
    for name, split, count in files:
        lines = [json.dumps(record("Single QA" if name == "qa" else "Code", i)) for i in range(count)]
        (folder / f"{name}-{split}.jsonl").write_text("\n".join(lines))
    for source, tasks in (
        ({"name": "qa"}, {"Single QA": 3}),
        ({"name": "qa", "split": "validation"}, {"Single QA": 2}),
        ({"name": "code", "split": "train[:50%]"}, {"Code": 2}),
    ):
        recipe.data = [{"path": str(folder), **source}]
        data, report = load_data(recipe, tokenizer)
        assert report.tasks == tasks and not report.malformed
    for source, message in (({"name": "poems"}, "poems"), ({"name": "qa", "split": "test"}, "test")):
        recipe.data = [{"path": str(folder), **source}]
        with pytest.raises(DataError, match=f"cannot read .*questions.*{message}"):
            load_data(recipe, tokenizer)
