"""Causal attention of long prompts by PyTorch's cuDNN backend, a block of queries after another.

A block's own keys need the causal mask; all earlier ones do not, and are read by a call of their own; the two are
joined by their log-sum-exps. One causal call over 128 K tokens and more draws so much power that the GPU's clock falls,
by a sixth at 256 K, where these calls keep it.

A few queries of one sequence, a question behind a long cache or a triangle's last rows, are too few tiles for all
multiprocessors: their earlier keys are read in parts side by side, as a batch.

Shape suffixes: B batch, S query length, T key length, H query heads, K KV heads, D head dim, P parts, C keys of a part.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.functional import pad

#: Queries of a block, the last of which has the rest too; and keys of a call that reads earlier ones, at least.
BLOCK, FEWEST = 2**15, 64
#: Tokens from which a whole prompt is read so, and keys from which the last queries of a prompt are: in each thread a
#: call of new sizes takes the host about 5 ms, once.
LONG, LATER = 2**17, 2**15
#: Queries and keys of a part are multiples of these: the tile of a multiprocessor, and so that few sizes are new.
TILE, STEP = 128, 1024


def _runs(*states: torch.Tensor) -> bool:
    """Whether cuDNN takes these queries, keys and values, and no gradient is asked for."""
    # Checkpointing would keep every block's outputs, also of what is computed without gradients in training.
    if any(tensor.requires_grad for tensor in states):
        return False
    return can_use_cudnn_attention(SDPAParams(*(tensor[:, :, :FEWEST] for tensor in states), None, 0.0, True, True))


def pays(query_BHSD: torch.Tensor, key_BKTD: torch.Tensor, value_BKTD: torch.Tensor) -> bool:
    """Whether ``full`` takes these states, and is faster than what else ``kernels.full`` has."""
    length, keys = query_BHSD.shape[2], key_BKTD.shape[2]
    large = keys >= LONG if length == keys else keys >= LATER and min(length, keys - length) >= FEWEST
    return large and _runs(query_BHSD, key_BKTD, value_BKTD)


def parts(query_BHSD: torch.Tensor, key_BKTD: torch.Tensor, value_BKTD: torch.Tensor) -> int:
    """In how many parts ``full_in_parts`` keeps all multiprocessors busy; one where it does not pay, or cannot run."""
    batch, heads, length, _ = query_BHSD.shape
    if batch > 1 or key_BKTD.shape[2] < LONG:
        return 1
    processors = torch.cuda.get_device_properties(query_BHSD.device).multi_processor_count
    count = processors // (heads * -(-length // TILE))
    # What the parts leave over, up to ``STEP`` keys for each, is at most as much as one of them.
    count = min(count, math.isqrt((key_BKTD.shape[2] - length) // STEP))
    return count if count > 1 and _runs(query_BHSD, key_BKTD, value_BKTD) else 1


def _attend(query_BHSD, key_BKTD, value_BKTD, causal, scale):
    """Output and log-sum-exp (B, H, S)."""
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention  # the public one keeps the log-sum-exp for itself
    output, lse = operator(query_BHSD, key_BKTD, value_BKTD, None, True, 0.0, causal, False, scale=scale)[:2]
    return output, lse.view(query_BHSD.shape[:3])


def full(query_BHSD, key_BKTD, value_BKTD, scale, join: Callable):
    """Causal attention of the last S of T positions, without gradients; ``join`` is Triton's. See ``kernels.full``."""
    batch, heads, length, dim = query_BHSD.shape
    earlier = key_BKTD.shape[2] - length
    output = query_BHSD.new_empty(batch, length, heads, dim).transpose(1, 2)
    starts = range(0, max(1, length - BLOCK + 1), BLOCK)
    for start, stop in zip(starts, [*starts[1:], length], strict=True):
        query, past, own = query_BHSD[:, :, start:stop], slice(earlier + start), slice(earlier + start, earlier + stop)
        block, lse_BHS = _attend(query, key_BKTD[:, :, own], value_BKTD[:, :, own], True, scale)
        if past.stop:
            before, before_lse_BHS = _attend(query, key_BKTD[:, :, past], value_BKTD[:, :, past], False, scale)
            join(block, lse_BHS, before, before_lse_BHS, output[:, :, start:stop])
        else:
            output[:, :, start:stop] = block
    return output


def full_in_parts(query_BHSD, key_BKTD, value_BKTD, scale, count: int, attention: Callable):
    """``full`` of a batch of one by ``count`` parts of the earlier keys; Triton's ``attention`` reads the rest."""
    length, keys = query_BHSD.shape[2], key_BKTD.shape[2]
    split = (keys - length) // (count * STEP) * (count * STEP)
    query_PHSD = pad(query_BHSD, (0, 0, 0, -length % TILE)).expand(count, -1, -1, -1).contiguous()
    key_PKCD, value_PKCD = (
        states[0, :, :split].unflatten(1, (count, -1)).transpose(0, 1) for states in (key_BKTD, value_BKTD)
    )
    early, early_lse_PHS = (found[:, :, :length] for found in _attend(query_PHSD, key_PKCD, value_PKCD, False, scale))
    late, late_lse_BHS = attention(
        query_BHSD, key_BKTD[:, :, split:], value_BKTD[:, :, split:], 0, keys - split, scale, return_lse=True
    )
    share = torch.cat([early_lse_PHS, late_lse_BHS]).softmax(0).unsqueeze(-1)  # float32: the sum is rounded once
    return (torch.cat([early, late]) * share).sum(0, keepdim=True).to(query_BHSD.dtype)
