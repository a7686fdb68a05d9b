"""What the prefill benchmark runs and compares; its timing is for GPUs."""

import pytest
import torch
from speed import model, timing

from flux_attention import kv_bytes
from flux_attention.patterns import Streaming
from flux_attention.sizes import SHAPES

SIZES = dict(
    vocab_size=500,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


@pytest.fixture
def measured(monkeypatch):
    """Rows of a tiny shape on the CPU, each run "taking" as long as its number of full layers; and what was run."""
    monkeypatch.setitem(SHAPES, "tiny", {**SHAPES["qwen3-8b"], **SIZES})
    monkeypatch.setattr(model, "require_gpu", lambda: None)
    monkeypatch.setattr(timing, "ceilings", lambda: {"matmul_tflops": 1.0})
    for name, value in (("empty_cache", None), ("reset_peak_memory_stats", None), ("max_memory_allocated", 7)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)

    full = []

    def count(cache):
        full.append(sum(True in layer.buffers for layer in cache.layers))
        return kv_bytes(cache)

    def in_turn(runs, before, **options):
        full.clear()
        for prepare, run in zip(before, runs, strict=True):
            prepare()
            run()
        return [{"ms": 10.0 + count, "ms_min": 10.0, "ms_max": 20.0, "repeats": 1} for count in full or [0] * len(runs)]

    monkeypatch.setattr(model, "measure_in_turn", in_turn)
    monkeypatch.setattr(model, "kv_bytes", count)
    return lambda *lengths, batches=(1,): list(model.prefill("tiny", lengths, batches, [0.5, 0.75], compile=False))


def test_routers_decide_what_is_forced_beside_them(measured, monkeypatch):
    monkeypatch.setattr(model, "PATTERN", Streaming(8, 16))
    rows = measured(64)
    assert [(row["method"], row["sparsity"], row["ms"]) for row in rows] == [
        ("dense", 0.0, 14.0),
        ("static", 0.5, 12.0),
        ("static", 0.75, 11.0),
        ("routed", 0.0, 14.0),
        ("routed", 0.5, 12.0),
        ("routed", 0.75, 11.0),
    ]
    assert {(row["baseline"], row["baseline_ms"], row["peak_bytes"]) for row in rows} == {("own-dense", 14.0, 7)}
    dense, sparse = rows[0]["kv_bytes"], rows[2]["kv_bytes"]
    assert dense == 4 * 64 * 4 * 2 * 16 and sparse == (64 + 3 * 24) * 4 * 2 * 16
    assert rows[5]["kv_bytes"] == sparse and rows[5]["floor_ms"] == rows[2]["floor_ms"] < rows[0]["floor_ms"]


def test_prompts_of_a_batch_and_no_more_than_fit(measured, monkeypatch):
    monkeypatch.setattr(model, "MAX_TOGETHER", 128)
    rows = measured(64, 256, batches=(1, 2, 3))
    assert [(row["batch"], row["seq_len"]) for row in rows[::6]] == [(1, 64), (1, 256), (2, 64)]
    one, two = rows[0], rows[12]
    assert two["kv_bytes"] == 2 * one["kv_bytes"] and two["floor_ms"] == pytest.approx(2 * one["floor_ms"], rel=1e-3)


def test_what_does_not_fit_is_a_row_of_its_own(measured, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model, "kv_bytes", full)
    rows = measured(64)
    assert {row["error"] for row in rows} == {"out of memory"} and len(rows) == 6


@pytest.mark.gpu
def test_a_decode_step_and_a_generated_token(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", {**SHAPES["qwen3-8b"], **SIZES, "head_dim": 64})
    rows = list(model.decode("tiny", [4096], [1, 2], [0.5], compile=False))
    assert [(row["batch"], row["sparsity"]) for row in rows] == [(1, 0.0), (1, 0.5), (2, 0.0), (2, 0.5)]
    assert all(row["ms"] > 0 and row["generate_ms"] > 0 for row in rows)
