"""``flux-attention bench``: result files that grow, what is refused, and where it runs."""

import json

import pytest
import torch
from helpers.command import flux

import flux_attention

MEMORY = ("bench", "memory", "--lengths", "1K", "--sparsities", "0")
TOKEN = 2 * 8 * 128 * 2  # K and V, KV heads, head dim, bf16


def rows_in(folder):
    return json.loads((folder / "memory.json").read_text())["rows"]


def test_memory_is_counted_by_arithmetic(tmp_path):
    result = flux("bench", "memory", "--lengths", "1K,128K", "--sparsities", "0,0.75", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    rows = rows_in(tmp_path)
    assert [(row["seq_len"], row["sparsity"]) for row in rows] == [(1024, 0), (131072, 0), (1024, 0.75), (131072, 0.75)]
    assert rows[1]["kv_bytes"] == rows[1]["baseline_kv_bytes"] == 36 * 131072 * TOKEN
    assert rows[3]["kv_bytes"] == (9 * 131072 + 27 * 1152) * TOKEN
    assert rows[3]["longest_context"] > 3.9 * rows[1]["longest_context"]
    assert f"kv_bytes {rows[3]['kv_bytes']}" in result.stdout


def test_what_is_not_measured_again_is_kept(tmp_path):
    rows = []
    for shape in ("qwen3-8b", "llama-3.1-8b", "qwen3-8b"):
        result = flux(*MEMORY, "--shapes", shape, "--output", str(tmp_path))
        assert result.returncode == 0, result.stderr
        kept, rows = [row for row in rows if row["shape"] != shape], rows_in(tmp_path)
        assert rows[:-1] == kept and rows[-1]["shape"] == shape
    assert len(rows) == 2
    results = json.loads((tmp_path / "memory.json").read_text())
    results["meta"]["commit"] = "another"
    for text in (json.dumps(results), json.dumps(results)[:100]):  # of another commit, damaged
        (tmp_path / "memory.json").write_text(text)
        assert flux(*MEMORY, "--shapes", "llama-3.1-8b", "--output", str(tmp_path)).returncode == 0
        assert len(rows_in(tmp_path)) == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nothing"], "cannot measure"),
        (["memory", "--shapes", "gpt-5"], "unknown shapes"),
        (["memory", "--lengths", "long"], "not a list of numbers"),
        (["memory", "--lengths", ""], "not a list of numbers"),
        (["memory", "--sparsities", "2"], "not between 0 and 1"),
        (["memory", "--output", __file__], "test_speed_bench.py"),
    ],
)
def test_wrong_requests_are_one_line(arguments, words):
    result = flux("bench", *arguments)
    assert result.returncode == 1 and words in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_speed_needs_a_gpu():
    result = flux("bench", "prefill")
    assert result.returncode == 1 and "NVIDIA GPU" in result.stderr


def test_an_installed_package_says_what_to_do(monkeypatch, tmp_path):
    """There it lies in site-packages, and benchmarks/ nowhere."""
    installed = tmp_path / "lib/python3/site-packages/flux_attention"
    monkeypatch.setattr(flux_attention, "__path__", [str(installed), *flux_attention.__path__])
    result = flux(*MEMORY)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert "clone the repository" in result.stderr and "pip install -e ." in result.stderr
