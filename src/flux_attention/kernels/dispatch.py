"""Chooses a kernel by device, dtype, head dim and length.

Shape suffixes: B batch, S query length, T key length, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import torch

from flux_attention.kernels import dense, reference
from flux_attention.kernels.block_sparse import BLOCK, SELECT, block_scores
from flux_attention.kernels.block_sparse import block_sparse as plain_block_sparse
from flux_attention.kernels.device import DTYPES, HEAD_DIMS, device_name, has_triton, index_on, to_device
from flux_attention.kernels.packs import UNBOUNDED, Pack


def _triton_prefill(query_BHSD: torch.Tensor):
    """Return the Triton prefill kernels' module, where they can take these states."""
    if query_BHSD.dtype not in DTYPES or query_BHSD.shape[-1] not in HEAD_DIMS or not has_triton(query_BHSD.device):
        return None
    from flux_attention.kernels import triton_prefill  # only where Triton is installed

    return triton_prefill


def full(query_BHSD: torch.Tensor, key_BKTD: torch.Tensor, value_BKTD: torch.Tensor, scale: float) -> torch.Tensor:
    """
    Compute causal attention of the last S of T positions.

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
    triton = _triton_prefill(query_BHSD) if query_BHSD.shape[2] < keys else None
    if dense.backend_order(query_BHSD) and has_triton(query_BHSD.device):
        if triton and (splits := dense.num_splits(query_BHSD, key_BKTD, value_BKTD)) > 1:
            return dense.full_by_splits(query_BHSD, key_BKTD, value_BKTD, scale, splits, triton.attention)
        if dense.blocks_are_faster(query_BHSD, key_BKTD, value_BKTD):
            from flux_attention.kernels.triton_merge import merge_attention_states  # only where Triton is installed

            return dense.full_by_blocks(query_BHSD, key_BKTD, value_BKTD, scale, merge_attention_states)
    if triton:
        return triton.attention(query_BHSD, key_BKTD, value_BKTD, 0, keys, scale)
    with dense.fastest_backend(query_BHSD):
        return reference.full(query_BHSD, key_BKTD, value_BKTD, scale)


def streaming(
    query_BHSD: torch.Tensor, key_BKTD: torch.Tensor, value_BKTD: torch.Tensor, sink: int, window: int, scale: float
) -> torch.Tensor:
    """
    Compute attention of the last S of T positions to the first ``sink`` keys and the latest ``window`` ones.

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
    if triton := _triton_prefill(query_BHSD):
        return triton.attention(query_BHSD, key_BKTD, value_BKTD, sink, window, scale)
    return reference.streaming(query_BHSD, key_BKTD, value_BKTD, sink, window, scale)


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
        As in ``full``.
    select, share, stride, correct
        See ``kernels.block_sparse.block_sparse``; ``share`` on any device.
    """
    share = to_device(share, query_BHSD.device)
    if _triton_prefill(query_BHSD):
        from flux_attention.kernels import triton_block_sparse  # only where Triton is installed

        run = triton_block_sparse.block_sparse
        return run(query_BHSD, key_BKTD, value_BKTD, scale, select == "mass", share, stride, correct)
    return plain_block_sparse(query_BHSD, key_BKTD, value_BKTD, scale, select, share, stride, correct)


def selected_blocks(
    query_BHSD: torch.Tensor, key_BKTD: torch.Tensor, scale: float, select: str, share: torch.Tensor, stride: int = 16
) -> torch.Tensor:
    """
    Tell which blocks of keys ``block_sparse`` selects for each block of queries, to look at: bool (B, H, M, N).

    The parameters are those of ``block_sparse``; blocks behind the queries' own are not selected.
    """
    share, device = to_device(share, query_BHSD.device), key_BKTD.device
    first, total = (key_BKTD.shape[2] - query_BHSD.shape[2]) // BLOCK, -(-key_BKTD.shape[2] // BLOCK)
    seen = torch.arange(total, device=device) <= torch.arange(first, total, device=device)[:, None]
    if _triton_prefill(query_BHSD):
        from flux_attention.kernels.triton_block_scores import select_blocks  # only where Triton is installed

        found = select_blocks(
            query_BHSD, key_BKTD, stride, scale, share, select == "mass", first, total - first, masks=True
        )
        return found[2].bool() & seen
    return SELECT[select](block_scores(query_BHSD, key_BKTD, stride, scale), first, total, share) & seen


#: By the GPU's name, the keys from which attention to two fifths of a prompt's blocks is faster than exact attention:
#: ``flux-attention bench blocks`` measures a fifth, benchmarks/show_blocks.py reckons.
BLOCK_SPARSE_FROM = {"NVIDIA H200": 2**14}


def block_sparse_from(query_BHSD: torch.Tensor) -> int:
    """
    Return the keys from which ``block_sparse`` is faster than ``full``, on the GPU that holds these queries.

    Cards that nobody measured have the H200's; where there are no kernels for these states it is never faster. On a CPU
    it is not either, but there it is what defines the result: 0.
    """
    if query_BHSD.device.type == "cpu":
        return 0
    if not _triton_prefill(query_BHSD):
        return UNBOUNDED
    return BLOCK_SPARSE_FROM.get(device_name(query_BHSD.device), BLOCK_SPARSE_FROM["NVIDIA H200"])


def packed(
    query_1HSD: torch.Tensor,
    key_1KSD: torch.Tensor,
    value_1KSD: torch.Tensor,
    pack: Pack,
    sizes_N2: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """
    Compute attention within sequences that lie behind one another in one row.

    Parameters
    ----------
    query_1HSD, key_1KSD, value_1KSD, scale
        As in ``full``; flat tokens.
    pack : Pack
        The sequences, and their spans.
    sizes_N2 : torch.Tensor
        int32 on the queries' device, the sink and the window of each span.
    """
    if triton := _triton_prefill(query_1HSD):
        return triton.packed_attention(query_1HSD, key_1KSD, value_1KSD, pack, sizes_N2, scale)
    return reference.packed(query_1HSD, key_1KSD, value_1KSD, pack, sizes_N2, scale)


def decode(
    query_BH1D: torch.Tensor, key_BKTD: torch.Tensor, value_BKTD: torch.Tensor, lengths: list[int] | None, scale: float
) -> torch.Tensor:
    """
    Compute attention of one query a row, to all keys or to the row's first ``lengths`` keys.

    Parameters
    ----------
    query_BH1D, key_BKTD, value_BKTD, scale
        As in ``full``. The order of the keys does not matter.
    lengths : list of int, optional
        Real keys of each row, where rows differ.
    """
    lengths_B = None if lengths is None else index_on(query_BH1D.device, lengths)
    return reference.decode(query_BH1D, key_BKTD, value_BKTD, lengths_B, scale)
