"""Where block-sparse prefill begins to be faster, and that the rule for short prompts says so."""

import importlib
import json
from pathlib import Path

from flux_attention.kernels.dispatch import BLOCK_SPARSE_FROM

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def row(length, speedup, baseline="own-dense"):
    """Of one millisecond at two fifths of the blocks."""
    return dict(
        seq_len=length, search_ms=0.2, attend_ms=0.4, density=0.2, baseline_ms_min=speedup, baseline=baseline
    )  # fmt: skip


def test_the_rule_begins_where_all_longer_prompts_are_faster(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    faster_from = importlib.import_module("show_blocks").faster_from
    rows = [row(1, 1.2), row(2, 0.9), row(8, 2.0), row(4, 1.1), row(4, 1.3)]
    assert faster_from(rows) == 4
    assert faster_from([*rows, row(4, 0.99)]) == 8  # at another density
    assert faster_from([*rows, row(16, 1.0)]) is None
    assert faster_from([row(8, 2.0, "sdpa-cudnn")]) is None  # full layers run something faster


def test_the_rule_is_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    faster_from = importlib.import_module("show_blocks").faster_from
    found = json.loads((BENCHMARKS / "results/blocks.json").read_text())
    assert BLOCK_SPARSE_FROM[found["meta"]["device"]] == faster_from(found["rows"])
