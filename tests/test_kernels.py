"""Triton kernels against a float64 oracle: by Triton's interpreter on a CPU, compiled on a GPU (`make gpu-test`)."""

import json
import math
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICES, INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st
from test_patterns import error, oracle
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flux_attention import kernels
from flux_attention.kernels import cudnn
from flux_attention.patterns import Full, Streaming

pytest.importorskip("triton", reason="Triton has no package for this platform")
from flux_attention.kernels import triton_decode, triton_join, triton_prefill

HOPPER = pytest.mark.skipif(
    torch.cuda.device_count() == 0 or torch.cuda.get_device_capability() < (9, 0),
    reason="needs a GPU of compute capability 9.0 or newer",
)
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def states(generator, heads, length, dim, dtype, layout):
    """Random (B=2, heads, length, dim) in one of the layouts that models give: heads inside or outside positions."""
    shape = (2, heads, length, dim) if layout == "BHSD" else (2, length, heads, dim)
    tensor = torch.randn(shape, generator=generator, device=generator.device).to(dtype)
    return tensor if layout == "BHSD" else tensor.transpose(1, 2)


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


def check_prefill(device, dtype, heads, kv_heads, keys, length, dim, sink, window, layouts, seed, gradients=True):
    """Output, log-sum-exp and gradients of one problem."""
    generator = torch.Generator(device).manual_seed(seed)
    query = states(generator, heads, length, dim, dtype, layouts[0])
    key, value = (states(generator, kv_heads, keys, dim, dtype, layout) for layout in layouts[1:])
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


@pytest.fixture(autouse=True)
def poisoned():
    """What a kernel forgets to write is NaN: PyTorch fills the memory that it hands out."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@INTERPRETED
@settings(max_examples=40, deadline=None)
@given(problems(), st.booleans())
def test_prefill_by_the_interpreter(problem, copied):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_prefill, "FEWEST_COPIED", 0 if copied else math.inf)
        check_prefill("cpu", torch.float16, **problem)


@pytest.mark.gpu
@settings(max_examples=60, deadline=None)
@given(problems(dims=(64,), most=3000), st.sampled_from([torch.float16, torch.bfloat16]), st.booleans())
def test_prefill_of_random_shapes(problem, dtype, copied):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_prefill, "FEWEST_COPIED", 0 if copied else math.inf)
        check_prefill("cuda", dtype, **problem)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (8, 2), (5, 1)])
@pytest.mark.parametrize("keys, length", [(1, 1), (127, 127), (2049, 2049), (3000, 130)])
@pytest.mark.parametrize("copied", [False, True])
def test_prefill_of_every_tile(dim, heads, kv_heads, keys, length, copied, monkeypatch):
    monkeypatch.setattr(triton_prefill, "FEWEST_COPIED", 0 if copied else math.inf)
    for sink, window in ((0, 1), (128, 1024), (100, 300), (0, keys)):
        layouts = ("BSHD", "BSHD", "BHSD")
        check_prefill("cuda", torch.bfloat16, heads, kv_heads, keys, length, dim, sink, window, layouts, keys + dim)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["a column late", "one batch for all", "columns apart"])
def test_prefill_of_keys_that_cannot_be_copied_by_blocks(device, layout, monkeypatch):
    monkeypatch.setattr(triton_prefill, "FEWEST_COPIED", 0)
    generator = torch.Generator(device).manual_seed(0)
    query = states(generator, 4, 40, 16, torch.float16, "BSHD")
    key = states(generator, 2, 40, 32, torch.float16, "BSHD")
    key = {"a column late": key[..., 1:17], "one batch for all": key[:1, ..., :16].expand(2, -1, -1, -1),
           "columns apart": key[..., ::2]}[layout]  # fmt: skip
    output = triton_prefill.attention(query, key, key, 4, 9, 0.25)
    assert error(output, oracle(query, key, key, Streaming(4, 9).mask(40).to(device), 0.25)) < TOLERANCE[torch.float16]


@pytest.mark.gpu
@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([(8, 8), (8, 2), (5, 1)]),
    st.integers(64, 2000),
    st.one_of(st.just(0), st.integers(64, 1500)),
    st.sampled_from([64, 80, 128]),
    st.tuples(*[st.sampled_from(["BHSD", "BSHD"])] * 3),
    st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_dense_prefill_in_blocks(heads, length, past, dim, layouts, dtype):
    check_blocks("cuda", heads, length, past, dim, layouts, dtype)


@pytest.fixture
def formula(monkeypatch):
    """cuDNN's part played by formulas, as it needs a GPU."""

    def attend(query, key, value, causal, scale):
        assert not causal or query.shape[2] == key.shape[2]
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
        scores = query @ key.transpose(-1, -2) * scale
        if causal:
            scores = scores.masked_fill(~Full().mask(scores.shape[-1]), -math.inf)
        return scores.softmax(-1) @ value, scores.float().logsumexp(-1)

    monkeypatch.setattr(cudnn, "_attend", attend)


@INTERPRETED
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("length, past", [(3, 0), (8, 0), (15, 0), (17, 0), (24, 5), (5, 9)])
def test_blocks_are_joined(heads, length, past, formula):
    check_blocks("cpu", heads, length, past, 20, ("BSHD", "BSHD", "BHSD"), torch.float32, block=8)


@INTERPRETED
@pytest.mark.parametrize("length, past, count", [(1, 40, 2), (5, 16, 4), (13, 59, 3)])
def test_parts_are_joined(length, past, count, formula, monkeypatch):
    monkeypatch.setattr(cudnn, "TILE", 8)
    monkeypatch.setattr(cudnn, "STEP", 4)
    check_parts("cpu", (6, 2), length, past, 16, torch.float16, count)


@pytest.mark.gpu
@HOPPER
@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([(8, 8), (8, 2), (5, 1)]),
    st.one_of(st.integers(1, 10), st.integers(1, 400)),
    st.integers(4096, 20000),
    st.sampled_from([64, 128]),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.integers(2, 4),
)
def test_few_queries_by_parts(heads, length, past, dim, dtype, count):
    check_parts("cuda", heads, length, past, dim, dtype, count)


def check_parts(device, heads, length, past, dim, dtype, count):
    generator = torch.Generator(device).manual_seed(length)
    query = states(generator, heads[0], length, dim, dtype, "BSHD")[:1]
    # In a cache that has room for more, as the routed one's blocks have.
    key, value = (states(generator, heads[1], past + length + 9, dim, dtype, "BHSD")[:1, :, :-9] for _ in range(2))
    output = cudnn.full_in_parts(query, key, value, dim**-0.5, count, triton_prefill.attention)
    mask = Full().mask(past + length)[past:].to(device)
    assert error(output, oracle(query, key, value, mask, dim**-0.5)) < TOLERANCE[dtype]


def check_blocks(device, heads, length, past, dim, layouts, dtype, block=512):
    generator = torch.Generator(device).manual_seed(length)
    query = states(generator, heads[0], length, dim, dtype, layouts[0])
    key, value = (states(generator, heads[1], past + length, dim, dtype, layout) for layout in layouts[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cudnn, "BLOCK", block)
        output = cudnn.full(query, key, value, dim**-0.5, triton_join.join)
    mask = Full().mask(past + length)[past:].to(device)
    assert error(output, oracle(query, key, value, mask, dim**-0.5)) < TOLERANCE.get(dtype, 1e-5)


@pytest.mark.gpu
@HOPPER
def test_long_dense_prompts_are_read_in_blocks(monkeypatch):
    torch.use_deterministic_algorithms(False)
    seen = []
    full = cudnn.full
    monkeypatch.setattr(cudnn, "full", lambda *args: seen.append(args[0].shape[2]) or full(*args))
    monkeypatch.setattr(cudnn, "parts", lambda *args: 1)
    monkeypatch.setattr(cudnn, "LONG", 2000)
    monkeypatch.setattr(cudnn, "LATER", 2500)
    query, key = (torch.randn(1, heads, 3000, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2))
    kernels.full(query, key, key, 0.1)
    kernels.full(query[:, :, -300:], key, key, 0.1)
    for other in (query[:, :, :1999], query.clone().requires_grad_()):
        kernels.full(other, key[:, :, : other.shape[2]], key[:, :, : other.shape[2]], 0.1)
    kernels.full(query[:, :, -63:], key, key, 0.1)  # few queries
    kernels.full(query[:, :, -300:], key[:, :, 501:], key[:, :, 501:], 0.1)  # few keys
    kernels.full(query[:, :, -2999:], key, key, 0.1)  # one earlier key
    with torch.no_grad():  # in training what is computed without gradients, too
        kernels.full(query.clone().requires_grad_(), key, key, 0.1)
    torch.use_deterministic_algorithms(True)  # which SDPA says cuDNN's is not
    kernels.full(query, key, key, 0.1)
    assert seen == [3000, 300]


@pytest.mark.parametrize(
    "batch, heads, length, keys, expected",
    [
        (1, 32, 128, 2**17, 4),
        (1, 32, 129, 2**17, 2),
        (1, 32, 257, 2**17, 1),  # 96 tiles of 132 at once
        (1, 8, 1, 2**17, 11),  # of 11 K keys, which leave over as much at most
        (1, 1, 2**17, 2**17, 1),  # a whole prompt
        (1, 1, 2**17 - 5, 2**17, 1),
        (1, 32, 128, 2**17 - 1, 1),
        (2, 32, 128, 2**17, 1),
    ],
)
def test_parts_keep_all_multiprocessors_busy(batch, heads, length, keys, expected, monkeypatch):
    monkeypatch.setattr(cudnn, "_runs", lambda *states: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    query, key = (torch.empty(batch, heads, n, 0) for n in (length, keys))
    count = cudnn.parts(query, key, key)
    assert count == expected and (count == 1 or count * cudnn.STEP <= (keys - length) // count)


@pytest.mark.gpu
@HOPPER
def test_few_queries_behind_many_keys_are_read_by_parts(monkeypatch):
    torch.use_deterministic_algorithms(False)
    seen = []
    full_in_parts = cudnn.full_in_parts
    monkeypatch.setattr(
        cudnn, "full_in_parts", lambda *args: seen.append((args[0].shape[2], args[4])) or full_in_parts(*args)
    )
    monkeypatch.setattr(cudnn, "LONG", 20_000)
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count  # 132 of an H100
    query, key = (torch.randn(1, heads, 20_000, 64, device="cuda", dtype=torch.bfloat16) for heads in (32, 8))
    for length in (1, 128, 129, 300, 20_000):  # 300 are too many for two parts
        kernels.full(query[:, :, -length:], key, key, 0.1)
    kernels.full(query[:, :2, -5:], key[:, :2], key[:, :2], 0.1)  # of so few heads, as many as keys make worth it
    few = query[:, :, -128:]
    kernels.full(few, key[:, :, 1:], key[:, :, 1:], 0.1)  # few keys
    kernels.full(few.expand(2, -1, -1, -1), *[key.expand(2, -1, -1, -1)] * 2, 0.1)
    kernels.full(few.clone().requires_grad_(), key, key, 0.1)
    counts = [(1, min(4, processors // 32)), (128, min(4, processors // 32)), (129, processors // 64), (5, 4)]
    assert seen == [(length, count) for length, count in counts if count > 1]


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


@pytest.mark.parametrize("capability", SHARED)
def test_tiles_fit_every_supported_gpu(capability):
    """Compiled for GPUs that are not here, in a process of its own, as the interpreter is on in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = str(Path(__file__).parent / "shared_memory.py")
    command = [sys.executable, script, str(capability), str(SHARED[capability])]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert result.returncode == 0, result.stderr[-2000:]
    used = json.loads(result.stdout.strip().split("\n")[-1])
    assert len(used) == 15
    assert max(used.values()) <= SHARED[capability], used


@st.composite
def rows(draw):
    kinds = st.sampled_from([kernels.FULL, kernels.KEPT, kernels.RING])
    lengths = st.one_of(st.integers(0, 300), st.sampled_from([63, 64, 65, 127, 128, 129, 191, 192, 193]))
    return draw(st.lists(st.tuples(lengths, kinds), min_size=1, max_size=4))


def check_decode(device, dtype, kept, kv_heads, groups, dim, sink, window, seed):
    """Rows of (length, kind): output, and what is stored, of one step."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    batch, heads = len(kept), kv_heads * groups
    query, new_key, new_value = random(batch, heads, dim), random(batch, kv_heads, dim), random(batch, kv_heads, dim)
    table, buffers, pasts = [], [], []
    for length, kind in kept:
        past = random(2, kv_heads, length, dim)
        capacity = sink + window if kind == kernels.RING else length + 3
        buffer = torch.full((2, kv_heads, capacity, dim), math.nan, dtype=dtype, device=device)
        for position in range(length):
            buffer[:, :, slot_of(position, kind, sink, window)] = past[:, :, position]
        table.append([buffer[0].data_ptr(), buffer[1].data_ptr(), buffer.stride(1), kind])
        buffers.append(buffer)
        pasts.append(past)
    space = triton_decode.DecodeSpace(batch, heads, kv_heads, dim, torch.device(device))
    lengths = torch.tensor([length for length, _ in kept], dtype=torch.int32, device=device)
    work = triton_decode.work_table(table, lengths.tolist(), sink, window, space.programs)
    arguments = (torch.tensor(work, device=device), lengths, space, sink, window, dim**-0.5)
    output = triton_decode.attend(query, new_key, new_value, *arguments)
    again = triton_decode.attend(query, new_key, new_value, *arguments)  # the scratch memory is as it was
    assert torch.equal(output, again)
    for row, (length, kind) in enumerate(kept):
        new = torch.stack([new_key[row], new_value[row]])
        assert torch.equal(buffers[row][:, :, slot_of(length, kind, sink, window)], new)
        key, value = torch.cat([pasts[row], new[:, :, None]], dim=2)[:, None]
        j = torch.arange(length + 1, device=device)
        mask = (j < sink) | (length - j < window) if kind != kernels.FULL else j >= 0
        expected = oracle(query[row][None, :, None], key, value, mask[None], dim**-0.5)
        assert error(output[row][None, :, None], expected) < TOLERANCE[dtype]


def slot_of(position, kind, sink, window):
    return position if kind != kernels.RING or position < sink else sink + (position - sink) % window


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


@INTERPRETED
@settings(max_examples=25, deadline=None)
@given(
    rows(),
    st.sampled_from([(1, 1), (2, 4), (1, 3)]),
    st.sampled_from([(0, 1), (4, 9), (70, 64), (16, 200)]),
    st.integers(0, 2**31),
)
def test_decode_by_the_interpreter(kept, heads, sizes, seed):
    check_decode("cpu", torch.float16, kept, *heads, 16, *sizes, seed)


@given(rows(), st.sampled_from([(0, 1), (4, 9), (128, 1024)]), st.integers(4, 300))
def test_work_is_shared_by_what_there_is_to_read(kept, sizes, programs):
    table = [[7 * row, 7 * row + 1, 5, kind] for row, (_, kind) in enumerate(kept)]
    work = triton_decode.work_table(table, [1000 * length for length, _ in kept], *sizes, programs)
    assert len(work) == programs
    parts = dict.fromkeys(range(len(kept)), 0)
    for program, (*row, number, part, count) in enumerate(work):
        if count:
            assert row == table[number] and part == parts[number] < count <= triton_decode.MOST_PARTS
            assert work[program - part][5] == 0  # the row's programs are neighbours
            parts[number] += 1
    blocks = {}
    for number, (length, kind) in enumerate(kept):
        keys = 1000 * length + 1 if kind == kernels.FULL else min(1000 * length + 1, sum(sizes))
        blocks[number] = -(-keys // 64)
        assert 1 <= parts[number] <= max(1, blocks[number] // 2)
    # No other sharing has a shorter longest part: one program fewer anywhere would make a part as long as it.
    open_rows = [n for n in parts if parts[n] < min(triton_decode.MOST_PARTS, blocks[n] // 2)]
    if open_rows:
        assert sum(parts.values()) == programs
        worst = max(blocks[n] / parts[n] for n in open_rows)
        assert all(parts[n] == 1 or blocks[n] / (parts[n] - 1) >= worst for n in parts)


@pytest.mark.gpu
@settings(max_examples=60, deadline=None)
@given(
    rows(),
    st.sampled_from([(2, 4), (8, 1)]),
    st.sampled_from([(0, 1), (4, 9), (70, 64), (128, 1024)]),
    st.integers(0, 2**31),
)
def test_decode_of_random_rows(kept, heads, sizes, seed):
    check_decode("cuda", torch.bfloat16, kept, *heads, 128, *sizes, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("kv_heads, groups", [(8, 4), (1, 8), (2, 5), (1, 20)])
def test_decode_of_long_rows(dim, kv_heads, groups):
    kept = [(40_000, kernels.FULL), (9_000, kernels.KEPT), (1200, kernels.RING), (5, kernels.RING)]
    check_decode("cuda", torch.bfloat16, kept, kv_heads, groups, dim, 128, 1024, seed=dim)


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


@pytest.fixture
def on_hopper(monkeypatch):
    """States for which dense prefill orders SDPA's backends; no GPU is needed to look at the order."""
    monkeypatch.setattr(kernels, "_dense_backends", lambda *args: BACKENDS)
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 1, 1, 128))


def test_backends_that_the_user_switched_off_stay_off(on_hopper):
    """SDPA's switches are the process's own: dense prefill orders what is on, and leaves them as they were."""
    cuda = torch.backends.cuda

    def on():
        return [is_on() for is_on in kernels._SWITCHES]

    before, order = on(), torch._C._get_sdp_priority_order()
    with kernels._dense_backend(on_hopper):
        assert on() == [True] * 4
        assert torch._C._get_sdp_priority_order()[0] == SDPBackend.CUDNN_ATTENTION.value
    try:
        cuda.enable_cudnn_sdp(False)
        with kernels._dense_backend(on_hopper):
            assert on() == [False, True, True, True] and torch._C._get_sdp_priority_order() == order
        with sdpa_kernel(SDPBackend.MATH), kernels._dense_backend(on_hopper):
            assert on() == [False, False, False, True]
    finally:
        cuda.enable_cudnn_sdp(True)
    assert on() == before and torch._C._get_sdp_priority_order() == order


def test_threads_do_not_mix_up_the_order_of_backends(on_hopper):
    order, seen = torch._C._get_sdp_priority_order(), []

    def work():
        for _ in range(200):
            with kernels._dense_backend(on_hopper):
                seen.append(torch._C._get_sdp_priority_order()[0])
                time.sleep(0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {SDPBackend.CUDNN_ATTENTION.value} and len(seen) == 800
    assert torch._C._get_sdp_priority_order() == order
