"""Tensor parallelism: all processes decide the routes of one, and compute its output."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import IS_OLD, tiny_model

SCRIPT = Path(__file__).with_name("tensor_parallel_on_cpu.py")
#: Queries by a projection, by a norm of each head's, and of all heads', which every process then has.
FAMILIES = ("llama", "qwen3", "olmo2")


def test_two_processes_decide_as_one(tmp_path):
    """One start of the processes serves all families."""
    folders = {family: tmp_path / family for family in FAMILIES}
    for family, folder in folders.items():
        tiny_model(family).save_pretrained(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(SCRIPT)]
    command += map(str, folders.values())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{SCRIPT.parents[1]}:{':'.join(sys.path)}"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=False)
    refused = [folder / "refused" for folder in folders.values() if (folder / "refused").exists()]
    if refused and IS_OLD:
        pytest.skip(refused[0].read_text())
    assert not refused
    assert result.returncode == 0, result.stderr[-2000:]
    for family, folder in folders.items():
        check(family, *[json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)])


def check(family, first, second):
    """What each of two processes decided, alone and with the other."""
    assert first == second, family
    alone, shared = first
    routes = torch.tensor(alone["routes"])
    assert 0 < routes.float().mean() < 1 and (routes != routes[0]).any(), family
    for exact in ("sample", "routes", "tokens"):
        assert shared[exact] == alone[exact], family
    for close in ("router_logits", "logits"):
        torch.testing.assert_close(torch.tensor(shared[close]), torch.tensor(alone[close]), atol=2e-3, rtol=1e-3)
    assert not shared["captured"]
