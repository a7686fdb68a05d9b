"""Patterns and kernels against a float64 oracle over random shapes, and their counts against their masks."""

import subprocess
import sys

import pytest
import torch
from helpers.oracles import error, oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_attention import kernels
from flux_attention.errors import FluxConfigError, UnsupportedModelError
from flux_attention.patterns import SPARSE_PATTERNS, Full, Streaming, Triangle, build

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-12}


@st.composite
def problems(draw):
    kv_heads, groups = draw(st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 3), (4, 2)]))
    dim = draw(st.sampled_from([8, 64, 128, 256]))
    keys = draw(st.one_of(st.integers(1, 60), st.sampled_from([127, 128, 129, 255, 256, 257, 511, 512, 513, 640])))
    length = draw(st.one_of(st.just(keys), st.integers(1, keys)))
    sink, window = draw(st.sampled_from([(0, 1), (0, 16), (4, 9), (16, 64), (64, 130), (128, 300)]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch = draw(st.integers(1, 2))
    query = torch.randn(batch, kv_heads * groups, length, dim, generator=generator).to(dtype)
    key, value = (torch.randn(batch, kv_heads, keys, dim, generator=generator).to(dtype) for _ in range(2))
    return query, key, value, sink, window


@settings(max_examples=60, deadline=None)
@given(problems())
def test_prefill_against_float64(problem):
    query, key, value, sink, window = problem
    length, keys, scale = query.shape[2], key.shape[2], query.shape[-1] ** -0.5
    for pattern in (Full(), Streaming(sink, window), Streaming(sink, window, block_size=16)):
        mask = pattern.mask(keys)[keys - length :]
        assert (
            error(pattern.prefill(query, key, value, scale), oracle(query, key, value, mask, scale))
            < TOLERANCE[query.dtype]
        )


@settings(max_examples=30, deadline=None)
@given(problems(), st.integers(1, 200), st.data())
def test_prefill_of_ragged_prompts(problem, last_n, data):
    query, key, value, sink, window = problem
    keys, scale = key.shape[2], query.shape[-1] ** -0.5
    query = query[:, :, :1].repeat(1, 1, keys, 1) + query.new_tensor(range(keys))[:, None] / keys
    lengths = [data.draw(st.integers(1, keys)) for _ in range(len(query))]
    block_size = data.draw(st.sampled_from([1, 5, 128]), "block_size")
    for pattern in (Triangle(sink, window, last_n, block_size=block_size), Streaming(sink, window, block_size=8)):
        output = pattern.prefill(query, key, value, scale, lengths)
        for row, length in enumerate(lengths):  # the prompt, and what follows it in the same call
            real = [t[row : row + 1] for t in (query, key, value)]
            expected = oracle(*real, pattern.mask(keys, length), scale)
            assert error(output[row : row + 1], expected) < TOLERANCE[query.dtype]


@settings(max_examples=40, deadline=None)
@given(problems(), st.data())
def test_decode_of_ragged_rows(problem, data):
    query, key, value, _, _ = problem
    keys, scale = key.shape[2], query.shape[-1] ** -0.5
    query = query[:, :, -1:]
    lengths = [data.draw(st.integers(1, keys)) for _ in range(len(query))]
    mask = (torch.arange(keys) < torch.tensor(lengths)[:, None])[:, None, None]
    assert (
        error(kernels.decode(query, key, value, None, scale), oracle(query, key, value, torch.ones_like(mask), scale))
        < TOLERANCE[query.dtype]
    )
    key = key.masked_fill(~mask.transpose(-1, -2), 1e4)  # what lies behind a row's length must not matter
    assert (
        error(kernels.decode(query, key, value, lengths, scale), oracle(query, key, value, mask, scale))
        < TOLERANCE[query.dtype]
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 40), st.integers(1, 60), st.integers(1, 50), st.integers(1, 40))
def test_pairs_count_the_mask(length, sink, window, last_n, block):
    patterns = (
        Full(),
        Streaming(sink, window),
        Triangle(sink, window, last_n),
        Streaming(sink, window, block_size=block),
        Triangle(sink, window, last_n, block_size=block),
    )
    for pattern in patterns:
        mask = pattern.mask(length)
        assert pattern.pairs(length) == int(mask.sum())
        assert not mask.triu(1).any() and mask.diagonal().all()


def test_mask_is_the_definition():
    mask = Streaming(2, 3).mask(7)
    assert mask[6].tolist() == [True, True, False, False, True, True, True]
    assert Triangle(2, 3, 1).mask(7)[6].all() and Triangle(2, 3, 1).mask(7)[5].tolist() == [
        True,
        True,
        False,
        True,
        True,
        True,
        False,
    ]
    assert Triangle(1, 1, 2).mask(6, prompt_length=4)[5].tolist() == [True, False, False, False, False, True]


def test_blocks_of_the_prompt_see_whole_blocks():
    """Sink 5 is two blocks of 4, window 6 two: drawn by blocks, by hand, then cut at each query."""
    by_block = torch.tensor(
        [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0],
            [1, 1, 0, 1, 1],
        ]
    )
    expected = torch.kron(by_block, torch.ones(4, 4, dtype=torch.long)).bool()[:19, :19].tril()
    pattern = Streaming(5, 6, block_size=4)
    assert torch.equal(pattern.mask(19), expected)
    assert pattern.later == Streaming(8, 8) and pattern.kept(19) == 16
    assert torch.equal(pattern.mask(19, prompt_length=17)[:17], expected[:17])
    assert torch.equal(pattern.mask(19, prompt_length=17)[17:], Streaming(8, 8).mask(19)[17:])
    triangle = Triangle(5, 6, 2, block_size=4).mask(19)
    assert torch.equal(triangle[:17], expected[:17]) and triangle[17:].sum() == 18 + 19


def test_sizes_of_whole_blocks_are_the_published_ones():
    """128 and 1,024 tokens are 1 and 8 blocks of 128: the first query of a block sees 897 keys of its window."""
    mask = Streaming(128, 1024, block_size=128).mask(2100)
    for i, low in ((1151, 0), (1152, 256), (1279, 256), (1280, 384), (2099, 1152)):
        assert mask[i].nonzero()[:, 0].tolist() == [*range(128), *range(max(128, low), i + 1)]


def test_a_configuration_may_leave_the_block_size_out():
    sizes = {"pattern": "streaming", "sink": 5, "window": 6}
    assert build(sizes, SPARSE_PATTERNS) == Streaming(5, 6)
    assert Streaming(5, 6).to_dict() == sizes
    blocks = build(sizes | {"block_size": 4}, SPARSE_PATTERNS)
    assert blocks == Streaming(5, 6, block_size=4) and blocks.to_dict() == sizes | {"block_size": 4}
    with pytest.raises(FluxConfigError, match="block_size is 0, expected a whole number, at least 1"):
        build(sizes | {"block_size": 0}, SPARSE_PATTERNS)
    with pytest.raises(FluxConfigError, match=r"unknown or missing: \['window'\]"):
        build({"pattern": "streaming", "sink": 5}, SPARSE_PATTERNS)
    with pytest.raises(UnsupportedModelError, match="packed"):
        blocks.spans(10, 10)


@pytest.mark.parametrize(
    "pattern",
    [Full(), Streaming(4, 9), Triangle(4, 9, 5), Streaming(4, 9, block_size=8), Triangle(4, 9, 5, block_size=8)],
    ids=str,
)
def test_gradients_equal_those_of_the_masked_formula(pattern):
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(2, heads, 150, 16, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    weight = torch.randn(2, 4, 150, 16, generator=generator, dtype=torch.float64)
    actual = torch.autograd.grad((pattern.prefill(*leaves, 0.25) * weight).sum(), leaves)
    expected = torch.autograd.grad((oracle(*leaves, pattern.mask(150), 0.25) * weight).sum(), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_streaming_prefill_of_32k_tokens_stays_small():
    """No S × T mask or score matrix: at 32,768 tokens a bool one alone would be 1 GiB. In a fresh process, as the
    peak of a process never falls."""
    code = """
import resource, torch
from flux_attention import kernels
query, key, value = (torch.randn(1, heads, 32768, 16) for heads in (2, 1, 1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kernels.streaming(query, key, value, 128, 1024, 0.25)
kernels.full(query[:, :, -2048:], key, value, 0.25)
kernels.full(query, key, value, 0.25)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 300, f"{grown:.0f} MiB"


def test_streaming_prefill_of_32k_tokens_is_right():
    length = 32768
    query, key, value = (torch.randn(1, heads, length, 16) for heads in (2, 1, 1))
    output = kernels.streaming(query, key, value, 128, 1024, 0.25)
    rows = [0, 700, 1151, 1152, 20000, length - 1]
    j = torch.arange(length)
    mask = torch.stack([(j <= i) & ((j < 128) | (i - j < 1024)) for i in rows])
    assert error(output[:, :, rows], oracle(query[:, :, rows], key, value, mask, 0.25)) < 2e-6


@given(st.sampled_from([Full(), Streaming(3, 5), Triangle(3, 5, 7)]), st.integers(1, 40), st.data())
def test_spans_are_the_mask(pattern, length, data):
    prompt_length = data.draw(st.integers(1, length))
    spans = pattern.spans(length, prompt_length)
    assert [span[0] for span in spans] == [0, *(span[1] for span in spans[:-1])] and spans[-1][1] == length
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    mask = torch.zeros(length, length, dtype=torch.bool)
    for start, end, sink, window in spans:
        mask[start:end] = ((j <= i) & ((j < sink) | (i - j < window)))[start:end]
    assert torch.equal(mask, pattern.mask(length, prompt_length))
