"""Attention in packed sequences: one launch for each branch, whatever the sequences' lengths and routes.

Shape suffixes: B sequences, S tokens of the pack, H query heads, K KV heads, D head dim, N spans.
"""

from __future__ import annotations

import torch

from flux_attention import kernels
from flux_attention.patterns import Pattern


class PackedAttention:
    """
    Computes attention within the sequences of a pack, each full or sparse.

    Parameters
    ----------
    lengths, prompt_lengths : list of int
        Tokens of each sequence, and how many of them are prompt.
    sparse, full : Pattern
        What sparse and full sequences compute; the latter sees all queries of a sequence alike.
    """

    def __init__(self, lengths: list[int], prompt_lengths: list[int], sparse: Pattern, full: Pattern):
        spans = [sparse.spans(*both) for both in zip(lengths, prompt_lengths, strict=True)]
        (*_, sink, window), *others = full.spans(max(lengths), max(lengths))
        if others:
            raise ValueError(f"{full} does not see all queries alike, so it cannot be the full pattern of packs")
        bounds = [[(start, end) for start, end, _, _ in some] for some in spans]
        self.pack = kernels.Pack(lengths, bounds, max(sink, *(span[2] for some in spans for span in some)))
        self._sparse_N2 = [span[2:] for some in spans for span in some if span[0] < span[1]]
        self._full_2 = (sink, window)
        self._sizes: dict[torch.device, tuple[torch.Tensor, ...]] = {}

    def __call__(self, full_B: torch.Tensor, query_1HSD, key_1KSD, value_1KSD, scale: float) -> torch.Tensor:
        """Return attention output (1, H, S, D); ``full_B`` is bool on the queries' device, True = full attention."""
        device = query_1HSD.device
        if device not in self._sizes:
            self._sizes[device] = tuple(
                torch.tensor(sizes, dtype=torch.int32).to(device) for sizes in (self._sparse_N2, self._full_2)
            )
        sparse_N2, full_2 = self._sizes[device]
        full_N1 = full_B[self.pack.sequences(device)][:, None]
        sizes_N2 = torch.where(full_N1, full_2, sparse_N2)
        return kernels.packed(query_1HSD, key_1KSD, value_1KSD, self.pack, sizes_N2, scale)
