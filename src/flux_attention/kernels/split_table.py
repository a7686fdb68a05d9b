"""Splits the decode kernel's work: says which program reads which keys of which row.

In plain Python, as it is made once for many steps and needs no GPU.
"""

from __future__ import annotations

import heapq

#: What the decode kernel reads of a row: every token, sink + window out of all that is kept, or a ring of those.
FULL, KEPT, RING = 0, 1, 2
#: Programs that share one row's head at most.
MAX_SPLITS = 64
#: Keys by which work is shared out; a tile has as many, or half.
BLOCK = 64


def split_table(rows: list[list[int]], lengths: list[int], sink: int, window: int, programs: int) -> list[list[int]]:
    """
    Share the programs out so that the longest split is as short as can be.

    Parameters
    ----------
    rows : list of list of int
        Of each row the addresses of its keys and of its values, both (K, capacity, D) with contiguous tokens, the
        elements between two heads, and ``FULL``, ``KEPT`` or ``RING``.
    lengths : list of int
        Tokens that each row will have when the steps that use the table are done.
    sink, window : int
        Tokens, of the rows that are not ``FULL``.
    programs : int
        W, at least one a row.

    Returns
    -------
    list of list of int
        (W, 7): what the program's row says, the row's number, the split, and the row's splits; 0 splits for no work.
    """
    blocks = []
    for (*_, kind), length in zip(rows, lengths, strict=True):
        blocks.append(-(-(length + 1 if kind == FULL else min(length + 1, sink + window)) // BLOCK))
    splits = [1] * len(rows)
    longest = [(-count, row) for row, count in enumerate(blocks)]
    heapq.heapify(longest)
    spare = programs - len(rows)
    while spare and longest:
        _, row = heapq.heappop(longest)
        if splits[row] < min(MAX_SPLITS, blocks[row] // 2):
            splits[row] += 1
            spare -= 1
            heapq.heappush(longest, (-blocks[row] / splits[row], row))
    table = [[*rows[row], row, split, count] for row, count in enumerate(splits) for split in range(count)]
    return table + [[*rows[0], 0, 0, 0]] * (programs - len(table))
