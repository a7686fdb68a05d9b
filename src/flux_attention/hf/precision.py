"""Chooses the dtype that a model is loaded in where the user leaves it open."""

from __future__ import annotations

import torch


def fast_bfloat16() -> bool:
    """
    Whether this CPU computes in bfloat16 at least as fast as in float32.

    With AVX512-BF16 or AMX it is twice as fast; without, PyTorch widens and rounds at every step and takes four times
    as long. ``get_cpu_capability`` tells which kernels PyTorch runs, which the user may have limited.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return torch.cpu._is_avx512_bf16_supported()  # older than the public function


def load_dtype(dtype: str, device: str | torch.device) -> str:
    """
    Return what ``from_pretrained`` is given as ``dtype``.

    Parameters
    ----------
    dtype : str
        ``auto`` for the checkpoint's own, but float32 on a CPU without fast bfloat16; any other as it is.
    device : str or torch.device
        Where the model will run.
    """
    if dtype == "auto" and torch.device(device).type == "cpu" and not fast_bfloat16():
        return "float32"
    return dtype
