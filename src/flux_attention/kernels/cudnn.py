"""Causal attention of long prompts by PyTorch's cuDNN backend, a block of queries after another.

A block's own keys need the causal mask; all earlier ones do not, and are read by a call of their own; the two are
joined by their log-sum-exps. One causal call over 128 K tokens and more draws so much power that the GPU's clock falls,
by a sixth at 256 K, where these calls keep it.

Shape suffixes: B batch, S query length, T key length, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

#: Queries of a block, the last of which has the rest too; and keys of a call that reads earlier ones, at least.
BLOCK, FEWEST = 2**15, 64
#: Tokens from which a whole prompt is read so, and keys from which the last queries of a prompt are: in each thread a
#: call of new sizes takes the host about 5 ms, once.
LONG, LATER = 2**17, 2**15


def pays(query_BHSD: torch.Tensor, key_BKTD: torch.Tensor, value_BKTD: torch.Tensor) -> bool:
    """Whether ``full`` takes these states, and is faster than what else ``kernels.full`` has."""
    length, keys = query_BHSD.shape[2], key_BKTD.shape[2]
    large = keys >= LONG if length == keys else keys >= LATER and min(length, keys - length) >= FEWEST
    # Checkpointing would keep every block's outputs, also of what is computed without gradients in training.
    if not large or any(states.requires_grad for states in (query_BHSD, key_BKTD, value_BKTD)):
        return False
    part = (states[:, :, :FEWEST] for states in (query_BHSD, key_BKTD, value_BKTD))
    return can_use_cudnn_attention(SDPAParams(*part, None, 0.0, True, True))


def _attend(query_BHSD, key_BKTD, value_BKTD, causal, scale):
    """Output and log-sum-exp (B, H, S)."""
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention  # the public one keeps the log-sum-exp for itself
    output, lse = operator(query_BHSD, key_BKTD, value_BKTD, None, True, 0.0, causal, False, scale=scale)[:2]
    return output, lse.view(query_BHSD.shape[:3])


def full(query_BHSD, key_BKTD, value_BKTD, scale):
    """Causal attention of the last S of T positions, without gradients. See ``kernels.full``."""
    batch, heads, length, dim = query_BHSD.shape
    earlier = key_BKTD.shape[2] - length
    output = query_BHSD.new_empty(batch, length, heads, dim).transpose(1, 2)
    starts = range(0, max(1, length - BLOCK + 1), BLOCK)
    for start, stop in zip(starts, [*starts[1:], length], strict=True):
        query, past, own = query_BHSD[:, :, start:stop], slice(earlier + start), slice(earlier + start, earlier + stop)
        block, lse_BHS = _attend(query, key_BKTD[:, :, own], value_BKTD[:, :, own], True, scale)
        if past.stop:
            before, before_lse_BHS = _attend(query, key_BKTD[:, :, past], value_BKTD[:, :, past], False, scale)
            share = (before_lse_BHS - lse_BHS).sigmoid().unsqueeze(-1)  # float32, so that the sum is rounded once
            torch.addcmul(block * (1 - share), before, share, out=output[:, :, start:stop])
        else:
            output[:, :, start:stop] = block
    return output
