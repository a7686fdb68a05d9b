"""The study's script."""

import importlib.util
import json
from pathlib import Path

import pytest


def test_parts_of_the_study_are_merged_if_measured_alike(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("study", Path(__file__).parents[2] / "recipes/study/run.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
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
