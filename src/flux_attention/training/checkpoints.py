"""Checkpoints of a run hold routers and multipliers alone, whole even where FSDP has sharded them."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.tensor import DTensor

#: What a checkpoint holds of the model.
WEIGHTS = "training.safetensors"
#: How a sharded optimizer's state lies in a checkpoint: whole.
SHARDED = StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor that FSDP may have sharded; every process takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def last_checkpoint(folder: str | Path) -> Path | None:
    """Find the newest complete checkpoint: a run that was killed while it wrote one goes on from the one before."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        # The trainer's state is what is written last, but a full disk or a crash can cut any file.
        with contextlib.suppress(Exception):
            step = int(json.loads((path / "trainer_state.json").read_text())["global_step"])
            load_file(path / WEIGHTS)
            for name in ("optimizer.pt", "scheduler.pt"):
                torch.load(path / name, map_location="cpu", weights_only=True)
            found.append((step, path))
    return max(found)[1] if found else None
