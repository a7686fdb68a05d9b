"""Computes dense causal attention by PyTorch's SDPA: orders its backends, splits long prompts into calls of cuDNN's.

Long prompts take a block of queries after another. A block's own keys need the causal mask; all earlier ones do not,
and are read by a call of their own; the two attention states are merged by their log-sum-exps. One causal call over
128 K tokens and more draws so much power that the GPU's clock falls, by a sixth at 256 K, where these calls keep it.

A few queries of one sequence, a question behind a long cache or a triangle's last rows, are too few tiles for all SMs:
their earlier keys are split, and the splits are read side by side, as a batch (split-KV).

Shape suffixes: B batch, S query length, T key length, H query heads, K KV heads, D head dim, P splits, C keys of a
split.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad

from flux_attention.kernels.device import DTYPES, capability, sm_count

#: Queries of a block, the last of which has the rest too; and keys of a call that reads earlier ones, at least.
BLOCK, MIN_KEYS = 2**15, 64
#: Tokens from which a whole prompt is read by blocks, and keys from which the last queries of a prompt are: in each
#: thread a call of new sizes takes the host about 5 ms, once.
MIN_PROMPT, MIN_CONTEXT = 2**17, 2**15
#: Queries and keys of a split are multiples of these: the tile of an SM, and so that few sizes are new.
TILE, STEP = 128, 1024

# --- Backends -------------------------------------------------------------------------------------------------------

#: SDPA's choice of a backend belongs to the process, not to a thread.
_SDPA = threading.Lock()
#: Whether each of its backends is on.
_SWITCHES = (
    torch.backends.cuda.cudnn_sdp_enabled,
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.math_sdp_enabled,
)


@lru_cache
def _backends(device: torch.device, dtype: torch.dtype, dim: int) -> list[SDPBackend] | None:
    # On Hopper cuDNN's is the fastest (``flux-attention bench attention`` measures it), while PyTorch prefers flash.
    if capability(device) < (9, 0) or dtype not in DTYPES or dim > 128:
        return None
    return [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]


def backend_order(query_BHSD: torch.Tensor) -> list[SDPBackend] | None:
    """List SDPA's backends for dense prefill, best first; None for PyTorch's own order, or if a user has some off."""
    if not query_BHSD.is_cuda:
        return None
    backends = _backends(query_BHSD.device, query_BHSD.dtype, query_BHSD.shape[-1])
    # With some switched off, PyTorch would not restore the order of the others.
    return backends if all(is_on() for is_on in _SWITCHES) else None


@contextmanager
def fastest_backend(query_BHSD: torch.Tensor):
    """Let SDPA run its fastest backend for these states within a ``with`` block."""
    backends = backend_order(query_BHSD)
    if backends is None:
        yield
        return
    with _SDPA, sdpa_kernel(backends, set_priority=True):
        yield


# --- Blocks and splits ------------------------------------------------------------------------------------------------


def _runs(*states: torch.Tensor) -> bool:
    """Whether cuDNN takes these queries, keys and values, and no gradient is asked for."""
    # Checkpointing would keep every block's outputs, also of what is computed without gradients in training.
    if any(tensor.requires_grad for tensor in states):
        return False
    return can_use_cudnn_attention(SDPAParams(*(tensor[:, :, :MIN_KEYS] for tensor in states), None, 0.0, True, True))


def blocks_are_faster(query_BHSD: torch.Tensor, key_BKTD: torch.Tensor, value_BKTD: torch.Tensor) -> bool:
    """Whether ``full_by_blocks`` takes these states, and is faster than what else ``kernels.full`` has."""
    length, keys = query_BHSD.shape[2], key_BKTD.shape[2]
    large = keys >= MIN_PROMPT if length == keys else keys >= MIN_CONTEXT and min(length, keys - length) >= MIN_KEYS
    return large and _runs(query_BHSD, key_BKTD, value_BKTD)


def num_splits(query_BHSD: torch.Tensor, key_BKTD: torch.Tensor, value_BKTD: torch.Tensor) -> int:
    """Count the key splits that keep all SMs busy in ``full_by_splits``; one where that is slower or cannot run."""
    batch, heads, length, _ = query_BHSD.shape
    if batch > 1 or key_BKTD.shape[2] < MIN_PROMPT:
        return 1
    count = sm_count(query_BHSD.device) // (heads * -(-length // TILE))
    # What the splits leave over, up to ``STEP`` keys for each, is at most as much as one of them.
    count = min(count, math.isqrt((key_BKTD.shape[2] - length) // STEP))
    return count if count > 1 and _runs(query_BHSD, key_BKTD, value_BKTD) else 1


def _attend(query_BHSD, key_BKTD, value_BKTD, causal, scale):
    """Compute output and log-sum-exp (B, H, S)."""
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention  # the public one keeps the log-sum-exp for itself
    output, lse = operator(query_BHSD, key_BKTD, value_BKTD, None, True, 0.0, causal, False, scale=scale)[:2]
    return output, lse.view(query_BHSD.shape[:3])


def full_by_blocks(query_BHSD, key_BKTD, value_BKTD, scale, merge: Callable):
    """Compute ``kernels.full`` without gradients, a block of queries at a time; ``merge`` is Triton's."""
    batch, heads, length, dim = query_BHSD.shape
    earlier = key_BKTD.shape[2] - length
    output = query_BHSD.new_empty(batch, length, heads, dim).transpose(1, 2)
    starts = range(0, max(1, length - BLOCK + 1), BLOCK)
    for start, stop in zip(starts, [*starts[1:], length], strict=True):
        query, past, own = query_BHSD[:, :, start:stop], slice(earlier + start), slice(earlier + start, earlier + stop)
        block, lse_BHS = _attend(query, key_BKTD[:, :, own], value_BKTD[:, :, own], True, scale)
        if past.stop:
            before, before_lse_BHS = _attend(query, key_BKTD[:, :, past], value_BKTD[:, :, past], False, scale)
            merge(block, lse_BHS, before, before_lse_BHS, output[:, :, start:stop])
        else:
            output[:, :, start:stop] = block
    return output


def full_by_splits(query_BHSD, key_BKTD, value_BKTD, scale, count: int, attention: Callable):
    """Compute ``kernels.full`` of a batch of one by ``count`` splits of the earlier keys; Triton reads the rest."""
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
