"""Computes attention in plain PyTorch, on any device, differentiably.

Dense attention goes through PyTorch's scaled_dot_product_attention (SDPA); the streaming pattern is computed
block by block, so nothing of the size of S × T is ever made.

Shape suffixes: B batch, S query length, T key length, H query heads, K KV heads, G = H / K, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

#: Queries that are computed at a time where a mask is needed, at most.
BLOCK = 512
#: Elements of such a mask, at most.
MASK_SIZE = 2**24


def _masked(query_BHSD, key_BKTD, value_BKTD, mask, scale):
    """Run SDPA with a bool mask, broadcastable to (B, 1, S, T); KV heads are not expanded: groups become queries."""
    batch, heads, length, dim = query_BHSD.shape
    kv_heads = key_BKTD.shape[1]
    groups = heads // kv_heads
    query = query_BHSD.reshape(batch, kv_heads, groups * length, dim)
    if length > 1 and groups > 1:
        mask = mask.expand(*mask.shape[:-2], length, mask.shape[-1])
        mask = mask.unsqueeze(-3).expand(*mask.shape[:-2], groups, *mask.shape[-2:]).flatten(-3, -2)
    output = F.scaled_dot_product_attention(query, key_BKTD, value_BKTD, attn_mask=mask, scale=scale)
    return output.reshape(batch, heads, length, dim)


def full(query_BHSD, key_BKTD, value_BKTD, scale):
    """Compute causal attention of the last S of T positions. See ``kernels.full``."""
    length, keys = query_BHSD.shape[2], key_BKTD.shape[2]
    if length == keys:
        return F.scaled_dot_product_attention(
            query_BHSD, key_BKTD, value_BKTD, is_causal=True, scale=scale, enable_gqa=True
        )
    groups = query_BHSD.shape[1] // key_BKTD.shape[1]
    block = max(16, min(BLOCK, MASK_SIZE // (keys * groups)))
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        seen = keys - length + stop
        i = torch.arange(seen - (stop - start), seen, device=query_BHSD.device)[:, None]
        mask = torch.arange(seen, device=query_BHSD.device)[None, :] <= i
        outputs.append(
            _masked(query_BHSD[:, :, start:stop], key_BKTD[:, :, :seen], value_BKTD[:, :, :seen], mask, scale)
        )
    return torch.cat(outputs, dim=2)


def streaming(query_BHSD, key_BKTD, value_BKTD, sink, window, scale):
    """Compute sink + window attention of the last S of T positions. See ``kernels.streaming``."""
    length, keys = query_BHSD.shape[2], key_BKTD.shape[2]
    device = query_BHSD.device
    # Larger blocks compute more masked-out pairs, smaller ones launch more; half the window wastes a quarter.
    block = max(128, min(BLOCK, window // 2))
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first, last = keys - length + start, keys - length + stop
        low = max(0, first - window + 1)
        i = torch.arange(first, last, device=device)[:, None]
        if low <= sink:
            j = torch.arange(last, device=device)
            key, value = key_BKTD[:, :, :last], value_BKTD[:, :, :last]
        else:
            j = torch.cat([torch.arange(sink, device=device), torch.arange(low, last, device=device)])
            key = torch.cat([key_BKTD[:, :, :sink], key_BKTD[:, :, low:last]], dim=2)
            value = torch.cat([value_BKTD[:, :, :sink], value_BKTD[:, :, low:last]], dim=2)
        mask = (j <= i) & ((j < sink) | (i - j < window))
        outputs.append(_masked(query_BHSD[:, :, start:stop], key, value, mask, scale))
    return torch.cat(outputs, dim=2)


def packed(query_1HSD, key_1KSD, value_1KSD, pack, sizes_N2, scale):
    """Compute attention within a pack's sequences, spans that are alike together. See ``kernels.packed``."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, ((_, start, end), sizes) in enumerate(zip(pack.spans, sizes_N2.tolist(), strict=True)):
        alike.setdefault((end - start, end, *sizes), []).append(number)
    # By one split: the gradient of a slice would be as large as the whole pack, for each span.
    queries = query_1HSD.split([end - start for _, start, end in pack.spans], dim=2)
    sequences = [states.split(pack.lengths, dim=2) for states in (key_1KSD, value_1KSD)]
    outputs: list[torch.Tensor] = list(queries)
    for (_, end, sink, window), numbers in alike.items():
        rows = [pack.spans[number][0] for number in numbers]
        key, value = (torch.cat([states[row][:, :, :end] for row in rows]) for states in sequences)
        query = torch.cat([queries[number] for number in numbers])
        output = full(query, key, value, scale) if end <= window else streaming(query, key, value, sink, window, scale)
        for number, part in zip(numbers, output.split(1), strict=True):
            outputs[number] = part
    return torch.cat(outputs, dim=2)


def decode(query_BH1D, key_BKTD, value_BKTD, lengths_B, scale):
    """Compute attention of one query a row over the row's first ``lengths`` keys. See ``kernels.decode``."""
    mask = None
    if lengths_B is not None:
        mask = (torch.arange(key_BKTD.shape[2], device=query_BH1D.device) < lengths_B[:, None])[:, None, None, :]
    return _masked(query_BH1D, key_BKTD, value_BKTD, mask, scale)
