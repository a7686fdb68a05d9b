"""Measurements that need no GPU, and files that grow."""

import json

import pytest
import torch
from command import flux


def test_bench(tmp_path):
    result = flux("bench", "memory", "--lengths", "1K,128K", "--sparsities", "0,0.75", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert [(row["seq_len"], row["sparsity"]) for row in rows] == [(1024, 0), (131072, 0), (1024, 0.75), (131072, 0.75)]
    token = 2 * 8 * 128 * 2  # K and V, KV heads, head dim, bf16
    assert rows[1]["kv_bytes"] == rows[1]["baseline_kv_bytes"] == 36 * 131072 * token
    assert rows[3]["kv_bytes"] == (9 * 131072 + 27 * 1152) * token
    assert rows[3]["longest_context"] > 3.9 * rows[1]["longest_context"]
    more = ["bench", "memory", "--lengths", "1K", "--sparsities", "0", "--output", str(tmp_path)]
    kept = {"llama-3.1-8b": rows, "qwen3-8b": rows[1:]}  # what was not measured again
    for shape, others in kept.items():
        result = flux(*more, "--shapes", shape)
        assert result.returncode == 0, result.stderr
        now = json.loads((tmp_path / "memory.json").read_text())["rows"]
        assert now[: len(others)] == others and now[-1]["shape"] == shape
    assert len(now) == len(rows) + 1
    results = json.loads((tmp_path / "memory.json").read_text())
    results["meta"]["commit"] = "another"
    for text in (json.dumps(results), json.dumps(results)[:100]):
        (tmp_path / "memory.json").write_text(text)
        assert flux(*more, "--shapes", "llama-3.1-8b").returncode == 0
        assert len(json.loads((tmp_path / "memory.json").read_text())["rows"]) == 1
    for arguments, words in (
        (["nothing"], "cannot measure"),
        (["memory", "--shapes", "gpt-5"], "unknown shapes"),
        (["memory", "--lengths", "long"], "not a list of numbers"),
        (["memory", "--lengths", ""], "not a list of numbers"),
        (["memory", "--sparsities", "2"], "not between 0 and 1"),
        (["memory", "--output", __file__], "cannot write into"),
    ):
        result = flux("bench", *arguments)
        assert result.returncode == 1 and words in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_needs_a_gpu():
    result = flux("bench", "prefill")
    assert result.returncode == 1 and "NVIDIA GPU" in result.stderr
