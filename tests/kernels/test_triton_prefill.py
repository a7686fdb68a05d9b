"""The Triton prefill kernels against a float64 oracle: by the interpreter on a CPU, compiled on a GPU."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.devices import DEVICES, INTERPRETED
from helpers.kernels import TOLERANCE, states
from helpers.oracles import error, oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flux_attention import kernels
from flux_attention.kernels import triton_prefill
from flux_attention.patterns import Streaming

pytestmark = pytest.mark.usefixtures("poisoned")


@st.composite
def problems(draw, dims=(16, 32), most=90):
    """Sizes around block boundaries, with windows and sinks on either side of them."""
    kv_heads, groups = draw(st.sampled_from([(1, 1), (1, 4), (2, 3), (1, 6)]))
    keys = draw(st.one_of(st.integers(1, most), st.sampled_from([63, 64, 65, 127, 128, 129])))
    return dict(
        kv_heads=kv_heads,
        heads=kv_heads * groups,
        keys=keys,
        length=draw(st.one_of(st.just(keys), st.integers(1, keys))),
        dim=draw(st.sampled_from(dims)),
        sink=draw(st.sampled_from([0, 1, 5, 16, 64, 70])),
        window=draw(st.sampled_from([1, 7, 16, 33, 64, 200])),
        layouts=draw(st.tuples(*[st.sampled_from(["BHSD", "BSHD"])] * 3)),
        seed=draw(st.integers(0, 2**31)),
    )


def check_prefill(
    device, dtype, heads, kv_heads, keys, length, dim, sink, window, layouts, seed, batch=2, gradients=True
):
    """Output, log-sum-exp and gradients of one problem."""
    generator = torch.Generator(device).manual_seed(seed)
    query = states(generator, heads, length, dim, dtype, layouts[0], batch)
    key, value = (states(generator, kv_heads, keys, dim, dtype, layout, batch) for layout in layouts[1:])
    leaves = [tensor.requires_grad_(gradients) for tensor in (query, key, value)]
    scale = dim**-0.5
    output, lse = triton_prefill.attention(*leaves, sink, window, scale, return_lse=True)
    mask = Streaming(sink, window).mask(keys)[keys - length :].to(device)
    truth = [tensor.detach().double().requires_grad_() for tensor in leaves]
    expected = oracle(*truth, mask, scale)
    assert error(output, expected) < TOLERANCE[dtype]
    scores = (truth[0] @ truth[1].repeat_interleave(heads // kv_heads, 1).transpose(-1, -2)) * scale
    torch.testing.assert_close(
        lse, scores.masked_fill(~mask, -math.inf).logsumexp(-1).float(), atol=5e-3, rtol=1e-3, check_dtype=False
    )
    if gradients:
        weight = torch.randn(output.shape, generator=generator, device=device).to(dtype)
        actual = torch.autograd.grad(output, leaves, weight)
        for a, e in zip(actual, torch.autograd.grad(expected, truth, weight.double()), strict=True):
            # Where a query sees one key only, the true gradient of its scores is zero.
            assert (a.double() - e).norm() < 2 * TOLERANCE[dtype] * e.norm() + 1e-3 * math.sqrt(a.numel())


@INTERPRETED
@settings(max_examples=60, deadline=None)
@given(problems(dims=(16, 16, 32)), st.sampled_from([1, 1, 2]), st.booleans(), st.booleans())
def test_prefill_by_the_interpreter(problem, batch, gradients, copied):
    """Its time goes by programs, of which every sequence has its own, and most of it into gradients."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_prefill, "MIN_TMA_QUERIES", 0 if copied else math.inf)
        check_prefill("cpu", torch.float16, **problem, batch=batch, gradients=gradients)


@pytest.mark.gpu
@settings(max_examples=60, deadline=None)
@given(problems(dims=(64,), most=3000), st.sampled_from([torch.float16, torch.bfloat16]), st.booleans())
def test_prefill_of_random_shapes(problem, dtype, copied):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_prefill, "MIN_TMA_QUERIES", 0 if copied else math.inf)
        check_prefill("cuda", dtype, **problem)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (8, 2), (5, 1)])
@pytest.mark.parametrize("keys, length", [(1, 1), (127, 127), (2049, 2049), (3000, 130)])
@pytest.mark.parametrize("copied", [False, True])
def test_prefill_of_every_tile(dim, heads, kv_heads, keys, length, copied, monkeypatch):
    monkeypatch.setattr(triton_prefill, "MIN_TMA_QUERIES", 0 if copied else math.inf)
    for sink, window in ((0, 1), (128, 1024), (100, 300), (0, keys)):
        layouts = ("BSHD", "BSHD", "BHSD")
        check_prefill("cuda", torch.bfloat16, heads, kv_heads, keys, length, dim, sink, window, layouts, keys + dim)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["a column late", "one batch for all", "columns apart"])
def test_prefill_of_keys_that_cannot_be_copied_by_blocks(device, layout, monkeypatch):
    monkeypatch.setattr(triton_prefill, "MIN_TMA_QUERIES", 0)
    generator = torch.Generator(device).manual_seed(0)
    query = states(generator, 4, 40, 16, torch.float16, "BSHD")
    key = states(generator, 2, 40, 32, torch.float16, "BSHD")
    key = {"a column late": key[..., 1:17], "one batch for all": key[:1, ..., :16].expand(2, -1, -1, -1),
           "columns apart": key[..., ::2]}[layout]  # fmt: skip
    output = triton_prefill.attention(query, key, key, 4, 9, 0.25)
    assert error(output, oracle(query, key, key, Streaming(4, 9).mask(40).to(device), 0.25)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("device", DEVICES)
def test_memory_is_poisoned(device):
    assert torch.empty(5, device=device).isnan().all()
    assert torch.empty_like(torch.zeros(5, device=device, dtype=torch.bfloat16)).isnan().all()


@pytest.mark.gpu
def test_gpus_run_the_triton_kernels(monkeypatch):
    seen = []
    attention = triton_prefill.attention

    def watched(*args, **kwargs):
        seen.append(args[3:5])
        return attention(*args, **kwargs)

    monkeypatch.setattr(triton_prefill, "attention", watched)
    query, key = (torch.randn(1, heads, 300, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2))
    kernels.streaming(query, key, key, 4, 16, 0.1)
    kernels.full(query[:, :, -9:], key, key, 0.1)
    assert seen == [(4, 16), (0, 300)]


#: Bytes of shared memory that a program may use: A100; RTX 3090, A10; Hopper; B200; RTX 5090.
SHARED = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


def test_tiles_fit_every_supported_gpu():
    """Compiled for GPUs that are not here, in a process of its own, as the interpreter is on in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = str(Path(__file__).parent / "shared_memory.py")
    command = [sys.executable, script, *(str(number) for gpu in SHARED.items() for number in gpu)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert result.returncode == 0, result.stderr[-2000:]
    reports = result.stdout.strip().split("\n")[-len(SHARED) :]
    for (capability, limit), used in zip(SHARED.items(), map(json.loads, reports), strict=True):
        assert len(used) == 48
        assert max(used.values()) <= limit, (capability, used)


@pytest.mark.parametrize("device", DEVICES)
def test_checkpointing_can_keep_the_operators_output(device, monkeypatch):
    runs = []
    forward = triton_prefill._run_forward
    monkeypatch.setattr(triton_prefill, "_run_forward", lambda *a, **k: runs.append(1) or forward(*a, **k))
    generator = torch.Generator(device).manual_seed(0)
    leaves = [states(generator, heads, 40, 16, torch.float16, "BSHD").requires_grad_() for heads in (4, 2, 2)]

    def layer(query, key, value):
        with torch.no_grad():  # as the branch that is not chosen
            other = triton_prefill.attention(query, key, value, 4, 40, 0.25)
        return triton_prefill.attention(query * 1.0, key, value, 4, 9, 0.25) + other

    context = partial(create_selective_checkpoint_contexts, [triton_prefill.streaming._opoverload])
    grads = []
    for settings_ in ({}, {"context_fn": context}):
        runs.clear()
        output = checkpoint(layer, *leaves, use_reentrant=False, **settings_)
        grads.append(torch.autograd.grad(output.float().square().sum(), leaves))
        assert len(runs) == (2 if settings_ else 4)
    for plain, kept in zip(*grads, strict=True):
        torch.testing.assert_close(kept, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("length", [1, 500, 3000])
def test_gradients_of_dense_prefill(dim, length):
    """PyTorch's own backends, in the order that we give them."""
    generator = torch.Generator("cuda").manual_seed(dim)
    leaves = [states(generator, heads, length, dim, torch.bfloat16, "BSHD").requires_grad_() for heads in (8, 2, 2)]
    output = kernels.full(*leaves, dim**-0.5)
    truth = [tensor.detach().double().requires_grad_() for tensor in leaves]
    mask = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()
    expected = oracle(*truth, mask, dim**-0.5)
    assert error(output, expected) < 8e-3
    weight = torch.randn(output.shape, generator=generator, device="cuda").bfloat16()
    actual = torch.autograd.grad(output, leaves, weight)
    for a, e in zip(actual, torch.autograd.grad(expected, truth, weight.double()), strict=True):
        assert (a.double() - e).norm() < 2e-2 * e.norm() + 1e-3 * math.sqrt(a.numel())
