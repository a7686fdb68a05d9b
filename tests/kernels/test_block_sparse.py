"""Block-sparse prefill against loops over tiles, blocks and tokens."""

from importlib import import_module
from unittest import mock

import pytest
import torch
from helpers.blocks import BLOCK, expected_output, naive_mass, naive_maximum, naive_scores
from helpers.blocks import structured as states
from helpers.oracles import error, oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_attention import kernels
from flux_attention.errors import FluxConfigError, UnsupportedModelError
from flux_attention.kernels import dispatch
from flux_attention.patterns import FULL_PATTERNS, SPARSE_PATTERNS, BlockSparse, Full, SparseBlocks, Streaming, build

#: The module, which the package has a function of the same name in place of.
block_sparse = import_module("flux_attention.kernels.block_sparse")


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([(300, 300), (129, 129), (1, 200), (130, 400), (97, 353)]), st.sampled_from([8, 16, 64]))
def test_scores_against_loops(sizes, stride):
    query, key, _ = states(*sizes)
    scores = kernels.block_scores(query, key, stride, 0.25)
    for head in range(4):
        expected = naive_scores(query[0, head], key[0, head // 2], stride, 0.25)
        assert scores.shape[2] == len(expected)
        for row, block in enumerate(sorted(expected)):
            torch.testing.assert_close(
                scores[0, head, row].double(), torch.tensor(expected[block], dtype=torch.float64), atol=1e-5, rtol=1e-4
            )
    parts = [kernels.block_scores(query, key, stride, 0.25, row, 1) for row in range(scores.shape[2])]
    torch.testing.assert_close(torch.cat(parts, 2), scores)
    if sizes[0] >= 2 * BLOCK:
        torch.testing.assert_close(scores[:, :, 0].sum(-1), torch.full((1, 4), BLOCK / stride))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 12), st.integers(0, 5), st.sampled_from([0.1, 0.5, 0.8, 0.95, 1.0]))
def test_selections_against_loops(seed, rows, first, share):
    generator = torch.Generator().manual_seed(seed)
    total = first + rows
    scores = torch.rand(1, 2, rows, total, generator=generator, dtype=torch.float64) ** 4
    scores *= torch.arange(total) <= torch.arange(first, total)[:, None]
    for head, threshold in enumerate([share, share / 2]):
        both = torch.tensor([share, share / 2])
        mass = kernels.by_mass(scores, first, total, both)[0, head]
        maximum = kernels.by_maximum(scores, first, total, both)[0, head]
        for row in range(rows):
            values = scores[0, head, row].double().tolist()
            assert set(mass[row].nonzero()[:, 0].tolist()) == naive_mass(values, first + row, threshold)
            expected = {n for n in naive_maximum(values, first + row, threshold, total - 1) if n >= 0}
            assert set(maximum[row].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("length, keys", [(700, 700), (300, 900), (1, 650)])
@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("select", ["mass", "maximum"])
def test_attention_against_loops(length, keys, correct, select):
    query, key, value = states(length, keys, seed=keys)
    pattern = BlockSparse(threshold=(0.3, 0.6, 0.8, 0.9), select=select, correct=correct)
    output = pattern.prefill(query, key, value, 0.25)
    scores = kernels.block_scores(query, key, 16, 0.25)
    first, share = (keys - length) // BLOCK, torch.tensor(pattern.threshold)
    choose = kernels.by_mass if select == "mass" else kernels.by_maximum
    blocks = choose(scores, first, -(-keys // BLOCK), share)[0]
    expected = expected_output(query[0], key[0], value[0], 0.25, blocks, correct)
    seen = blocks & (torch.arange(blocks.shape[2]) <= torch.arange(first, blocks.shape[2])[:, None])
    assert torch.equal(kernels.selected_blocks(query, key, 0.25, select, share)[0], seen)
    assert error(output[0], expected) < 2e-6
    if length > BLOCK and select == "mass":
        exact = oracle(query, key, value, Full().mask(keys)[keys - length :], 0.25)
        assert error(output, exact) > 1e-3  # something was left out


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 600), st.data())
def test_all_blocks_are_full_attention(keys, data):
    length = data.draw(st.one_of(st.just(keys), st.integers(1, keys)))
    query, key, value = states(length, keys, batch=2)
    mask = Full().mask(keys)[keys - length :]
    for pattern in (BlockSparse(1.0, "mass"), SparseBlocks(1e-9, "maximum", correct=True)):
        assert error(pattern.prefill(query, key, value, 0.25), oracle(query, key, value, mask, 0.25)) < 3e-6


@pytest.mark.parametrize("pattern", [BlockSparse(0.5), SparseBlocks(0.5, sink=8, window=40)], ids=["full", "sparse"])
def test_prompts_of_unlike_lengths_and_what_follows_them(pattern):
    query, key, value = states(520, 520, batch=3)
    output = pattern.prefill(query, key, value, 0.25, [520, 390, 515])
    for row, length in enumerate([520, 390, 515]):
        one = [part[row : row + 1] for part in (query, key, value)]
        alone = pattern.prefill(*(part[:, :, :length] for part in one), 0.25)
        torch.testing.assert_close(output[row : row + 1, :, :length], alone)
        later = oracle(*one, pattern.later.mask(520), 0.25)
        assert error(output[row : row + 1, :, length:], later[:, :, length:]) < 2e-6 if length < 520 else True


@pytest.mark.gpu
@pytest.mark.parametrize("select", ["mass", "maximum"])
def test_gpus_compute_the_same(select):
    query, key, value = states(900, 1100, batch=2)
    pattern = BlockSparse(threshold=0.5, select=select, correct=True, from_tokens=0)
    expected = pattern.prefill(query, key, value, 0.25)
    output = pattern.prefill(query.cuda(), key.cuda(), value.cuda(), 0.25)
    torch.testing.assert_close(output.cpu(), expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 600))
def test_long_prompts_are_computed_in_smaller_parts(keys):
    query, key, value = states(keys, keys)
    expected = BlockSparse(0.5, correct=True).prefill(query, key, value, 0.25)
    with mock.patch.object(block_sparse, "MASK_SIZE", 1):
        torch.testing.assert_close(BlockSparse(0.5, correct=True).prefill(query, key, value, 0.25), expected)


@pytest.mark.parametrize("kind", [BlockSparse, SparseBlocks])
def test_short_prompts_attend_exactly(kind):
    """Each by its own length, whatever shares its batch and whatever follows it."""
    sizes = {} if kind is BlockSparse else dict(sink=8, window=40)
    pattern, always = (kind(0.01, "mass", from_tokens=least, **sizes) for least in (450, 0))
    query, key, value = states(520, 520, batch=4)
    lengths = [520, 449, 450, 130]
    output = pattern.prefill(query, key, value, 0.25, lengths)
    for row, length in enumerate(lengths):
        one = [part[row : row + 1, :, :length] for part in (query, key, value)]
        exact, selected = kernels.full(*one, 0.25), always.prefill(*one, 0.25)
        assert length < 300 or error(selected, exact) > 1e-3  # something was left out
        torch.testing.assert_close(output[row : row + 1, :, :length], exact if length < 450 else selected)
        torch.testing.assert_close(pattern.prefill(*one, 0.25), exact if length < 450 else selected)
    # What comes behind a context counts with it.
    end = query[:, :, -100:], key, value
    torch.testing.assert_close(pattern.prefill(*end, 0.25), always.prefill(*end, 0.25))


def test_what_is_short_is_measured_by_the_kind_of_device(monkeypatch):
    query = states(40, 40)[0]
    assert kernels.block_sparse_from(query) == 0  # what tests of the definition rely on
    on_gpu = mock.Mock(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 4, 40, 64))
    monkeypatch.setattr(dispatch, "has_triton", lambda device: True)
    monkeypatch.setattr(dispatch, "device_name", lambda device: "some card")
    monkeypatch.setitem(dispatch.BLOCK_SPARSE_FROM, "some other card", 7)
    assert kernels.block_sparse_from(on_gpu) == dispatch.BLOCK_SPARSE_FROM["NVIDIA H200"]
    monkeypatch.setattr(dispatch, "device_name", lambda device: "some other card")
    assert kernels.block_sparse_from(on_gpu) == 7
    on_gpu.dtype = torch.float32
    assert kernels.block_sparse_from(on_gpu) == kernels.UNBOUNDED  # the definition saves nothing
    query, key, value = states(300, 300)
    with mock.patch.object(kernels, "block_sparse_from", return_value=301):
        exact = kernels.full(query, key, value, 0.25)
        assert torch.equal(BlockSparse(0.01, "mass").prefill(query, key, value, 0.25), exact)
        assert not torch.equal(BlockSparse(0.01, "mass", from_tokens=0).prefill(query, key, value, 0.25), exact)


def test_thresholds_that_are_not_given():
    assert BlockSparse() == BlockSparse(0.025, "maximum") and BlockSparse(select="mass").threshold == 0.95
    assert build(BlockSparse().to_dict(), FULL_PATTERNS) == BlockSparse()


def test_what_it_keeps_and_says():
    full, sparse = BlockSparse(threshold=[0.5, 0.7]), SparseBlocks(0.8, sink=64, window=256)
    assert build(full.to_dict(), FULL_PATTERNS) == full and build(sparse.to_dict(), SPARSE_PATTERNS) == sparse
    assert full.later == Full() and sparse.later == Streaming(64, 256)
    assert (full.kept(9000), sparse.kept(9000), sparse.kept(100)) == (9000, 320, 100)
    assert full.pairs(10) == 55  # at most
    for pattern in (full, sparse):
        with pytest.raises(UnsupportedModelError, match="depends on queries and keys"):
            pattern.mask(9)
        with pytest.raises(UnsupportedModelError, match="packed"):
            pattern.spans(9, 9)
    query, key, value = states(40, 40)
    with pytest.raises(UnsupportedModelError, match="2 thresholds, expected 1 or 4"):
        full.prefill(query, key, value, 0.25)
    with pytest.raises(UnsupportedModelError, match="gradients do not flow through block_sparse"):
        sparse.prefill(query.requires_grad_(), key, value, 0.25)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(threshold=0), "threshold is 0"),
        (dict(threshold=1.5), "threshold is 1.5"),
        (dict(threshold=True), "threshold is True"),
        (dict(threshold=[]), "threshold is empty"),
        (dict(threshold=[0.5, "x"]), "threshold is 'x'"),
        (dict(select="best"), "select is 'best'"),
        (dict(stride=7), "stride is 7"),
        (dict(correct=1), "correct is 1"),
        (dict(from_tokens=-1), "from_tokens is -1"),
        (dict(from_tokens=True), "from_tokens is True"),
        (dict(from_tokens=1e4), "from_tokens is 10000.0"),
        (dict(sink=-1), "sink is -1"),
        (dict(window=0), "window is 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(FluxConfigError, match=message):
        SparseBlocks(**sizes)
