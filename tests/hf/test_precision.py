"""What ``auto`` means as a dtype."""

import types

import pytest
import torch

from flux_attention.hf import precision


@pytest.mark.parametrize(
    "kernels, capabilities, fast",
    [
        ("AVX512", {"avx512_bf16": True}, True),
        ("AVX512", {"amx_bf16": True}, True),
        ("AVX512", {"avx512_f": True, "avx512_bf16": False}, False),
        ("AVX2", {"avx512_bf16": True}, False),  # the CPU could, but PyTorch was told not to
        ("DEFAULT", {}, False),
    ],
)
@pytest.mark.parametrize("public", [True, False], ids=["capabilities", "older PyTorch"])
def test_auto_is_float32_on_a_cpu_without_fast_bfloat16(monkeypatch, kernels, capabilities, fast, public):
    known = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    old = types.SimpleNamespace(_is_avx512_bf16_supported=lambda: known)
    new = types.SimpleNamespace(get_capabilities=lambda: capabilities)
    monkeypatch.setattr(torch, "cpu", new if public else old)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kernels)
    assert precision.fast_bfloat16() == fast
    assert precision.load_dtype("auto", "cpu") == ("auto" if fast else "float32")
    assert precision.load_dtype("auto", torch.device("cuda:1")) == "auto"
    assert precision.load_dtype("bfloat16", "cpu") == "bfloat16"
