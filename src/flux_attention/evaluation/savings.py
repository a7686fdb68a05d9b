"""Says what the methods of an evaluation saved, and where that was nothing whatever Ω_MSR says."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from flux_attention.hf.handle import Routing
from flux_attention.routes import Routes


def mean_esr(routing: Routing, full: Sequence[Sequence[bool]], lengths: Sequence[int]) -> float:
    """
    Average Ω_ESR, the share of query-key pairs not computed, over samples.

    Parameters
    ----------
    routing : Routing
        Whose patterns were computed.
    full : sequence of sequence of bool
        Of each sample, which units ran full.
    lengths : sequence of int
        Tokens of each sample.
    """
    return fmean(Routes(torch.tensor(full), None, routing.units, tuple(lengths), routing.sparse, routing.full).esr)


def mean_kv(routing: Routing, full: Sequence[Sequence[bool]], lengths: Sequence[int]) -> dict[str, int]:
    """
    Average the bytes that prompts keep in the routed layers' KV cache, and dense ones; by arithmetic.

    The parameters are those of ``mean_esr``. Empty where heads are routed, whose cache is dense.
    """
    if routing.by_head:
        return {}
    base = routing.config.base_model
    size = 2 * base.num_kv_heads * base.head_dim * routing.model.dtype.itemsize
    kept, dense = [], []
    for row, length in zip(full, lengths, strict=True):
        kept.append(sum((routing.full if is_full else routing.sparse).kept(length) for is_full in row))
        dense.append(len(row) * length)
    return {"kv_bytes": round(size * fmean(kept)), "baseline_kv_bytes": round(size * fmean(dense))}


def nothing_saved(rows: Sequence[dict[str, Any]]) -> str | None:
    """Say at which lengths sparse layers saw everything; None if at none, or where files of older versions lack it."""
    sparse: dict[int | None, list[float | None]] = {}
    for row in rows:
        if row["sparsity"] > 0:
            sparse.setdefault(row["seq_len"], []).append(row.get("esr"))
    lengths = [length for length, shares in sparse.items() if all(share == 0 for share in shares)]
    if not lengths:
        return None
    where = ", ".join("lm-eval's tasks" if length is None else f"{length:,} tokens" for length in lengths)
    return (
        f"Nothing is saved at {where}: no sample is longer than sink + window, which sparse layers see, so every "
        "method computes all that dense does, and answers alike, whatever its Ω_MSR."
    )
