"""Computes sink + window attention by whole blocks of tokens: each block of queries sees whole blocks of keys.

Every block of queries is a short sequence of its own behind the keys that it sees, so any kernel for causal attention
computes it. The keys are copied for that, some blocks at a time: slower than a kernel that reads them where they are.

Shape suffixes: B batch, S query length, T key length, N blocks, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import torch

from flux_attention.kernels.dispatch import full

#: Blocks, of all sequences, whose keys are copied at a time.
BLOCKS = 64


def block_streaming(
    query_BHSD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    sink: int,
    window: int,
    block: int,
    scale: float,
) -> torch.Tensor:
    """
    Compute attention of the last S of T positions to the first keys and to the latest blocks of keys.

    Key j is seen by query i if j ≤ i and (j < sink or i // block − j // block < window / block).

    Parameters
    ----------
    query_BHSD, key_BKTD, value_BKTD, scale
        As in ``kernels.full``.
    sink, window : int
        Tokens, multiples of ``block``; the window includes the query's own block.
    block : int
        Tokens of a block.
    """
    keys = key_BKTD.shape[2]
    first, edge = keys - query_BHSD.shape[2], sink + window  # queries before the edge see all that is before them
    outputs = []
    if first < edge:
        stop = min(edge, keys)
        outputs.append(full(query_BHSD[:, :, : stop - first], key_BKTD[:, :, :stop], value_BKTD[:, :, :stop], scale))
    start = max(first, edge)
    while start < keys:
        low = start // block * block - window + block
        count = 1 if start % block else max(1, min(BLOCKS // len(query_BHSD), (keys - start) // block))
        stop = min(keys, low + window + (count - 1) * block)
        query_NHSD = query_BHSD[:, :, start - first : stop - first].unflatten(2, (count, -1)).transpose(1, 2)
        key_NKTD, value_NKTD = (_seen(states, sink, low, stop, count, block) for states in (key_BKTD, value_BKTD))
        output = full(query_NHSD.flatten(0, 1), key_NKTD, value_NKTD, scale)
        outputs.append(output.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3))
        start = stop
    return torch.cat(outputs, dim=2)


def _seen(states_BKTD: torch.Tensor, sink: int, low: int, stop: int, count: int, block: int) -> torch.Tensor:
    """Copy what each of ``count`` blocks sees, the last of which ends at ``stop``: (B · count, K, keys, D)."""
    size = stop - low - (count - 1) * block
    near = states_BKTD[:, :, low:stop].unfold(2, size, block).permute(0, 2, 1, 4, 3)
    far = states_BKTD[:, None, :, :sink].expand(-1, count, -1, -1, -1)
    return torch.cat([far, near], dim=3).flatten(0, 1)
