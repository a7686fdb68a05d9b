"""
Kernels compute attention: one file each, chosen in ``dispatch``.

All functions take query states after rotary embedding and grouped KV heads (GQA), which are never expanded. Rows are
left-aligned: a shorter sequence has its padding at the end, where causality hides it from every real query.
"""

from flux_attention.kernels.block_sparse import SELECT, block_scores, by_mass, by_maximum, density
from flux_attention.kernels.device import DTYPES, HEAD_DIMS, has_triton, index_on, on_device, to_device
from flux_attention.kernels.dispatch import (
    block_sparse,
    block_sparse_from,
    decode,
    full,
    packed,
    selected_blocks,
    streaming,
)
from flux_attention.kernels.packs import UNBOUNDED, Pack
from flux_attention.kernels.streaming_blocks import block_streaming

__all__ = [
    "DTYPES",
    "HEAD_DIMS",
    "SELECT",
    "UNBOUNDED",
    "Pack",
    "block_scores",
    "block_sparse",
    "block_sparse_from",
    "block_streaming",
    "by_mass",
    "by_maximum",
    "decode",
    "density",
    "full",
    "has_triton",
    "index_on",
    "on_device",
    "packed",
    "selected_blocks",
    "streaming",
    "to_device",
]
