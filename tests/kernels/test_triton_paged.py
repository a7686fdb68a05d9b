"""The kernels over pages, against attention in float64 by the pattern's mask."""

import pytest
import torch
from helpers.devices import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_attention.kernels.triton_paged import PagedWorkspace, decode, sparse_prefill
from flux_attention.patterns import Full, Streaming

#: KV heads, query heads of each, head dim: small ones for the interpreter, and those of models.
SHAPES = {"cpu": [(1, 1, 16), (2, 3, 32), (1, 7, 64)], "cuda": [(2, 7, 64), (8, 4, 128), (2, 2, 256), (1, 1, 16)]}


def in_layout_of(version, key_NPKD, value_NPKD):
    """Put pages as vLLM keeps them, and view them as its keys and values again."""
    if version == "0.25":  # (N, 2, P, K, D)
        return torch.stack([key_NPKD, value_NPKD], 1).unbind(1)
    both = torch.cat([key_NPKD, value_NPKD], -1).transpose(1, 2).contiguous()  # (N, K, P, 2 D)
    return both.transpose(1, 2).split(key_NPKD.shape[-1], dim=-1)


def rows_in_pages(lengths, kv_heads, dim, sink, window, routes, generator, device, dtype, page=16):
    """Keys and values of rows of these lengths, in pages that lie anywhere; NaN wherever no kernel may look."""
    pages = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(pages) + 3, generator=generator)[: sum(pages)] + 1
    key, value = torch.full((2, sum(pages) + 4, page, kv_heads, dim), float("nan"))
    table = torch.zeros(len(lengths), max(pages) + 1, dtype=torch.int32)
    states, taken = [], 0
    for row, (length, count) in enumerate(zip(lengths, pages, strict=True)):
        mine = order[taken : taken + count]
        taken += count
        table[row, :count] = mine
        k, v = torch.randn(2, length, kv_heads, dim, generator=generator).to(dtype).float()
        states.append((k, v))
        for buffer, new in ((key, k), (value, v)):
            flat = torch.full((count * page, kv_heads, dim), float("nan"))
            flat[:length] = new
            buffer[mine] = flat.view(count, page, kv_heads, dim)
        first, last = -(-sink // page), (length - window) // page
        if not routes[row] and last > first:  # pages between sink and window went back, whoever has them now
            key[mine[first:last]] = value[mine[first:last]] = float("nan")
    routes_N = torch.zeros(len(key), dtype=torch.uint8)
    routes_N[table[:, 0].long()] = torch.tensor(routes, dtype=torch.uint8)
    layout = "0.25" if sum(lengths) % 2 else "0.32"
    key, value = in_layout_of(layout, key.to(device, dtype), value.to(device, dtype))
    return states, key, value, table.to(device), routes_N.to(device)


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
    sink, window = data.draw(st.sampled_from([0, 5, 32])), data.draw(st.sampled_from([1, 40, 200]))
    lengths = data.draw(st.lists(st.integers(1, 450), min_size=1, max_size=3))
    queries = [data.draw(st.integers(1, length)) for length in lengths]
    routes = [data.draw(st.booleans()) for _ in lengths]
    kv_heads, group, dim = data.draw(st.sampled_from(SHAPES[device]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    # The chunk's first query needs the window before it.
    states, key, value, table, routes_N = rows_in_pages(
        lengths, kv_heads, dim, sink, window + max(queries), routes, generator, device, dtype,
        page=data.draw(st.sampled_from([16, 32, 64, 128])),
    )  # fmt: skip
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
    kv_heads, group, dim = data.draw(st.sampled_from(SHAPES[device]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    states, key, value, table, routes_N = rows_in_pages(
        lengths, kv_heads, dim, sink, window, routes, generator, device, dtype,
        page=data.draw(st.sampled_from([16, 64])),
    )  # fmt: skip
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


@pytest.mark.gpu
def test_a_graph_of_a_step_serves_all_routes_and_lengths():
    generator, lengths, dim = torch.Generator().manual_seed(0), [700, 90, 1500], 128
    states, key, value, table, routes_N = rows_in_pages(
        lengths, 8, dim, 32, 200, [True] * 3, generator, "cuda", torch.bfloat16
    )
    query = torch.randn(3, 32, dim, generator=generator).to("cuda", torch.bfloat16)
    output, counts = torch.empty_like(query), torch.tensor(lengths, device="cuda").int()
    workspace = PagedWorkspace(3, 32, 8, dim, query.device)

    def step():
        decode(query, key, value, output, table, counts, routes_N, workspace, 32, 200, dim**-0.5)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for routes, shorter in (([1, 0, 1], 0), ([0, 0, 0], 40), ([0, 1, 1], 80)):
        routes_N[table[:, 0].long()] = torch.tensor(routes, dtype=torch.uint8, device="cuda")
        counts.copy_(torch.tensor(lengths) - shorter)
        graph.replay()
        for row, (k, v) in enumerate(states):
            pattern, end = Full() if routes[row] else Streaming(32, 200), lengths[row] - shorter
            want = expected(query[row : row + 1].cpu(), k[:end], v[:end], pattern)
            torch.testing.assert_close(output[row : row + 1].cpu().double(), want, atol=0.02, rtol=0.02)
