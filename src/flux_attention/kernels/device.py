"""Tells of a device what kernels need: which of them run on it, its sizes, how to hand it something without waiting."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from importlib.util import find_spec

import torch

#: What the Triton kernels take.
DTYPES, HEAD_DIMS = (torch.bfloat16, torch.float16), (16, 32, 64, 128, 256)


def on_device(states: torch.Tensor):
    """Return a context in which Triton launches, streams and graphs are those of the GPU that holds ``states``."""
    return torch.cuda.device(states.device) if states.is_cuda else nullcontext()


def index_on(device: torch.device, values: list[int]) -> torch.Tensor:
    """Put int64 ``values`` on ``device``; the host does not wait for a GPU to take them."""
    return to_device(torch.tensor(values), device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to ``device``; the host does not wait for a GPU to take it from the CPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@lru_cache
def has_triton(device: torch.device) -> bool:
    """Whether the Triton kernels run on ``device``: an NVIDIA GPU of compute capability 8.0 or newer."""
    if device.type != "cuda" or torch.version.cuda is None or find_spec("triton") is None:
        return False
    if not torch.cuda.is_available():
        return False
    return capability(device) >= (8, 0)


# What Triton's interpreter is told, where there is no GPU to ask, is that of a Hopper GPU.


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@lru_cache
def device_name(device: torch.device) -> str:
    """Return a GPU's name."""
    return torch.cuda.get_device_name(device)


@lru_cache
def sm_count(device: torch.device) -> int:
    """Count the streaming multiprocessors (SMs)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a thread block may use."""
    if device.type != "cuda":
        return 2**20
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
