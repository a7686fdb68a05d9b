"""Computes block-sparse attention in plain PyTorch, on any device: scores of blocks, a selection, attention inside it.

This defines what is computed. It saves nothing: what is not selected is computed and masked, some query blocks at a
time, so that nothing of the size of S × T is ever made.

Sources: scores by antidiagonals, arXiv 2503.16428 (XAttention); selection by mass, there and in arXiv 2604.07394;
selection by the maximum and the correction for what is dropped, after FlashPrefill (2026).

Shape suffixes: B batch, S query length, T key length, H query heads, K KV heads, D head dim, M query blocks, N key
blocks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

#: Tokens of a block.
BLOCK = 128
#: Query blocks that are computed at a time, at most, and elements of their mask.
ROWS, MASK_SIZE = 8, 2**28
#: By the maximum, what is kept always: the first key blocks, the last ones, and all of the last query blocks. Two first
#: and four last ones, as in the source, took a tenth of a prompt's blocks at 16 K; a lower threshold uses that better.
FIRST, LAST, LAST_ROWS = 1, 2, 1


def _tiles(states: torch.Tensor, stride: int, before: int, behind: int, reverse: bool) -> torch.Tensor:
    """Lay ``stride`` tokens behind one another, over the head dimension: (B, heads, tiles, stride · D)."""
    tiles = F.pad(states.float(), (0, 0, before, behind)).unflatten(2, (-1, stride))
    return (tiles.flip(3) if reverse else tiles).flatten(3)


def block_scores(
    query_BHSD: torch.Tensor, key_BKTD: torch.Tensor, stride: int, scale: float, first_row: int = 0, rows: int = -1
) -> torch.Tensor:
    """
    Estimate how much attention each block of keys gets from each block of queries.

    The products along the antidiagonal of a tile of ``stride`` × ``stride`` tokens are summed, so that every token
    counts once; a softmax over the tiles before a row of queries makes them shares; a block's score is the sum of its
    tiles' shares.

    Parameters
    ----------
    query_BHSD : torch.Tensor
        The last S of T positions.
    stride : int
        Divides ``BLOCK``.
    scale : float
        Of exact attention.
    first_row, rows : int
        Which query blocks, counted from the first one there is; default: all.

    Returns
    -------
    torch.Tensor
        float32 (B, H, M, N); a full row sums to ``BLOCK / stride``, blocks behind a row have 0.
    """
    batch, heads, length, dim = query_BHSD.shape
    kv_heads, keys = key_BKTD.shape[1:3]
    offset, per_block = keys - length, BLOCK // stride
    before, behind = offset % BLOCK, -keys % BLOCK
    place = offset // BLOCK * per_block + first_row * per_block  # of the first tile of queries, among those of keys
    query = _tiles(query_BHSD, stride, before, behind, reverse=True)
    query = query[:, :, first_row * per_block : None if rows < 0 else (first_row + rows) * per_block]
    key = _tiles(key_BKTD, stride, 0, behind, reverse=False)[:, :, : place + query.shape[2]]
    query = query.unflatten(1, (kv_heads, -1))
    scores = torch.einsum("bkgid,bkjd->bkgij", query, key).flatten(1, 2) * (scale / stride)
    i = place + torch.arange(query.shape[3], device=key.device)[:, None]
    j = torch.arange(key.shape[2], device=key.device)[None, :]
    seen = (j <= i) & (j * stride < keys)
    real = ((i + 1) * stride > offset) & (i * stride < keys)  # rows that hold a query
    shares = scores.masked_fill(~seen, float("-inf")).softmax(-1).where(seen & real, 0)
    shares = shares.unflatten(3, (-1, per_block)).unflatten(2, (-1, per_block)).sum((3, 5))
    return F.pad(shares, (0, -(-keys // BLOCK) - shares.shape[3]))


def _places(scores: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers of query blocks (M, 1) and of key blocks (1, N)."""
    rows = torch.arange(scores.shape[-2], device=scores.device)[:, None] + first
    return rows, torch.arange(scores.shape[-1], device=scores.device)[None, :]


def by_mass(scores_BHMN: torch.Tensor, first: int, total: int, share: torch.Tensor) -> torch.Tensor:
    """
    Select blocks, from the highest score down, while those before hold less than a share of the row's.

    The diagonal and the first key block are in always, and count first.

    Parameters
    ----------
    first, total : int
        Number of the first query block; and how many there are in the prompt.
    share : torch.Tensor
        float32 (1) or (H), above 0.
    """
    rows, columns = _places(scores_BHMN, first)
    forced = (columns == rows) | ((columns == 0) & (rows >= 0))
    others = scores_BHMN.masked_fill(forced, -1.0)
    found, order = torch.sort(others, dim=-1, descending=True, stable=True)
    found = found.clamp(min=0)
    before = scores_BHMN.where(forced, 0).sum(-1, keepdim=True) + found.cumsum(-1) - found
    share = share.to(scores_BHMN).reshape(-1, 1, 1)
    # A share of one is all, whatever the sums' rounding makes of the last ones.
    wanted = (before < share * scores_BHMN.sum(-1, keepdim=True)) | (share >= 1)
    chosen = torch.zeros_like(forced.expand_as(scores_BHMN)).scatter(-1, order, wanted)
    return (chosen | forced) & (columns <= rows)


def by_maximum(scores_BHMN: torch.Tensor, first: int, total: int, share: torch.Tensor) -> torch.Tensor:
    """
    Select blocks whose score is at least a share of the row's highest.

    The first, the last two, and all blocks of the prompt's last query block are in always. The parameters are those of
    ``by_mass``.
    """
    rows, columns = _places(scores_BHMN, first)
    chosen = scores_BHMN >= share.to(scores_BHMN).reshape(-1, 1, 1) * scores_BHMN.amax(-1, keepdim=True)
    always = (columns < FIRST) | (columns > rows - LAST) | (rows >= total - LAST_ROWS)
    return (chosen | always) & (columns <= rows)


#: How blocks are selected: float32 scores (B, H, M, N) become bool (B, H, M, N).
SELECT = {"mass": by_mass, "maximum": by_maximum}


def density(blocks_BHMN: torch.Tensor) -> torch.Tensor:
    """Return what share of the causal blocks is selected: float32, the mean over sequences and heads."""
    rows, columns = blocks_BHMN.shape[2:]
    return blocks_BHMN.sum((2, 3)).float().mean() / (rows * (2 * columns - rows + 1) / 2)


def block_sparse(
    query_BHSD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    scale: float,
    select: str,
    share: torch.Tensor,
    stride: int = 16,
    correct: bool = False,
) -> torch.Tensor:
    """
    Compute attention of the last S of T positions to the blocks of keys that are selected; exact inside them.

    Parameters
    ----------
    query_BHSD, key_BKTD, value_BKTD, scale
        As in ``kernels.full``.
    select : {"mass", "maximum"}
        See ``by_mass`` and ``by_maximum``.
    share : torch.Tensor
        float32 (1) or (H).
    stride : int
        See ``block_scores``.
    correct : bool
        Let blocks that are not selected enter the softmax by their mean key and value, with the weight of all their
        tokens.
    """
    length, keys = query_BHSD.shape[2], key_BKTD.shape[2]
    offset, total = keys - length, -(-keys // BLOCK)
    first_block = offset // BLOCK
    most = max(1, min(ROWS, MASK_SIZE // (math.prod(query_BHSD.shape[:2]) * BLOCK * keys)))
    outputs = []
    for row in range(0, total - first_block, most):
        count = min(most, total - first_block - row)
        first = first_block + row
        scores = block_scores(query_BHSD, key_BKTD, stride, scale, row, count)
        blocks = SELECT[select](scores, first, total, share)  # (B, H, M, N)
        start, stop = max(first * BLOCK, offset), min((first + count) * BLOCK, keys)
        i = torch.arange(start, stop, device=query_BHSD.device)
        j = torch.arange(stop, device=query_BHSD.device)
        blocks = blocks[:, :, i // BLOCK - first]  # a row for each query
        seen = blocks[..., j // BLOCK] & (j <= i[:, None])
        states = key_BKTD[:, :, :stop], value_BKTD[:, :, :stop]
        bias = torch.zeros_like(seen, dtype=query_BHSD.dtype).masked_fill(~seen, float("-inf"))
        if correct and first + count > 1:
            whole = stop // BLOCK * BLOCK
            means = [part[:, :, :whole].unflatten(2, (-1, BLOCK)).float().mean(3).to(part.dtype) for part in states]
            states = tuple(torch.cat(both, dim=2) for both in zip(states, means, strict=True))
            n = torch.arange(whole // BLOCK, device=query_BHSD.device)
            dropped = ~blocks[..., n] & (n < (i // BLOCK)[:, None])
            more = torch.full_like(dropped, math.log(BLOCK), dtype=bias.dtype).masked_fill(~dropped, float("-inf"))
            bias = torch.cat([bias, more], dim=-1)
        part = query_BHSD[:, :, start - offset : stop - offset]
        outputs.append(F.scaled_dot_product_attention(part, *states, attn_mask=bias, scale=scale, enable_gqa=True))
    return torch.cat(outputs, dim=2)
