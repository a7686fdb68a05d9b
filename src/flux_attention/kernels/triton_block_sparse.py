"""Computes attention to selected blocks of keys by a Triton kernel, for NVIDIA GPUs.

A program computes a block of queries of one head: the blocks of keys of its list, of which its own is the last.
Queries are taken some blocks at a time, so that what is kept of scores and lists is small beside keys and values.

Shape suffixes: B batch, S query length, T key length, H query heads, K KV heads, D head dim, M query blocks, N key
blocks.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from flux_attention.kernels.block_sparse import BLOCK
from flux_attention.kernels.device import capability, on_device, shared_memory
from flux_attention.kernels.triton_attention import LOG2E, _load, _rows
from flux_attention.kernels.triton_block_scores import Paged, _sequence, places, select_blocks
from flux_attention.kernels.triton_prefill import _blocks_of, _like, _rows_contiguous

#: Bytes that the log-sum-exps of scores may take at a time.
SCRATCH = 2**28


@triton.jit
def _keys(
    pointer, table_ptr, batch, kv_head, begin, limit, stride_b, stride_t,
    TMA: tl.constexpr, P: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Load the keys or values of tokens from ``begin`` on, of a batch's row or of a table's pages."""
    if TMA:
        if table_ptr is not None:  # a page holds whole steps
            # Behind the last page any will do: what it holds is masked.
            batch, begin = tl.load(table_ptr + begin // P, mask=begin < limit, other=0), begin % P
        found = pointer.load([batch.to(tl.int32), kv_head.to(tl.int32), begin, 0]).reshape([N, D])
    elif table_ptr is not None:
        j_N = begin + tl.arange(0, N)
        page_N = tl.load(table_ptr + j_N // P, mask=j_N < limit, other=0).to(tl.int64)
        rows_N = page_N * stride_b + j_N % P * stride_t
        found = tl.load(pointer + rows_N[:, None] + tl.arange(0, D)[None, :], mask=(j_N < limit)[:, None], other=0.0)
    else:
        found = _load(pointer + batch * stride_b, begin, stride_t, limit, N, D)
    return found


@triton.jit
def _step(
    query, top, total, acc, key_ptr, value_ptr, table_ptr, begin, limit, masked, i_M, bias_N, batch, kv_head,
    key_b, key_t, value_b, value_t, scale_log2, TMA: tl.constexpr, P: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Add keys from ``begin`` on to the attention state; those at ``limit`` and behind it are not there."""
    key = _keys(key_ptr, table_ptr, batch, kv_head, begin, limit, key_b, key_t, TMA, P, N, D)
    score = tl.dot(query, key.T) * scale_log2
    if masked:
        j_N = begin + tl.arange(0, N)
        score = tl.where((j_N[None, :] <= i_M[:, None]) & (j_N < limit)[None, :], score, float("-inf"))
    if bias_N is not None:
        score += bias_N[None, :]
    new_top = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    value = _keys(value_ptr, table_ptr, batch, kv_head, begin, limit, value_b, value_t, TMA, P, N, D)
    return new_top, total * shrink + tl.sum(weight, 1), tl.dot(weight.to(value.dtype), value, acc * shrink[:, None])


@triton.jit(do_not_specialize=["offset", "T", "first", "blocks", "rows", "from_tokens", "table_b"])
def _attend(
    query_ptr, key_ptr, value_ptr, output_ptr, list_ptr, count_ptr, chosen_ptr, mean_key_ptr, mean_value_ptr,
    starts_ptr, lengths_ptr, routes_ptr, table_ptr,
    query_b, query_h, query_s, key_b, key_h, key_t, value_b, value_h, value_t, output_b, output_h, output_s,
    mean_b, mean_h, mean_n, table_b, offset, T, first, blocks, rows, from_tokens, scale_log2,
    G: tl.constexpr, D: tl.constexpr, P: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Compute a block of queries; with ``chosen_ptr`` other blocks count by their mean key and value."""
    # Later queries see more: they begin first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + block
    count = tl.load(count_ptr + place)
    row = first + block
    if starts_ptr is not None:
        if count == 0:
            return
        sequence, start, offset, T, row = _sequence(
            block, starts_ptr, lengths_ptr, routes_ptr, table_ptr, rows, from_tokens, table_b, M, M
        )
        row += offset // M
        query_ptr += start.to(tl.int64) * query_s
        output_ptr += start.to(tl.int64) * output_s
        table_ptr += sequence.to(tl.int64) * table_b
    kv_head = (head // G).to(tl.int64)
    i_M = row * M + tl.arange(0, M)
    real = ((i_M >= offset) & (i_M < T))[:, None]
    heads = head + tl.zeros([M], tl.int32)
    query = tl.load(_rows(query_ptr, batch, heads, i_M - offset, query_b, query_h, query_s, D), mask=real, other=0.0)
    if not TMA:
        key_ptr += kv_head * key_h
        value_ptr += kv_head * value_h
    acc = tl.zeros([M, D], tl.float32)
    top = tl.full([M], -1e30, tl.float32)  # finite, so that a row without a visible key leaves no NaN
    total = tl.zeros([M], tl.float32)
    list_ptr += place * blocks
    for step in tl.range(0, count * (M // N)):
        begin = tl.load(list_ptr + step // (M // N)) * M + step % (M // N) * N
        top, total, acc = _step(
            query, top, total, acc, key_ptr, value_ptr, table_ptr, begin, T, begin >= row * M, i_M, None, batch,
            kv_head, key_b, key_t, value_b, value_t, scale_log2, TMA, P, N, D,
        )  # fmt: skip
    if chosen_ptr is not None:
        mean_key_ptr += kv_head * mean_h
        mean_value_ptr += kv_head * mean_h
        for begin in tl.range(0, row, N):
            n = begin + tl.arange(0, N)
            dropped = tl.load(chosen_ptr + place * blocks + n, mask=n < row, other=1) == 0
            bias = tl.where(dropped, LOG2_M, float("-inf"))
            top, total, acc = _step(
                query, top, total, acc, mean_key_ptr, mean_value_ptr, None, begin, row, False, i_M, bias, batch,
                kv_head, mean_b, mean_n, mean_b, mean_n, scale_log2, False, P, N, D,
            )  # fmt: skip
    output = (acc / total[:, None]).to(output_ptr.dtype.element_ty)
    tl.store(_rows(output_ptr, batch, heads, i_M - offset, output_b, output_h, output_s, D), output, mask=real)


#: A dropped block counts as all its tokens.
LOG2_M = tl.constexpr(math.log2(BLOCK))


def attend_tile(dim: int, capability: tuple[int, int], shared: int) -> dict[str, int]:
    """Choose the attention kernel's keys of a step, and how it is compiled; ``shared`` as in ``forward_tile``."""
    tile = dict(N=64, num_warps=8, num_stages=2, TMA=(9, 0) <= capability < (12, 0))
    if dim > 128:
        return tile | dict(N=32 if shared >= 140_000 else 16)
    # Few enough registers for two thread blocks on an SM, of which one computes while the other takes its softmax.
    return tile | dict(maxnreg=128) if tile["TMA"] else tile


def rows_at_once(query_BHSD: torch.Tensor, key_BKTD: torch.Tensor, stride: int) -> int:
    """Count the blocks of queries whose scores may be held at a time."""
    blocks = triton.cdiv(key_BKTD.shape[2], BLOCK)
    return max(1, SCRATCH // (len(query_BHSD) * query_BHSD.shape[1] * (BLOCK // stride) * blocks * 4))


def _means(states_BKTD: torch.Tensor) -> torch.Tensor:
    whole = states_BKTD.shape[2] // BLOCK * BLOCK
    means = states_BKTD[:, :, :whole].unflatten(2, (-1, BLOCK)).mean(3, dtype=torch.float32)
    return means.to(states_BKTD.dtype)


def block_sparse(
    query_BHSD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    scale: float,
    mass: bool,
    share: torch.Tensor,
    stride: int,
    correct: bool,
) -> torch.Tensor:
    """
    Compute ``block_sparse.block_sparse``, whose parameters these are; the scratch memory is bounded.

    Of blocks that score alike either all are selected by mass, or none.
    """
    query, key, value = map(_rows_contiguous, (query_BHSD, key_BKTD, value_BKTD))
    length, keys = query.shape[2], key.shape[2]
    first, total = (keys - length) // BLOCK, triton.cdiv(keys, BLOCK)
    output, at_once = _like(query), rows_at_once(query, key, stride)
    tile = attend_tile(query.shape[3], capability(query.device), shared_memory(query.device))
    described = [_blocks_of(states, tile["N"]) for states in (key, value)] if tile["TMA"] else (key, value)
    means = (_means(key), _means(value)) if correct else None
    for row in range(first, total, at_once):
        count = min(at_once, total - row)
        found = select_blocks(query, key, stride, scale, share, mass, row, count, masks=correct)
        _launch(query, key, value, output, tile, described, found, scale, first=row, means=means)
    return output


def paged_block_sparse(
    query_THD: torch.Tensor,
    key_NPKD: torch.Tensor,
    value_NPKD: torch.Tensor,
    output_THD: torch.Tensor,
    paged: Paged,
    scale: float,
    mass: bool,
    share: torch.Tensor,
    stride: int,
) -> None:
    """
    Compute block-sparse attention of sequences whose keys lie in pages, and leave the output of others.

    Parameters
    ----------
    query_THD : torch.Tensor
        The sequences' new tokens behind one another; bf16 or fp16.
    key_NPKD, value_NPKD : torch.Tensor
        The pages of all sequences, with the new tokens in them, and finite wherever memory is a page's; P is a multiple
        of ``stride``.
    output_THD : torch.Tensor
        Written to.
    paged : Paged
    scale, mass, share, stride
        As of ``block_sparse``.
    """
    query, output = (states.transpose(0, 1)[None] for states in (query_THD, output_THD))
    key, value = key_NPKD.transpose(1, 2), value_NPKD.transpose(1, 2)
    group, count = query.shape[1] // key.shape[1], paged.units(query.shape[2], BLOCK)
    size = group * count * (BLOCK // stride) * triton.cdiv(paged.longest, BLOCK) * 4
    at_once = max(1, SCRATCH // size)
    tile = attend_tile(query.shape[3], capability(query.device), shared_memory(query.device))
    tile["TMA"] &= key.shape[2] % tile["N"] == 0  # a step lies in one page
    for head in range(0, key.shape[1], at_once):
        kv_heads, heads = slice(head, head + at_once), slice(head * group, (head + at_once) * group)
        some = query[:, heads], key[:, kv_heads], value[:, kv_heads], output[:, heads]
        own = share if share.numel() == 1 else share[heads]
        described = [_blocks_of(states, tile["N"]) for states in some[1:3]] if tile["TMA"] else some[1:3]
        found = select_blocks(*some[:2], stride, scale, own, mass, 0, count, paged=paged)
        _launch(*some, tile, described, found, scale, paged=paged)


def _launch(query, key, value, output, tile, described, found, scale, first=0, means=None, paged=None) -> None:
    """Attend to what ``select_blocks`` found for blocks of queries from ``first`` on."""
    batch, heads, length, dim = query.shape
    lists, counts, chosen, _ = found
    mean_strides = means[0].stride()[:3] if means else (0, 0, 0)
    where, table_b, several, from_tokens = places(paged)
    keys = key.shape[2]
    with on_device(query):
        _attend[(counts.shape[2], heads, batch)](
            query, *described, output, lists, counts, chosen, *(means or (None, None)), *where,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3], *mean_strides, table_b,
            keys - length, keys, first, lists.shape[3], several, from_tokens, scale * LOG2E.value,
            G=heads // key.shape[1], D=dim, P=keys if paged else None, M=BLOCK, **tile,
        )  # fmt: skip
