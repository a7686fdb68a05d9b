"""A step of rows of all kinds through the attention of either platform; that of GPUs by Triton's interpreter."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_attention.patterns import BlockSparse, Full, Streaming
from flux_attention.serving.backend import DecodeGraphs, OnCpu, OnGpu, RoutedLayer
from flux_attention.serving.routes import Unrotation

PAGE, DIM, HEADS, KV_HEADS, SINK, WINDOW = 16, 16, 4, 2, 20, 24


@dataclass
class Metadata:
    num_actual_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_seq_len: int
    slot_mapping: None = None


class Stock:
    """Stands for vLLM's implementation: full attention of all rows, and nonsense for rows of no keys."""

    head_size, scale = DIM, DIM**-0.5

    def forward(self, layer, query, key, value, kv_cache, metadata, output):
        self.rows = metadata.seq_lens.tolist()
        for row, length in enumerate(self.rows):
            new = slice(*metadata.query_start_loc[row : row + 2].tolist())
            output[new] = float("nan")
            if length:
                output[new] = expected(query[new], *self.states[row], Full()).to(output.dtype)


def expected(query_SHD, key_TKD, value_TKD, pattern):
    key, value = (states.double().repeat_interleave(HEADS // KV_HEADS, 1) for states in (key_TKD, value_TKD))
    scores = torch.einsum("shd,thd->hst", query_SHD.double(), key) * DIM**-0.5
    seen = pattern.mask(len(key))[-len(query_SHD) :]
    return torch.einsum("hst,thd->shd", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)


def caches(platform, pages):
    """An empty KV cache as vLLM lays it out there, with what writes a token to it."""
    if platform is OnGpu:
        cache = torch.full((pages, KV_HEADS, PAGE, 2 * DIM), 9.0, dtype=torch.float16)

        def write(page, place, key, value):
            cache[page, :, place] = torch.cat([key, value], -1)
    else:
        cache = torch.full((pages, KV_HEADS, PAGE, 2 * DIM), 9.0)
        both = cache.view(pages, KV_HEADS, 2, PAGE * DIM)

        def write(page, place, key, value):
            both[page, :, 0].view(KV_HEADS, DIM, PAGE)[:, :, place] = key
            both[page, :, 1].view(KV_HEADS, PAGE, DIM)[:, place] = value

    return cache, write


INTERPRETED = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="run with TRITON_INTERPRET=1")


@pytest.mark.parametrize("platform", [pytest.param(OnGpu, marks=INTERPRETED), OnCpu])
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_full_rows_are_vllms_and_sparse_ones_ours(platform, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    decodes = data.draw(st.booleans())
    lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=3))
    # All blocks are selected, so that attention is exact.
    from_tokens = data.draw(st.sampled_from([None, 0, 100]))
    blocks = None if from_tokens is None else BlockSparse(1.0, "mass", from_tokens=from_tokens)
    queries = [1 if decodes else data.draw(st.integers(1, length)) for length in lengths]
    routes = [data.draw(st.booleans()) for _ in lengths]
    counts = [-(-length // PAGE) for length in lengths]
    cache, write = caches(platform, sum(counts) + 1)
    order = (torch.randperm(sum(counts), generator=generator) + 1).split(counts)
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    impl = type("Implementation", (platform, Stock), {})()
    impl.states = []
    for row, (length, pages) in enumerate(zip(lengths, order, strict=True)):
        table[row, : len(pages)] = pages
        key, value = torch.randn(2, length, KV_HEADS, DIM, generator=generator).to(cache.dtype)
        impl.states.append((key, value))
        for token in range(length):
            write(int(pages[token // PAGE]), token % PAGE, key[token], value[token])
    routes_N = torch.zeros(len(cache), dtype=torch.uint8)
    routes_N[table[:, 0].long()] = torch.tensor(routes, dtype=torch.uint8)
    workspace = None
    if platform is OnGpu:
        from flux_attention.kernels.triton_paged import PagedWorkspace

        workspace = PagedWorkspace(4, HEADS, KV_HEADS, DIM, torch.device("cpu"))
    impl.routed = RoutedLayer(
        place=0, sink=SINK, window=WINDOW, unrotate=Unrotation(None), routes_N=routes_N, blocks=blocks,
        workspace=workspace,
    )  # fmt: skip
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    total = sum(queries)
    query = torch.randn(total, HEADS, DIM, generator=generator).to(cache.dtype)
    output = torch.full((total, HEADS, DIM), float("nan"), dtype=cache.dtype)
    metadata = Metadata(total, max(queries), starts, torch.tensor(lengths).int(), table, max(lengths))
    impl.forward(None, query, None, None, cache, metadata, output)
    for row, full in enumerate(routes):
        new = slice(starts[row], starts[row + 1])
        want = expected(query[new], *impl.states[row], Full() if full else Streaming(SINK, WINDOW))
        torch.testing.assert_close(output[new].double(), want, atol=0.01, rtol=0.01)
    if platform is OnGpu:
        if max(queries) == 1:  # ours alone: a CUDA graph may hold it
            assert not hasattr(impl, "rows")
        else:
            rows = zip(lengths, queries, routes, strict=True)
            theirs = [full and not (blocks and new > 1 and length >= from_tokens) for length, new, full in rows]
            assert impl.rows == [length * own for length, own in zip(lengths, theirs, strict=True)]


@dataclass
class Built:
    """Metadata, and the builder that made it."""

    by: int
    starts: torch.Tensor
    max_seq_len: int
    block_table: object = None


def test_builders_of_a_step_share_what_they_build():
    class Own:
        def __init__(self, number):
            self.number = number

        def build(self, common_prefix_len, common, fast_build):
            return Built(self.number, common.query_start_loc, common.max_seq_len, common.block_table_tensor)

        def update_block_table(self, metadata, table, slots):
            return replace(metadata, block_table=table)

    class Builder(DecodeGraphs, Own):
        latest: ClassVar = [(), None]

    def common(table, **other):
        return SimpleNamespace(**{**step, **other}, block_table_tensor=table, slot_mapping=None)

    first, second = Builder(0), Builder(1)
    starts = torch.tensor([0, 1])
    step = dict(num_reqs=1, num_actual_tokens=1, max_query_len=1, max_seq_len=9, causal=True)
    step |= dict(query_start_loc=starts, seq_lens=torch.tensor([9]))
    assert first.build(0, common("a")) == Built(0, starts, 9, "a")
    assert second.build(0, common("b")) == Built(0, starts, 9, "b")
    assert second.build(0, common("b", max_seq_len=10)) == Built(1, starts, 10, "b")
    later = torch.tensor([0, 1])  # the same numbers elsewhere: what is there may change
    assert first.build(0, common("a", max_seq_len=10, query_start_loc=later)).by == 0
