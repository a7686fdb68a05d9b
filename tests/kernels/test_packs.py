"""Packs against a float64 oracle of each sequence alone, by the interpreter, on a GPU, and in plain PyTorch."""

import itertools
import math

import pytest
import torch
from helpers.devices import DEVICES, INTERPRETED
from helpers.kernels import TOLERANCE, states
from helpers.oracles import error, oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_attention import kernels
from flux_attention.kernels import packs, reference, triton_prefill
from flux_attention.kernels.packs import UNBOUNDED, Pack
from flux_attention.patterns import Streaming

pytestmark = pytest.mark.usefixtures("poisoned")


@st.composite
def problems(draw, most=90, dims=(16, 32)):
    """Sequences around block boundaries, cut into spans anywhere, each with a sink and a window of its own."""
    length = st.one_of(st.integers(1, most), st.sampled_from([63, 64, 65]))
    lengths = draw(st.lists(length, min_size=1, max_size=4))
    spans, sizes = [], []
    for length in lengths:
        cuts = sorted(draw(st.sets(st.integers(1, max(1, length - 1)), max_size=2)) if length > 1 else [])
        edges = [0, *cuts, length]
        spans.append(list(itertools.pairwise(edges)))
        window = st.sampled_from([1, 7, 16, 33, UNBOUNDED])
        sizes += [(draw(st.sampled_from([0, 1, 5, 16, 64, 70])), draw(window)) for _ in spans[-1]]
    kv_heads, groups = draw(st.sampled_from([(1, 1), (2, 3), (1, 4)]))
    return dict(
        lengths=lengths,
        spans=spans,
        sizes=sizes,
        heads=kv_heads * groups,
        kv_heads=kv_heads,
        dim=draw(st.sampled_from(dims)),
        seed=draw(st.integers(0, 2**31)),
    )


def truth_of(pack, sizes, query, key, value, scale):
    """Each sequence alone, in float64, under the mask of its spans."""
    outputs = []
    for row, length in enumerate(pack.lengths):
        part = slice(pack.cu_seqlens[row], pack.cu_seqlens[row + 1])
        mask = torch.zeros(length, length, dtype=torch.bool, device=query.device)
        for (owner, start, end), (sink, window) in zip(pack.spans, sizes, strict=True):
            if owner == row:
                mask[start:end] = Streaming(sink, window).mask(length)[start:end].to(query.device)
        outputs.append(oracle(query[:, :, part], key[:, :, part], value[:, :, part], mask, scale))
    return torch.cat(outputs, dim=2)


def check(compute, device, dtype, lengths, spans, sizes, heads, kv_heads, dim, seed, gradients=True):
    generator = torch.Generator(device).manual_seed(seed)
    pack = Pack(lengths, spans, max(sink for sink, _ in sizes))
    leaves = [states(generator, count, sum(lengths), dim, dtype, "BSHD", 1) for count in (heads, kv_heads, kv_heads)]
    leaves = [leaf.requires_grad_(gradients) for leaf in leaves]
    sizes_N2 = torch.tensor(sizes, dtype=torch.int32, device=device)
    output = compute(*leaves, pack, sizes_N2, dim**-0.5)
    truth = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = truth_of(pack, sizes, *truth, dim**-0.5)
    tolerance = TOLERANCE.get(dtype, 1e-5)
    assert error(output, expected) < tolerance
    if gradients:
        weight = torch.randn(output.shape, generator=generator, device=device).to(dtype)
        actual = torch.autograd.grad(output, leaves, weight)
        for a, e in zip(actual, torch.autograd.grad(expected, truth, weight.double()), strict=True):
            assert a.isfinite().all()
            assert (a.double() - e).norm() < 2 * tolerance * e.norm() + 1e-3 * math.sqrt(a.numel())


@INTERPRETED
@settings(max_examples=25, deadline=None)
@given(problems(dims=(16,)), st.booleans(), st.booleans())
def test_packs_by_the_interpreter(problem, gradients, copied):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_prefill, "MIN_TMA_QUERIES", 0 if copied else math.inf)
        patch.setattr(packs, "FAR_QUERIES", 32)
        check(triton_prefill.packed_attention, "cpu", torch.float16, **problem, gradients=gradients)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_packs_in_plain_pytorch(problem):
    check(reference.packed, "cpu", torch.float32, **problem)


@pytest.mark.gpu
@settings(max_examples=60, deadline=None)
@given(problems(most=3000, dims=(64,)), st.sampled_from([torch.float16, torch.bfloat16]), st.booleans())
def test_packs_of_random_shapes(problem, dtype, copied):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_prefill, "MIN_TMA_QUERIES", 0 if copied else math.inf)
        check(kernels.packed, "cuda", dtype, **problem)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(9, 3), (14, 2), (8, 8)])
def test_packs_of_every_tile(dim, heads, kv_heads):
    lengths = [2049, 1, 300, 4096, 127]
    spans = [[(0, length)] for length in lengths]
    sizes = [(128, 1024), (0, UNBOUNDED), (128, 100), (0, UNBOUNDED), (64, 1)]
    check(kernels.packed, "cuda", torch.bfloat16, lengths, spans, sizes, heads, kv_heads, dim, dim)


@pytest.mark.parametrize("device", DEVICES)
def test_what_spans_see_may_change_from_call_to_call(device):
    """The pack's tables are made once; only sizes tell layers and branches apart."""
    generator = torch.Generator(device).manual_seed(0)
    pack = Pack([40, 30], [[(0, 40)], [(0, 30)]], 4)
    query, key = (states(generator, heads, 70, 16, torch.float16, "BSHD", 1) for heads in (4, 2))
    for sizes in ([(4, 9), (0, UNBOUNDED)], [(0, UNBOUNDED), (4, 9)]):
        sizes_N2 = torch.tensor(sizes, dtype=torch.int32, device=device)
        output = triton_prefill.packed_attention(query, key, key, pack, sizes_N2, 0.25)
        assert error(output, truth_of(pack, sizes, query, key, key, 0.25)) < TOLERANCE[torch.float16]
