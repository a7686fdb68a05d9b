"""The kernels over pages, against attention in float64 by the pattern's mask."""

import pytest
import torch
from helpers.devices import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_attention.kernels.triton_paged import PagedWorkspace, decode, sparse_prefill
from flux_attention.patterns import Full, Streaming

PAGE = 16


def rows_in_pages(lengths, kv_heads, dim, sink, window, routes, generator, device, dtype):
    """Keys and values of rows of these lengths, in pages that lie anywhere; NaN wherever no kernel may look."""
    pages = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(sum(pages) + 3, generator=generator)[: sum(pages)] + 1
    key, value = torch.full((2, sum(pages) + 4, PAGE, kv_heads, dim), float("nan"))
    table = torch.zeros(len(lengths), max(pages) + 1, dtype=torch.int32)
    states, taken = [], 0
    for row, (length, count) in enumerate(zip(lengths, pages, strict=True)):
        mine = order[taken : taken + count]
        taken += count
        table[row, :count] = mine
        k, v = torch.randn(2, length, kv_heads, dim, generator=generator).to(dtype).float()
        states.append((k, v))
        for buffer, new in ((key, k), (value, v)):
            flat = torch.full((count * PAGE, kv_heads, dim), float("nan"))
            flat[:length] = new
            buffer[mine] = flat.view(count, PAGE, kv_heads, dim)
        first, last = -(-sink // PAGE), (length - window) // PAGE
        if not routes[row] and last > first:  # pages between sink and window went back, whoever has them now
            key[mine[first:last]] = value[mine[first:last]] = float("nan")
    routes_N = torch.zeros(len(key), dtype=torch.uint8)
    routes_N[table[:, 0].long()] = torch.tensor(routes, dtype=torch.uint8)
    places = [tensor.to(device) for tensor in (table, routes_N)]
    return states, key.to(device, dtype), value.to(device, dtype), *places


def expected(query_SHD, key_TKD, value_TKD, pattern):
    """Attention of the last S of T tokens, in float64."""
    group = query_SHD.shape[1] // key_TKD.shape[1]
    key, value = (states.double().repeat_interleave(group, 1) for states in (key_TKD, value_TKD))
    scores = torch.einsum("shd,thd->hst", query_SHD.double(), key) * query_SHD.shape[-1] ** -0.5
    seen = pattern.mask(len(key_TKD))[-len(query_SHD) :]
    return torch.einsum("hst,thd->shd", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_sparse_rows_see_sink_and_window_and_full_rows_are_left_alone(device, data):
    sink, window = data.draw(st.sampled_from([0, 5, 32])), data.draw(st.sampled_from([1, 7, 40]))
    lengths = data.draw(st.lists(st.integers(1, 190), min_size=1, max_size=3))
    queries = [data.draw(st.integers(1, length)) for length in lengths]
    routes = [data.draw(st.booleans()) for _ in lengths]
    kv_heads, group, dim = data.draw(st.sampled_from([(1, 1, 16), (2, 3, 32), (1, 4, 64)]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    # The chunk's first query needs the window before it.
    states, key, value, table, routes_N = rows_in_pages(
        lengths, kv_heads, dim, sink, window + max(queries), routes, generator, device, dtype
    )
    query = torch.randn(sum(queries), kv_heads * group, dim, generator=generator).to(device, dtype)
    output = torch.full_like(query, float("nan"))
    starts = torch.tensor([0, *queries], device=device).cumsum(0).int()
    sparse_prefill(
        query, key, value, output, table, starts, torch.tensor(lengths, device=device).int(), routes_N, sink, window,
        dim**-0.5,
    )  # fmt: skip
    for row, (k, v) in enumerate(states):
        mine = slice(starts[row].item(), starts[row + 1].item())
        if routes[row]:
            assert output[mine].isnan().all()
        else:
            want = expected(query[mine].cpu(), k, v, Streaming(sink, window))
            torch.testing.assert_close(output[mine].cpu().double(), want, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_a_step_of_rows_of_all_routes_and_lengths(device, data):
    sink, window = data.draw(st.sampled_from([0, 5, 32])), data.draw(st.sampled_from([1, 40, 200]))
    lengths = data.draw(st.lists(st.integers(1, 600), min_size=1, max_size=4))
    routes = [data.draw(st.booleans()) for _ in lengths]
    kv_heads, group, dim = data.draw(st.sampled_from([(1, 1, 16), (2, 3, 32), (1, 7, 64)]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    states, key, value, table, routes_N = rows_in_pages(
        lengths, kv_heads, dim, sink, window, routes, generator, device, dtype
    )
    padding = data.draw(st.integers(0, 2))  # rows that a CUDA graph has beyond the batch
    table = torch.cat([table, table.new_zeros(padding, table.shape[1])])
    rows = len(lengths) + padding
    query = torch.randn(rows, kv_heads * group, dim, generator=generator).to(device, dtype)
    output = torch.full_like(query, float("nan"))
    workspace = PagedWorkspace(8, kv_heads * group, kv_heads, dim, torch.device(device))
    all_lengths = torch.tensor([*lengths, *[0] * padding], device=device).int()
    for _ in range(2):  # the workspace is left as it was
        decode(query, key, value, output, table, all_lengths, routes_N, workspace, sink, window, dim**-0.5)
        for row, (k, v) in enumerate(states):
            want = expected(query[row : row + 1].cpu(), k, v, Full() if routes[row] else Streaming(sink, window))
            torch.testing.assert_close(output[row : row + 1].cpu().double(), want, atol=0.02, rtol=0.02)
        assert not output[len(lengths) :].any()
        output.fill_(float("nan"))
    assert not workspace.count.any()
