"""What tells rows of block-sparse quality apart, and what the page makes of them."""

import importlib
import json
from pathlib import Path

import pytest

from flux_attention.kernels.block_sparse import FIRST, LAST
from flux_attention.patterns.block_sparse import BlockSparse
from flux_attention.results import begun_rows, write_results

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FACTS = dict(model="m/One-0.5B", seq_len=16384, n=2, sparsity=0.0, text="abc")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def exact(task, scores, **facts):
    return dict(FACTS, task=task, full="full", accuracy=sum(scores) / len(scores), scores=scores, **facts)


def selected(task, scores, threshold=0.1, always=(1, 2), **facts):
    rule = dict(select="maximum", threshold=threshold, stride=16, correct=False, always=list(always))
    return exact(task, scores) | rule | dict(full="block_sparse", density=0.2, recall=0.9, output_error=0.1) | facts


def test_rows_are_told_apart_by_what_selects_and_of_which_texts(bench):
    identity = bench("block_quality").identity
    row = selected("look_up", [1, 0])
    assert identity(row) == identity({**row, "accuracy": 0.9, "watched": 1})
    others = dict(n=3, text="abd", routers="r", task="place", threshold="own", stride=8, correct=True, always=[2, 4])
    assert len({identity(row), *(identity({**row, key: value}) for key, value in others.items())}) == 1 + len(others)


def test_the_table_sets_rows_of_todays_rule_beside_exact_ones_of_the_same_texts(bench, monkeypatch):
    show = bench("show_blocks")
    rows = [
        exact("look_up", [1, 1]), exact("place", [1, 1]), exact("look_up", [0, 0], text="abd"),
        selected("look_up", [1, 0]), selected("place", [1, 1]), selected("look_up", [1, 1], text="abd"),
        selected("look_up", [0, 0], always=(2, 4)), selected("look_up", [1, 1], stride=8, correct=True),
    ]  # fmt: skip
    monkeypatch.setattr(show, "load", lambda name: {"rows": rows})

    def told(table):
        lines = [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if "One" in line]
        return sorted((cells[3], cells[7].split(" ±")[0], cells[7].partition("(")[2]) for cells in lines)

    assert told(show.quality_table()) == [
        ("maximum, 0.1", "+100.0", "1 kind)"), ("maximum, 0.1", "−25.0", "2 kinds)"),
        ("maximum, 0.1, stride 8, corrected", "+0.0", "1 kind)"),
    ]  # fmt: skip


def test_what_readme_says_is_of_one_rule(bench):
    show = bench("show_blocks")
    found = json.loads((BENCHMARKS / "results/block_quality.json").read_text())["rows"]
    mine = [row for row in found if show.BESIDE.items() <= row.items() and row["full"] == "block_sparse"]
    pattern = BlockSparse()  # by default
    assert {(row["select"], row["threshold"]) for row in mine} == {(pattern.select, pattern.threshold)}
    assert [row["always"] for row in mine] == 5 * [[FIRST, LAST]]
    blocks = 20 * sum(row["density"] for row in mine)
    assert f"{blocks:.0f} % of the others' blocks" in show.beside_routing()


def test_a_file_of_other_settings_is_refused_with_what_can_be_done(tmp_path):
    path = tmp_path / "rows.json"
    write_results(path, [], settings={"dtype": "float32"})
    with pytest.raises(ValueError, match=r"other settings \(dtype\): name another file$"):
        begun_rows(path, {"dtype": "bfloat16"}, remedy="name another file")
