"""Attention groups: rows of a batch that attend alike, and the keys and values that they see.

Shape suffixes: B batch, R rows of one group, S new tokens, T keys to read, K KV heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flux_attention.hf.cache.buffers import take_rows
from flux_attention.hf.layout import BatchLayout


@dataclass(frozen=True)
class AttentionGroup:
    """
    Rows that attend alike: query s of the ``queries`` new ones is at position T − queries + s.

    Attributes
    ----------
    rows : list of int
        Rows of the batch.
    route : bool
        True for full attention.
    queries : int
        New tokens of these rows (the longest row's, where ``lengths`` differ).
    key_RKTD, value_RKTD : torch.Tensor
        Keys and values to read, left-aligned.
    lengths : list of int or None
        Real keys of each row, where rows differ; None if all T are real in every row.
    is_decode : bool
        One query a row that sees all its keys, in whatever order they are.
    """

    rows: list[int]
    route: bool
    queries: int
    key_RKTD: torch.Tensor
    value_RKTD: torch.Tensor
    lengths: list[int] | None = None
    is_decode: bool = False


def prompt_groups(
    routes: list[bool], layout: BatchLayout, key_BKSD: torch.Tensor, value_BKSD: torch.Tensor
) -> list[AttentionGroup]:
    """Group a prompt's rows by route, over the prompt's own (left-aligned) keys and values."""
    groups = []
    for route in (True, False):
        rows = [row for row, other in enumerate(routes) if other == route]
        if rows:
            lengths = None if layout.is_uniform else [layout.lengths[row] for row in rows]
            key, value = take_rows(key_BKSD, rows), take_rows(value_BKSD, rows)
            groups.append(AttentionGroup(rows, route, layout.width, key, value, lengths))
    return groups
