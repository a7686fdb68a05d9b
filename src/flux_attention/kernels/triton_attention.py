"""Computes sink + window attention by Triton kernels, forward and backward, for NVIDIA GPUs.

A program computes a tile of query rows: some positions of some heads that share a KV head. It visits only the blocks
of keys that the pattern needs, and masks only those at the pattern's edges; nothing is built ahead of a call. With a
window of all keys the same kernel is causal attention of the last S of T positions.

Shape suffixes: B batch, S query length, T key length, H query heads, K KV heads, G = H / K, D head dim, M query rows of
a tile, N keys of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
#: Arguments that change from prompt to prompt: compiled once for all values.
SIZES = ["S", "T", "sink", "window"]


@triton.jit
def _mask(i_M, j_N, sink, window, T):
    """Whether query position i sees key j."""
    i, j = i_M[:, None], j_N[None, :]
    return (j <= i) & ((j < sink) | (i - j < window)) & (j < T)


@triton.jit
def _blocks(first, last, sink, window, N: tl.constexpr):
    """
    Return the key blocks of the queries at positions first … last − 1.

    They are ``sinks`` blocks from key 0 on, then others from key ``start`` on, ``count`` in all.
    """
    start = tl.maximum(first - window + 1, 0)
    apart = start > sink
    start = tl.where(apart, start, 0)
    sinks = tl.where(apart, tl.cdiv(sink, N), 0)
    return sinks, start, sinks + tl.cdiv(last - start, N)


@triton.jit
def _block(n, sinks, start, first, last, sink, window, N: tl.constexpr):
    """Return first key and end of the n-th block, and whether some of its keys are hidden from some of the queries."""
    is_sink = n < sinks
    begin = tl.where(is_sink, n * N, start + (n - sinks) * N)
    end = tl.where(is_sink, sink, last)
    inside = (begin + N <= first + 1) & ((begin >= last - window) | (begin + N <= sink))
    return begin, end, ~inside


@triton.jit
def _load(pointer, start, stride, T, N: tl.constexpr, D: tl.constexpr):
    """Load rows start … start + N − 1 of a (T, D) tensor whose rows are ``stride`` apart; zeros behind its end."""
    rows, columns = tl.arange(0, N), tl.arange(0, D)
    pointers = pointer + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    return tl.load(pointers, mask=(start + rows < T)[:, None], other=0.0)


@triton.jit
def _tile(tiles_ptr, sizes_ptr, S, T, sink, window, G: tl.constexpr, M: tl.constexpr, PACK: tl.constexpr):
    """
    Return what a program computes: batch and KV head, its rows' heads and positions, the first position and the end.

    Then come the row of the sequence's first key, what to take from a position for its query's row, and the pattern's
    sizes. Of a pack ``tiles_ptr`` says where each tile is, ``sizes_ptr`` what its span sees (see ``packs``).
    """
    rows, pack = tl.arange(0, M), tl.program_id(1)
    batch, kv_head = tl.program_id(2).to(tl.int64), (pack // (G // PACK)).to(tl.int64)
    if tiles_ptr is None:
        first = T - S + tl.program_id(0) * (M // PACK)
        last = tl.minimum(first + M // PACK, T)
        base, shift = 0, T - S
    else:
        tile = tiles_ptr + tl.program_id(0) * 4
        base, first, last = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
        size = sizes_ptr + tl.load(tile + 3) * 2
        sink, window, shift = tl.load(size), tl.load(size + 1), -base
    i_M = first + rows // PACK
    return batch, kv_head, pack * PACK + rows % PACK, i_M, first, last, base, shift, sink, window


@triton.jit
def _rows(pointer, batch, head_M, row_M, stride_b, stride_h, stride_s, D: tl.constexpr):
    """Return the addresses of a tile's rows in a (B, H, S, D) tensor."""
    offsets = head_M.to(tl.int64) * stride_h + row_M.to(tl.int64) * stride_s
    return pointer + batch * stride_b + offsets[:, None] + tl.arange(0, D)[None, :]


@triton.jit(do_not_specialize=SIZES)
def _forward(
    query_ptr, key_ptr, value_ptr, output_ptr, lse_ptr, tiles_ptr, sizes_ptr,
    query_b, query_h, query_s, key_b, key_h, key_t, value_b, value_h, value_t, output_b, output_h, output_s,
    S, T, sink, window, scale_log2,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PACK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Compute a tile's output; with ``TMA`` keys and values are descriptors of blocks, else addresses."""
    batch, kv_head, head_M, i_M, first, last, base, shift, sink, window = _tile(
        tiles_ptr, sizes_ptr, S, T, sink, window, G, M, PACK
    )
    row_M = i_M - shift
    real_M = i_M < last
    mask = real_M[:, None]
    query = tl.load(_rows(query_ptr, batch, head_M, row_M, query_b, query_h, query_s, D), mask=mask, other=0.0)
    if not TMA:
        key_ptr += batch * key_b + kv_head * key_h
        value_ptr += batch * value_b + kv_head * value_h

    acc = tl.zeros([M, D], tl.float32)
    top = tl.full([M], -1e30, tl.float32)  # finite, so that a block without a visible key leaves no NaN
    total = tl.zeros([M], tl.float32)
    sinks, start, count = _blocks(first, last, sink, window, N)
    for n in tl.range(0, count):
        begin, end, masked = _block(n, sinks, start, first, last, sink, window, N)
        if TMA:
            key = key_ptr.load([batch.to(tl.int32), kv_head.to(tl.int32), base + begin, 0]).reshape([N, D])
        else:
            key = _load(key_ptr, base + begin, key_t, T, N, D)
        score = tl.dot(query, key.T)
        if masked:
            j_N = begin + tl.arange(0, N)
            score = tl.where(_mask(i_M, j_N, sink, window, end), score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1) * scale_log2)
        weight = tl.exp2(score * scale_log2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, 1)
        if TMA:
            value = value_ptr.load([batch.to(tl.int32), kv_head.to(tl.int32), base + begin, 0]).reshape([N, D])
        else:
            value = _load(value_ptr, base + begin, value_t, T, N, D)
        acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None])
        top = new_top

    output = (acc / total[:, None]).to(output_ptr.dtype.element_ty)
    tl.store(_rows(output_ptr, batch, head_M, row_M, output_b, output_h, output_s, D), output, mask=mask)
    if lse_ptr is not None:
        heads = tl.num_programs(1) * PACK
        tl.store(lse_ptr + (batch * heads + head_M) * S + row_M, (top + tl.log2(total)) / LOG2E, mask=real_M)


@triton.jit(do_not_specialize=SIZES)
def _query_gradient(
    query_ptr, key_ptr, value_ptr, grad_ptr, lse_ptr, delta_ptr, dquery_ptr, tiles_ptr, sizes_ptr,
    query_b, query_h, query_s, key_b, key_h, key_t, value_b, value_h, value_t, grad_b, grad_h, grad_s,
    dquery_b, dquery_h, dquery_s,
    S, T, sink, window, scale, scale_log2,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    batch, kv_head, head_M, i_M, first, last, base, shift, sink, window = _tile(
        tiles_ptr, sizes_ptr, S, T, sink, window, G, M, PACK
    )
    row_M = i_M - shift
    real_M = i_M < last
    mask = real_M[:, None]
    query = tl.load(_rows(query_ptr, batch, head_M, row_M, query_b, query_h, query_s, D), mask=mask, other=0.0)
    grad = tl.load(_rows(grad_ptr, batch, head_M, row_M, grad_b, grad_h, grad_s, D), mask=mask, other=0.0)
    statistics = (batch * tl.num_programs(1) * PACK + head_M) * S + row_M
    lse_M = tl.load(lse_ptr + statistics, mask=real_M, other=0.0) * LOG2E
    delta_M = tl.load(delta_ptr + statistics, mask=real_M, other=0.0)
    key_ptr += batch * key_b + kv_head * key_h
    value_ptr += batch * value_b + kv_head * value_h

    acc = tl.zeros([M, D], tl.float32)
    sinks, start, count = _blocks(first, last, sink, window, N)
    for n in tl.range(0, count):
        begin, end, masked = _block(n, sinks, start, first, last, sink, window, N)
        key = _load(key_ptr, base + begin, key_t, T, N, D)
        value = _load(value_ptr, base + begin, value_t, T, N, D)
        weight = tl.exp2(tl.dot(query, key.T) * scale_log2 - lse_M[:, None])
        if masked:
            j_N = begin + tl.arange(0, N)
            weight = tl.where(_mask(i_M, j_N, sink, window, end), weight, 0.0)
        score_grad = weight * (tl.dot(grad, value.T) - delta_M[:, None])
        acc = tl.dot(score_grad.to(key.dtype), key, acc)
    dquery = (acc * scale).to(dquery_ptr.dtype.element_ty)
    tl.store(_rows(dquery_ptr, batch, head_M, row_M, dquery_b, dquery_h, dquery_s, D), dquery, mask=mask)


@triton.jit
def _key_block(blocks_ptr, S, T, splits, N: tl.constexpr):
    """
    Return what a program computes: batch, split, first key, the sequence's length, the row of its first key, and what
    to take from a position for its query's row.

    Then come spans and positions of the queries that matter; of a pack ``blocks_ptr`` has all of it (see ``packs``).
    """
    if blocks_ptr is None:
        batch, split = (tl.program_id(2) // splits).to(tl.int64), tl.program_id(2) % splits
        start, length, base, shift = tl.program_id(0) * N, T, 0, T - S
        first_span, end_span, low, high = 0, 1, T - S, T
    else:
        entry = blocks_ptr + tl.program_id(0) * 7
        batch, split = tl.program_id(2).to(tl.int64), tl.program_id(0)
        base, start, length, shift = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), -tl.load(entry)
        first_span, end_span, low, high = (
            tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6)
        )  # fmt: skip
    return batch, split, start, length, base, shift, first_span, end_span, low, high


@triton.jit
def _reaching(start, low, high, sink, window, split, splits, FAR: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Return the queries among low … high − 1 whose window reaches a block of keys; or a split of those behind."""
    near = start + N - 1 + window
    if FAR:
        begin = tl.maximum(tl.minimum(near, high), low)
        share = tl.cdiv(tl.cdiv(tl.maximum(high - begin, 0), splits), M) * M
        begin += split * share
        end = tl.where(start < sink, tl.minimum(high, begin + share), begin)
    else:
        begin, end = tl.maximum(start, low), tl.minimum(high, near)
    return begin, end


@triton.jit(do_not_specialize=[*SIZES, "splits"])
def _key_gradient(
    query_ptr, key_ptr, value_ptr, grad_ptr, lse_ptr, delta_ptr, dkey_ptr, dvalue_ptr, blocks_ptr, spans_ptr, sizes_ptr,
    query_b, query_h, query_s, key_b, key_h, key_t, value_b, value_h, value_t, grad_b, grad_h, grad_s,
    out_split, out_b, out_h, out_t,
    S, T, sink, window, scale, scale_log2, splits,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """
    Compute the gradients of a block of keys and values.

    They come from the queries whose window reaches it, or (``FAR``) from a split of the later queries, which only see
    its sink keys.
    """
    batch, split, start, length, base, shift, first_span, end_span, low, high = _key_block(blocks_ptr, S, T, splits, N)
    kv_head, columns = tl.program_id(1).to(tl.int64), tl.arange(0, D)
    j_N = start + tl.arange(0, N)
    key = _load(key_ptr + batch * key_b + kv_head * key_h, base + start, key_t, base + length, N, D)
    value = _load(value_ptr + batch * value_b + kv_head * value_h, base + start, value_t, base + length, N, D)

    dkey, dvalue = tl.zeros([N, D], tl.float32), tl.zeros([N, D], tl.float32)
    for span in range(first_span, end_span):
        if blocks_ptr is None:
            begin, end = _reaching(start, low, high, sink, window, split, splits, FAR, M, N)
        else:
            sink, window = tl.load(sizes_ptr + span * 2), tl.load(sizes_ptr + span * 2 + 1)
            bottom = tl.maximum(low, tl.load(spans_ptr + span * 2))
            top = tl.minimum(high, tl.load(spans_ptr + span * 2 + 1))
            begin, end = _reaching(start, bottom, top, sink, window, 0, 1, FAR, M, N)
        for group in range(G):
            head = kv_head * G + group
            statistics = (batch * tl.num_programs(1) * G + head) * S
            query_head = query_ptr + batch * query_b + head * query_h
            grad_head = grad_ptr + batch * grad_b + head * grad_h
            for first in tl.range(begin, end, M):
                i_M = first + tl.arange(0, M)
                real_M = i_M < end
                row = first - shift
                query = _load(query_head, row, query_s, S, M, D)
                grad = _load(grad_head, row, grad_s, S, M, D)
                lse_M = tl.load(lse_ptr + statistics + i_M - shift, mask=real_M, other=0.0) * LOG2E
                delta_M = tl.load(delta_ptr + statistics + i_M - shift, mask=real_M, other=0.0)
                weight = tl.exp2(tl.dot(key, query.T) * scale_log2 - lse_M[None, :])
                mask = tl.trans(_mask(i_M, j_N, sink, window, length)) & real_M[None, :]
                weight = tl.where(mask, weight, 0.0)
                dvalue = tl.dot(weight.to(grad.dtype), grad, dvalue)
                score_grad = weight * (tl.dot(value, grad.T) - delta_M[None, :])
                dkey = tl.dot(score_grad.to(query.dtype), query, dkey)

    row_N = base + j_N
    if blocks_ptr is not None and FAR:  # into a place of the program's own
        row_N = tl.arange(0, N)
    offset = (
        split * out_split + batch * out_b + kv_head * out_h + row_N.to(tl.int64)[:, None] * out_t + columns[None, :]
    )
    real = (j_N < length)[:, None]
    tl.store(dkey_ptr + offset, (dkey * scale).to(dkey_ptr.dtype.element_ty), mask=real)
    tl.store(dvalue_ptr + offset, dvalue.to(dvalue_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["S"])
def _delta(
    output_ptr, grad_ptr, delta_ptr, output_b, output_h, output_s, grad_b, grad_h, grad_s, S,
    D: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Sum output × its gradient over D."""
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * M
    output = _load(output_ptr + batch * output_b + head * output_h, start, output_s, S, M, D)
    grad = _load(grad_ptr + batch * grad_b + head * grad_h, start, grad_s, S, M, D)
    rows = start + tl.arange(0, M)
    delta_M = tl.sum(output.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + (batch * tl.num_programs(1) + head) * S + rows, delta_M, mask=rows < S)
