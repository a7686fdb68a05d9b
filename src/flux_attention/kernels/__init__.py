"""How attention is computed: one file a kernel, chosen here.

All functions take query states after rotary embedding and grouped KV heads (GQA), which are never expanded.
Rows are left-aligned: a shorter sequence has its padding at the end, where causality hides it from every
real query.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux_attention.kernels import cudnn, reference

#: What the Triton kernels take.
DTYPES, HEAD_DIMS = (torch.bfloat16, torch.float16), (16, 32, 64, 128, 256)
#: What the decode kernel reads of a row: every token, sink + window out of all that is kept, or a ring of those.
FULL, KEPT, RING = 0, 1, 2


def on_device(states: torch.Tensor):
    """A context in which Triton launches, streams and graphs are those of the GPU that holds ``states``."""
    return torch.cuda.device(states.device) if states.is_cuda else nullcontext()


def index_on(device: torch.device, values: list[int]) -> torch.Tensor:
    """int64 ``values`` on ``device``; the host does not wait for a GPU to take them."""
    index = torch.tensor(values)
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)


@lru_cache
def has_triton(device: torch.device) -> bool:
    """Whether the Triton kernels run on ``device``: an NVIDIA GPU of compute capability 8.0 or newer."""
    if device.type != "cuda" or torch.version.cuda is None or find_spec("triton") is None:
        return False
    if not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _triton(query_BHSD: torch.Tensor):
    """The Triton prefill kernels, where they can take these states."""
    if query_BHSD.dtype not in DTYPES or query_BHSD.shape[-1] not in HEAD_DIMS or not has_triton(query_BHSD.device):
        return None
    from flux_attention.kernels import triton_prefill

    return triton_prefill


@lru_cache
def _dense_backends(device: torch.device, dtype: torch.dtype, dim: int) -> list[SDPBackend] | None:
    """
    SDPA's backends for dense prefill, best first; None for PyTorch's own order.

    On Hopper cuDNN's is the fastest (``flux-attention bench attention`` measures it), while PyTorch prefers flash.
    """
    if torch.cuda.get_device_capability(device) < (9, 0) or dtype not in DTYPES or dim > 128:
        return None
    return [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]


#: SDPA's choice of a backend belongs to the process, not to a thread.
_SDPA = threading.Lock()
#: Whether each of its backends is on.
_SWITCHES = (
    torch.backends.cuda.cudnn_sdp_enabled,
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.math_sdp_enabled,
)


def _order(query_BHSD: torch.Tensor) -> list[SDPBackend] | None:
    """``_dense_backends`` for these states, unless the user has switched some off."""
    if not query_BHSD.is_cuda:
        return None
    backends = _dense_backends(query_BHSD.device, query_BHSD.dtype, query_BHSD.shape[-1])
    # With some switched off, PyTorch would not restore the order of the others.
    return backends if all(is_on() for is_on in _SWITCHES) else None


@contextmanager
def _dense_backend(query_BHSD: torch.Tensor):
    """A context in which SDPA runs its fastest backend for these states."""
    backends = _order(query_BHSD)
    if backends is None:
        yield
        return
    with _SDPA, sdpa_kernel(backends, set_priority=True):
        yield


def full(query_BHSD: torch.Tensor, key_BKTD: torch.Tensor, value_BKTD: torch.Tensor, scale: float) -> torch.Tensor:
    """
    Causal attention of the last S of T positions.

    Parameters
    ----------
    query_BHSD, key_BKTD, value_BKTD : torch.Tensor
        Any float dtype, all the same; H a multiple of K, S ≤ T.
    scale : float
        Factor of the dot products, usually D ** -0.5.

    Returns
    -------
    torch.Tensor
        Shape and dtype of ``query_BHSD``.
    """
    keys = key_BKTD.shape[2]
    triton = _triton(query_BHSD) if query_BHSD.shape[2] < keys else None
    if _order(query_BHSD) and has_triton(query_BHSD.device):
        if triton and (count := cudnn.parts(query_BHSD, key_BKTD, value_BKTD)) > 1:
            return cudnn.full_in_parts(query_BHSD, key_BKTD, value_BKTD, scale, count, triton.attention)
        if cudnn.pays(query_BHSD, key_BKTD, value_BKTD):
            from flux_attention.kernels.triton_join import join

            return cudnn.full(query_BHSD, key_BKTD, value_BKTD, scale, join)
    if triton:
        return triton.attention(query_BHSD, key_BKTD, value_BKTD, 0, keys, scale)
    with _dense_backend(query_BHSD):
        return reference.full(query_BHSD, key_BKTD, value_BKTD, scale)


def streaming(
    query_BHSD: torch.Tensor, key_BKTD: torch.Tensor, value_BKTD: torch.Tensor, sink: int, window: int, scale: float
) -> torch.Tensor:
    """
    Attention of the last S of T positions to the first ``sink`` keys and the latest ``window`` ones.

    Memory is bounded by the inputs and one block of queries: no S × T mask.

    Parameters
    ----------
    query_BHSD, key_BKTD, value_BKTD, scale
        As in ``full``.
    sink, window : int
        Tokens; the window includes the query's own position.
    """
    if key_BKTD.shape[2] <= sink + window:
        return full(query_BHSD, key_BKTD, value_BKTD, scale)
    if triton := _triton(query_BHSD):
        return triton.attention(query_BHSD, key_BKTD, value_BKTD, sink, window, scale)
    return reference.streaming(query_BHSD, key_BKTD, value_BKTD, sink, window, scale)


def decode(
    query_BH1D: torch.Tensor, key_BKTD: torch.Tensor, value_BKTD: torch.Tensor, lengths: list[int] | None, scale: float
) -> torch.Tensor:
    """
    One query a row, over all keys or the row's first ``lengths`` keys.

    Parameters
    ----------
    query_BH1D, key_BKTD, value_BKTD, scale
        As in ``full``. The order of the keys does not matter.
    lengths : list of int, optional
        Real keys of each row, where rows differ.
    """
    lengths_B = None if lengths is None else index_on(query_BH1D.device, lengths)
    return reference.decode(query_BH1D, key_BKTD, value_BKTD, lengths_B, scale)
