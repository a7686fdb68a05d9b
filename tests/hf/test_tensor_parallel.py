"""Tensor parallelism: all processes decide the routes of one, and compute its output."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_model

SCRIPT = Path(__file__).with_name("tensor_parallel_on_cpu.py")


# Queries by a projection, by a norm of each head's, and of all heads', which every process then has.
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_two_processes_decide_as_one(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{SCRIPT.parents[1]}:{':'.join(sys.path)}"}
    result = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=500, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    alone, shared = ranks[0]
    routes = torch.tensor(alone["routes"])
    assert 0 < routes.float().mean() < 1 and (routes != routes[0]).any()
    for exact in ("sample", "routes", "tokens"):
        assert shared[exact] == alone[exact]
    for close in ("router_logits", "logits"):
        torch.testing.assert_close(torch.tensor(shared[close]), torch.tensor(alone[close]), atol=2e-3, rtol=1e-3)
    assert not shared["captured"]
