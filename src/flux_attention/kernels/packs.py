"""Packs: sequences behind one another in one row, as flat tokens with ``cu_seqlens``, and what each of them sees.

A sequence is cut into *spans* of queries that see alike: the first ``sink`` and the latest ``window`` keys of their
sequence; with a window beyond any length that is causal attention. Spans are the same in all layers; what they see
changes with a layer's routes, and so is a tensor on the device (``sizes``), which the host need not wait for.

Shape suffixes: B sequences, N spans.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

#: A window that sees every key.
UNBOUNDED = 2**28
#: Queries behind the window that one program reads for a block of sink keys.
FAR_QUERIES = 1024


class Pack:
    """
    Sequences behind one another in one row.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each sequence.
    spans : sequence of sequence of (int, int)
        For each sequence the first position and the end of its spans, which follow one another.
    max_sink : int
        The most sink tokens that a span may see.

    Attributes
    ----------
    cu_seqlens : list of int
        Where each sequence begins, and the end.
    spans : list of (int, int, int)
        Sequence, first position and end of each span.
    """

    def __init__(self, lengths: Sequence[int], spans: Sequence[Sequence[tuple[int, int]]], max_sink: int):
        self.lengths, self.max_sink = list(lengths), max_sink
        self.cu_seqlens = [0, *itertools.accumulate(lengths)]
        self.spans = [(row, *span) for row, some in enumerate(spans) for span in some if span[0] < span[1]]
        self._tables: dict[tuple, torch.Tensor] = {}

    def _put(self, key: tuple, device: torch.device, make: Callable[[], Any], dtype: type = np.int32) -> torch.Tensor:
        """Return a table on ``device``, made once; the host does not wait for a GPU to take it."""
        place = (*key, device)
        if place not in self._tables:
            table = torch.from_numpy(np.asarray(make(), dtype=dtype))
            if device.type == "cuda":
                table = table.pin_memory().to(device, non_blocking=True)
            self._tables[place] = table
        return self._tables[place]

    def sequences(self, device: torch.device) -> torch.Tensor:
        """Return int32 (N,), each span's sequence."""
        return self._put(("sequences",), device, lambda: [row for row, _, _ in self.spans])

    def bounds(self, device: torch.device) -> torch.Tensor:
        """Return int32 (N, 2), each span's first position and end."""
        return self._put(("bounds",), device, lambda: [span[1:] for span in self.spans])

    def tiles(self, step: int, device: torch.device) -> torch.Tensor:
        """
        Return int32 (tiles, 4), for each ``step`` queries: the row of the sequence's first key, first position, end,
        span.

        Late positions, which may see most keys, come first: short work at the end keeps all SMs busy.
        """

        def make():
            found = [
                (self.cu_seqlens[row], first, min(first + step, end), number)
                for number, (row, start, end) in enumerate(self.spans)
                for first in range(start, end, step)
            ]
            return sorted(found, key=lambda tile: -tile[1])

        return self._put(("tiles", step), device, make)

    def key_blocks(self, size: int, device: torch.device) -> torch.Tensor:
        """
        Return int32 (blocks, 7): of each ``size`` keys the row of the sequence's first key, first key, sequence length,
        first span and end of those of the sequence, first position and end of the queries.
        """

        def make():
            counts = Counter(row for row, _, _ in self.spans)
            firsts = [0, *itertools.accumulate(counts[row] for row in range(len(self.lengths)))]
            return [
                (self.cu_seqlens[row], start, length, *firsts[row : row + 2], 0, length)
                for row, length in enumerate(self.lengths)
                for start in range(0, length, size)
            ]

        return self._put(("blocks", size), device, make)

    def _sink_items(self, size: int) -> list[tuple[int, ...]]:
        return [
            (self.cu_seqlens[row], key, self.lengths[row], number, number + 1, first, min(first + FAR_QUERIES, end))
            for number, (row, start, end) in enumerate(self.spans)
            for key in range(0, min(self.max_sink, self.lengths[row]), size)
            for first in range(start, end, FAR_QUERIES)
        ]

    def sink_work(self, size: int, device: torch.device) -> torch.Tensor:
        """Return int32 (items, 7), as ``key_blocks``: ``size`` sink keys each, and some queries of one span."""
        return self._put(("sinks", size), device, lambda: np.reshape(self._sink_items(size), (-1, 7)))

    def sink_sums(self, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Return how the parts that ``sink_work`` gives are put together.

        Returns
        -------
        owner : torch.Tensor
            float32 (blocks, items), 1 where an item is about a block.
        places, rows : torch.Tensor
            int64, where a real key is among blocks × size, and its row in the pack.
        """

        def blocks() -> list[tuple[int, ...]]:
            return list(dict.fromkeys(item[:3] for item in self._sink_items(size)))

        def owner() -> np.ndarray:
            items, place = self._sink_items(size), {block: number for number, block in enumerate(blocks())}
            found = np.zeros((len(place), len(items)))
            found[[place[item[:3]] for item in items], np.arange(len(items))] = 1
            return found

        def keys() -> tuple[np.ndarray, np.ndarray]:
            base, first, length = np.reshape(blocks(), (-1, 3)).T[:, :, None]
            key = first + np.arange(size)
            return (base + key).reshape(-1), np.flatnonzero(key < length)

        return (
            self._put(("owner", size), device, owner, np.float32),
            self._put(("places", size), device, lambda: keys()[1], np.int64),
            self._put(("rows", size), device, lambda: keys()[0][keys()[1]], np.int64),
        )
