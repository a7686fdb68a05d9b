"""The Triton kernels of block-sparse prefill, against their definition in plain PyTorch and attention in float64."""

import itertools
import math

import pytest
import torch
from helpers.blocks import BLOCK, expected_output, structured
from helpers.devices import DEVICES
from helpers.oracles import error
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from flux_attention import kernels
from flux_attention.kernels import triton_block_sparse
from flux_attention.kernels.triton_block_scores import Paged, select_blocks

#: KV heads, query heads of each, head dim: small ones for the interpreter, and those of models.
SHAPES = {"cpu": [(1, 2, 16), (2, 1, 32)], "cuda": [(2, 7, 64), (8, 4, 128), (2, 2, 256), (1, 1, 16)]}
#: The interpreter takes seconds for an example.
NO_SHRINKING = [phase for phase in Phase if phase is not Phase.shrink]
SIZES = [(300, 300), (129, 129), (1, 400), (130, 650), (97, 353), (700, 700)]


def inputs(data, device):
    """Draw queries, keys and values with structure, on a device, and their length and number of keys."""
    length, keys = data.draw(st.sampled_from(SIZES))
    kv_heads, group, dim = data.draw(st.sampled_from(SHAPES[device]))
    states = structured(
        length, keys, kv_heads * group, kv_heads, dim, data.draw(st.integers(0, 99)), batch=data.draw(st.integers(1, 2))
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    # Heads inside positions, as projections leave them.
    return [part.transpose(1, 2).contiguous().transpose(1, 2).to(device, dtype) for part in states]


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=4, phases=NO_SHRINKING)
@given(data=st.data())
def test_scores_are_those_of_the_definition(device, data):
    query, key, _ = inputs(data, device)
    stride = data.draw(st.sampled_from([4, 8, 16, 32, 64]))
    length, keys, scale = query.shape[2], key.shape[2], query.shape[3] ** -0.5
    first, total = (keys - length) // BLOCK, -(-keys // BLOCK)
    start = data.draw(st.integers(first, total - 1))
    count = data.draw(st.integers(1, total - start))
    share = torch.tensor([1.0], device=device)
    *_, found = select_blocks(query, key, stride, scale, share, True, start, count, scores=True)
    expected = kernels.block_scores(query, key, stride, scale, start - first, count)
    seen = torch.arange(total) <= torch.arange(start, start + count)[:, None]
    torch.testing.assert_close(found.cpu().where(seen, 0), expected.cpu(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=4, phases=NO_SHRINKING)
@given(data=st.data())
def test_selections_are_those_of_the_definition(device, data):
    query, key, _ = inputs(data, device)
    length, keys, heads, scale = query.shape[2], key.shape[2], query.shape[1], query.shape[3] ** -0.5
    first, total = (keys - length) // BLOCK, -(-keys // BLOCK)
    mass = data.draw(st.booleans())
    share = torch.tensor([data.draw(st.sampled_from([0.05, 0.3, 0.8, 0.95, 1.0])) for _ in range(heads)])
    lists, counts, chosen, score = select_blocks(
        query, key, 16, scale, share.to(device), mass, first, total - first, masks=True, scores=True
    )
    seen = torch.arange(total) <= torch.arange(first, total)[:, None]
    score = score.cpu().where(seen, 0)
    expected = kernels.SELECT["mass" if mass else "maximum"](score, first, total, share)
    # Blocks whose score is at the limit may be on either side, and so may those that are alike.
    torch.testing.assert_close(chosen.cpu().bool().where(seen, False).float().mean(), expected.float().mean(),
                               atol=0.02, rtol=0)  # fmt: skip
    kept, wanted = ((score * mask).sum(-1) for mask in (chosen.cpu().where(seen, 0), expected))
    torch.testing.assert_close(kept, wanted, atol=2e-4, rtol=1e-3)
    for place in itertools.product(*map(range, counts.shape)):
        listed = lists[place][: counts[place]].tolist()
        row = first + place[-1]
        assert listed == chosen[place][: row + 1].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=4, phases=NO_SHRINKING)
@given(data=st.data())
def test_attention_is_exact_inside_what_is_selected(device, data):
    query, key, value = inputs(data, device)
    length, keys, heads, scale = query.shape[2], key.shape[2], query.shape[1], query.shape[3] ** -0.5
    first, total = (keys - length) // BLOCK, -(-keys // BLOCK)
    mass, correct = data.draw(st.booleans()), data.draw(st.booleans())
    share = torch.linspace(0.1, 0.9, heads, device=device)
    output = triton_block_sparse.block_sparse(query, key, value, scale, mass, share, 16, correct)
    _, _, chosen, _ = select_blocks(query, key, 16, scale, share, mass, first, total - first, masks=True)
    for row in range(len(query)):
        blocks = chosen[row].bool().cpu()
        expected = expected_output(*(part[row].cpu().float() for part in (query, key, value)), scale, blocks, correct)
        assert error(output[row].cpu(), expected) < (2e-2 if correct else 1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_few_queries_at_a_time_are_the_same(device, monkeypatch):
    states = [part.to(device, torch.float16) for part in structured(900, 1100, 2, 1, 32, batch=1)]
    share = torch.tensor([0.5], device=device)
    expected = triton_block_sparse.block_sparse(*states, 0.2, False, share, 16, True)
    monkeypatch.setattr(triton_block_sparse, "SCRATCH", 1)
    assert torch.equal(triton_block_sparse.block_sparse(*states, 0.2, False, share, 16, True), expected)


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=4, phases=NO_SHRINKING)
@given(data=st.data())
def test_sequences_in_pages_are_computed_as_alone(device, data):
    """Whatever lies beside them: sparse, short and decoding sequences, which are left alone."""
    kv_heads, group, dim = data.draw(st.sampled_from(SHAPES[device]))
    page = data.draw(st.sampled_from([16, 64, 128]))
    lengths = data.draw(st.lists(st.sampled_from([1, 130, 300, 520]), min_size=1, max_size=3))
    # Of new tokens: all, those of a last chunk, of a decode step.
    queries = [max(1, length - data.draw(st.sampled_from([0, 1, 97, 200]))) for length in lengths]
    queries = [data.draw(st.sampled_from([new, 1])) for new in queries]
    routes = [data.draw(st.sampled_from([1, 1, 0])) for _ in lengths]
    from_tokens = data.draw(st.sampled_from([0, 200]))
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    states = [
        [part.to(device, dtype) for part in structured(new, length, kv_heads * group, kv_heads, dim, row, batch=1)]
        for row, (length, new) in enumerate(zip(lengths, queries, strict=True))
    ]
    share = torch.linspace(0.1, 0.9, kv_heads * group, device=device)
    mass = data.draw(st.booleans())
    key, value, table = in_pages([(k, v) for _, k, v in states], page)
    routes_N = torch.zeros(len(key), dtype=torch.uint8, device=device)
    routes_N[table[:, 0].long()] = torch.tensor(routes, dtype=torch.uint8, device=device)
    query = torch.cat([q[0].transpose(0, 1) for q, _, _ in states])
    output = torch.full_like(query, float("nan"))
    starts = torch.tensor([0, *queries], device=device).cumsum(0).int()
    where = table, starts, torch.tensor(lengths, device=device).int(), routes_N
    paged = Paged(*where, longest=max(lengths) + data.draw(st.sampled_from([0, 300])), from_tokens=from_tokens)
    triton_block_sparse.paged_block_sparse(query, key, value, output, paged, 0.2, mass, share, 16)
    for row, (q, k, v) in enumerate(states):
        mine = output[starts[row] : starts[row + 1]].transpose(0, 1)[None]
        if routes[row] and queries[row] > 1 and lengths[row] >= from_tokens:
            expected = triton_block_sparse.block_sparse(q, k, v, 0.2, mass, share, 16, False)
            torch.testing.assert_close(mine, expected, atol=2e-3, rtol=2e-3)
        else:
            assert mine.isnan().all()


def in_pages(states, page):
    """Put keys and values, (1, K, T, D) each, into pages that lie anywhere; return these and the table."""
    counts = [-(-k.shape[2] // page) for k, _ in states]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(page)) + 1
    table = torch.zeros(len(states), max(counts), dtype=torch.int32)
    example = states[0][0]
    key, value = example.new_full((2, sum(counts) + 1, page, example.shape[1], example.shape[3]), 3e4)
    for row, (both, mine) in enumerate(zip(states, order.split(counts), strict=True)):
        table[row, : len(mine)] = mine
        for pages, new in zip((key, value), both, strict=True):
            flat = pages[mine].flatten(0, 1)
            flat[: new.shape[2]] = new[0].transpose(0, 1)
            pages[mine] = flat.unflatten(0, (len(mine), page))
    return key, value, table.to(example.device)


def test_a_dropped_block_counts_as_all_its_tokens():
    assert triton_block_sparse.LOG2_M.value == math.log2(BLOCK)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_all_blocks_are_full_attention(dim):
    generator = torch.Generator("cuda").manual_seed(dim)
    query, key, value = (
        torch.randn(1, heads, 5000, dim, generator=generator, device="cuda", dtype=torch.bfloat16)
        for heads in (4, 2, 2)
    )
    output = kernels.block_sparse(query, key, value, dim**-0.5, "mass", torch.tensor([1.0]))
    assert error(output, kernels.full(query, key, value, dim**-0.5)) < 1e-2
