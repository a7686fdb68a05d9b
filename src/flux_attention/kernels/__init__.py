"""How attention is computed: one file a kernel, chosen here.

All functions take query states after rotary embedding and grouped KV heads (GQA), which are never expanded.
Rows are left-aligned: a shorter sequence has its padding at the end, where causality hides it from every
real query.
"""

from __future__ import annotations

import torch

from flux_attention.kernels import reference


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
    return reference.decode(query_BH1D, key_BKTD, value_BKTD, lengths, scale)
