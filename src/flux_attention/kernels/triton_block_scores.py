"""Scores blocks of keys for each block of queries, and selects some, by Triton kernels for NVIDIA GPUs.

``block_sparse`` defines what is computed. The scores are a matrix product, of tiles of ``stride`` tokens, one behind
the other; each program keeps one number of a tile of queries and a block of keys: the log-sum-exp of the tiles in it. A
second kernel makes shares of these and selects: by the maximum at once, by mass by bisection instead of a sort. It
leaves lists of blocks, on the device, so that nothing waits.

Sequences are a batch of one length, or lie as vLLM's do: new tokens behind one another, and keys in pages. Of these
the host knows neither lengths nor routes, so ``_sequence`` finds on the device what a program is for.

Shape suffixes: B batch, S query length, T key length, H query heads, K KV heads, G = H / K, D head dim, M query blocks,
N key blocks, R query tiles. Of sequences in pages: T tokens of all, N pages in all, P tokens of a page, L pages of a
sequence at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from flux_attention.kernels.block_sparse import BLOCK, FIRST, LAST, LAST_ROWS
from flux_attention.kernels.device import on_device
from flux_attention.kernels.triton_attention import LOG2E
from flux_attention.kernels.triton_prefill import _rows_contiguous

#: Steps of the bisection: the highest score is told from one that is smaller by a factor of 2 ** -STEPS.
STEPS = tl.constexpr(26)


@triton.jit
def _sequence(
    unit, starts_ptr, lengths_ptr, routes_ptr, table_ptr, rows, from_tokens, table_b,
    BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """
    Find the sequence of a program that computes ``UNIT`` tokens of queries, of those that lie behind one another.

    Sequence r has the units from starts[r] // UNIT + 2 r on: as many as it may need, however its tokens lie in blocks.
    Returns which it is, where its new tokens start, how many tokens are before these, how many there are in all (0 if
    there is nothing to compute), and which of its units the program is.
    """
    low, high = unit * 0, rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) // UNIT + 2 * middle <= unit:
            low = middle
        else:
            high = middle
    start, length = tl.load(starts_ptr + low), tl.load(lengths_ptr + low)
    queries = tl.load(starts_ptr + low + 1) - start
    offset = length - queries
    full = tl.load(routes_ptr + tl.load(table_ptr + low.to(tl.int64) * table_b).to(tl.int64)) != 0
    unit -= start // UNIT + 2 * low
    there = full & (queries > 1) & (length >= from_tokens) & (offset // BLOCK * BLOCK + unit * UNIT < length)
    return low, start, offset, tl.where(there, length, 0), unit


@triton.jit(do_not_specialize=["offset", "T", "first", "tiles", "blocks", "rows", "from_tokens", "table_b"])
def _tile_scores(
    query_ptr, key_ptr, lse_ptr, starts_ptr, lengths_ptr, routes_ptr, table_ptr,
    query_b, query_h, query_s, key_b, key_h, key_t, table_b,
    offset, T, first, tiles, blocks, rows, from_tokens, scale_log2,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr, PER: tl.constexpr, P: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Compute, of M tiles of queries, the log-sum-exps (base 2) over the tiles of each of N / PER blocks of keys."""
    group, j = tl.program_id(0), tl.program_id(1) * N + tl.arange(0, N)
    batch, head = (tl.program_id(2) // H).to(tl.int64), (tl.program_id(2) % H).to(tl.int64)
    place = tl.program_id(2).to(tl.int64) * tiles  # of the sequence's first tile
    if starts_ptr is not None:
        row, start, offset, T, group = _sequence(
            group, starts_ptr, lengths_ptr, routes_ptr, table_ptr, rows, from_tokens, table_b, PER * STRIDE, M * STRIDE
        )
        first = offset // (PER * STRIDE) * PER
        place += (start // (PER * STRIDE) + 2 * row) * PER
        tiles = tl.cdiv(T, PER * STRIDE) * PER - first
        query_ptr += start.to(tl.int64) * query_s
        table_ptr += row.to(tl.int64) * table_b
    i = group * M + tl.arange(0, M)
    # What lies behind the queries is never asked for.
    if (tl.program_id(1) * N < first + (group + 1) * M) & (tl.program_id(1) * N * STRIDE < T):
        query_ptr += batch * query_b + head * query_h
        key_ptr += head // G * key_h
        # Where the tiles of keys begin; one lies in one page.
        if table_ptr is not None:
            page = tl.load(table_ptr + j * STRIDE // P, mask=j * STRIDE < T, other=0).to(tl.int64)
            begin = page * key_b + j * STRIDE % P * key_t
        else:
            begin = batch * key_b + j.to(tl.int64) * STRIDE * key_t
        scores = tl.zeros([M, N], tl.float32)
        for step in tl.range(0, STRIDE * (D // C)):
            token, dims = step // (D // C), step % (D // C) * C + tl.arange(0, C)
            queries = (first + i) * STRIDE + STRIDE - 1 - token  # in reverse order
            query = tl.load(
                query_ptr + (queries - offset).to(tl.int64)[:, None] * query_s + dims[None, :],
                mask=((queries >= offset) & (queries < T))[:, None], other=0.0,
            )  # fmt: skip
            key = tl.load(
                key_ptr + (begin + token * key_t)[:, None] + dims[None, :],
                mask=(j * STRIDE + token < T)[:, None], other=0.0,
            )  # fmt: skip
            scores = tl.dot(query, key.T, scores)
        seen = (j[None, :] <= first + i[:, None]) & (j * STRIDE < T)[None, :]
        scores = tl.where(seen, scores * scale_log2, float("-inf")).reshape([M, N // PER, PER])
        top = tl.max(scores, 2)
        top = tl.where(top == float("-inf"), 0.0, top)
        lse = top + tl.log2(tl.sum(tl.exp2(scores - top[:, :, None]), 2))
        block = tl.program_id(1) * (N // PER) + tl.arange(0, N // PER)
        there = (i < tiles)[:, None] & (block < blocks)[None, :]
        tl.store(lse_ptr + (place + i)[:, None] * blocks + block[None, :], lse, mask=there)


@triton.jit(do_not_specialize=["offset", "T", "first", "blocks", "rows", "from_tokens", "table_b"])
def _select(
    lse_ptr, share_ptr, list_ptr, count_ptr, chosen_ptr, score_ptr, starts_ptr, lengths_ptr, routes_ptr, table_ptr,
    table_b, offset, T, first, blocks, rows, from_tokens, share_h,
    H: tl.constexpr, STRIDE: tl.constexpr, PER: tl.constexpr, MASS: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """List the blocks of keys that a block of queries of a head sees, in order: its own is the last."""
    place = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    row = first + tl.program_id(0)
    if starts_ptr is not None:
        _, _, offset, T, row = _sequence(
            tl.program_id(0), starts_ptr, lengths_ptr, routes_ptr, table_ptr, rows, from_tokens, table_b, PER * STRIDE,
            PER * STRIDE,
        )  # fmt: skip
        row += offset // (PER * STRIDE)
        if T == 0:
            tl.store(count_ptr + place, 0)
            return
    n = tl.arange(0, NP)
    seen = n <= row
    score = tl.zeros([NP], tl.float32)
    for tile in tl.static_range(PER):
        i = row * PER + tile
        real = ((i + 1) * STRIDE > offset) & (i * STRIDE < T)
        upto = tl.where(real, row, -1)  # not `seen & real`: of a block and a scalar Triton's interpreter makes no mask
        lse = tl.load(lse_ptr + (place * PER + tile) * blocks + n, mask=n <= upto, other=float("-inf"))
        top = tl.max(lse, 0)
        weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
        sum = tl.sum(weight, 0)
        score += weight / tl.where(sum > 0, sum, 1.0)
    if score_ptr is not None:
        tl.store(score_ptr + place * blocks + n, score, mask=n < blocks)
    share = tl.load(share_ptr + tl.program_id(1) % H * share_h)
    if MASS:
        forced = (n == row) | (n == 0)
        held, wanted = tl.sum(tl.where(forced, score, 0.0), 0), share * tl.sum(score, 0)
        others = tl.where(forced, 0.0, score)
        # The scores above ``low`` hold enough, with those that are forced; the scores above ``high`` do not.
        low, high = tl.zeros([], tl.float32), tl.max(others, 0)
        for _ in tl.range(STEPS):
            middle = (low + high) * 0.5
            enough = held + tl.sum(tl.where(others > middle, others, 0.0), 0) >= wanted
            low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        low = tl.where(held < wanted, low, float("inf"))
        chosen = forced | (others > tl.where(share < 1.0, low, -1.0))
    else:
        before_last = tl.where(row >= tl.cdiv(T, PER * STRIDE) - ALL_ROWS, -1, row - LAST_BLOCKS)
        chosen = (score >= share * tl.max(score, 0)) | (n < FIRST_BLOCKS) | (n > before_last)
    chosen &= seen
    if chosen_ptr is not None:
        tl.store(chosen_ptr + place * blocks + n, chosen.to(tl.uint8), mask=n < blocks)
    where = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(list_ptr + place * blocks + where, n, mask=chosen)
    tl.store(count_ptr + place, tl.sum(chosen.to(tl.int32), 0))


FIRST_BLOCKS, LAST_BLOCKS, ALL_ROWS = tl.constexpr(FIRST), tl.constexpr(LAST), tl.constexpr(LAST_ROWS)


@dataclass
class Paged:
    """
    Says where the sequences of a step lie: new tokens behind one another, as (1, H, T, D), and keys in pages.

    Only sequences of several new tokens that are full and long enough are computed.

    Attributes
    ----------
    table_BL : torch.Tensor
        int32, each sequence's pages in order.
    starts : torch.Tensor
        int32 (B + 1), where each one's new tokens start.
    lengths_B : torch.Tensor
        int32, its tokens, the new ones included.
    routes_N : torch.Tensor
        uint8, at a sequence's first page whether it is full (1) or sparse (0).
    longest : int
        Tokens of the longest sequence, at least.
    from_tokens : int
        Tokens that a sequence has to have.
    """

    table_BL: torch.Tensor
    starts: torch.Tensor
    lengths_B: torch.Tensor
    routes_N: torch.Tensor
    longest: int
    from_tokens: int = 0

    def units(self, tokens: int, unit: int) -> int:
        """Count the pieces of ``unit`` tokens that so many new tokens may need, as ``_sequence`` counts them."""
        return tokens // unit + 2 * len(self.lengths_B)


def score_tile(dim: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return the sizes of the scores' product for heads of this dimension, and how it is compiled."""
    return dict(M=128, N=128, C=min(dim, 64)), dict(num_warps=8, num_stages=3)


def select_blocks(
    query_BHSD: torch.Tensor,
    key_BKTD: torch.Tensor,
    stride: int,
    scale: float,
    share: torch.Tensor,
    mass: bool,
    first: int,
    count: int,
    *,
    paged: Paged | None = None,
    masks: bool = False,
    scores: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """
    Select blocks of keys for some blocks of queries; see ``block_sparse`` for what.

    Parameters
    ----------
    query_BHSD, key_BKTD : torch.Tensor
        bf16 or fp16; the last S of T positions. If ``paged``, new tokens and pages: (1, H, T, D) and
        (N, K, P, D).
    stride : int
        Divides ``BLOCK``, and the pages' tokens.
    scale : float
        Of exact attention.
    share : torch.Tensor
        float32 (1) or (H), on the same device.
    mass : bool
        Select by mass; else by the maximum.
    first, count : int
        Blocks of queries, counted from the first block of keys; if ``paged``, 0 and ``units``.
    paged : Paged, optional
    masks, scores : bool
        Whether to return these, too.

    Returns
    -------
    lists : torch.Tensor
        int32 (B, H, M, N): the numbers of the blocks that are selected, in order; the queries' own is the last.
    counts : torch.Tensor
        int32 (B, H, M), how many they are: 0 where nothing is computed. What stands behind them is not defined.
    chosen, score : torch.Tensor or None
        uint8 and float32 (B, H, M, N), where they were asked for; undefined behind the queries' own block.
    """
    query_BHSD, key_BKTD = map(_rows_contiguous, (query_BHSD, key_BKTD))
    batch, heads, length, dim = query_BHSD.shape
    keys, per_block = paged.longest if paged else key_BKTD.shape[2], BLOCK // stride
    total, tiles = triton.cdiv(keys, BLOCK), count * per_block
    sizes, options = score_tile(dim)
    new, shape = query_BHSD.new_empty, (batch, heads, count, total)
    lse = new(batch * heads, tiles, total, dtype=torch.float32)
    lists, counts = new(shape, dtype=torch.int32), new(shape[:3], dtype=torch.int32)
    chosen = new(shape, dtype=torch.uint8) if masks else None
    score = new(shape, dtype=torch.float32) if scores else None
    rows = paged.units(length, sizes["M"] * stride) if paged else triton.cdiv(tiles, sizes["M"])
    seen = total if paged else first + count  # to the last query's own
    where, table_b, several, from_tokens = places(paged)
    constants = dict(H=heads, STRIDE=stride, PER=per_block)
    with on_device(query_BHSD):
        _tile_scores[(rows, triton.cdiv(seen * per_block, sizes["N"]), batch * heads)](
            query_BHSD, key_BKTD, lse, *where, *query_BHSD.stride()[:3], *key_BKTD.stride()[:3], table_b,
            keys - length, keys, first * per_block, tiles, total, several, from_tokens, scale / stride * LOG2E.value,
            G=heads // key_BKTD.shape[1], D=dim, P=key_BKTD.shape[2] if paged else None,
            **constants, **sizes, **options,
        )  # fmt: skip
        _select[(count, batch * heads)](
            lse, share, lists, counts, chosen, score, *where, table_b, keys - length, keys, first, total, several,
            from_tokens, 0 if share.numel() == 1 else 1, MASS=mass, NP=triton.next_power_of_2(seen), **constants,
            num_warps=8,
        )  # fmt: skip
    return lists, counts, chosen, score


def places(paged: Paged | None) -> tuple:
    """Return what kernels take to find sequences: tensors, the table's stride, how many there are and the shortest."""
    if paged is None:
        return (None,) * 4, 0, 0, 0
    where = paged.starts, paged.lengths_B, paged.routes_N, paged.table_BL
    return where, paged.table_BL.stride(0), len(paged.lengths_B), paged.from_tokens
