"""Streaming attention: the first tokens (sink) and the latest ones (window)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flux_attention import kernels


@dataclass(frozen=True)
class Streaming:
    """
    Key j is seen by query i if j ≤ i and (j < sink or i − j < window). Exact token counts.

    Parameters
    ----------
    sink, window : int
        Tokens.
    """

    sink: int
    window: int

    def mask(self, length: int, prompt_length: int | None = None) -> torch.Tensor:
        """bool (length, length): which key each query sees. A definition for tests, not a way to compute."""
        i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
        return (j <= i) & ((j < self.sink) | (i - j < self.window))

    def pairs(self, length: int) -> int:
        """Query-key pairs computed for a prompt of ``length`` tokens."""
        most = min(length, self.sink + self.window)
        return most * (most + 1) // 2 + (length - most) * (self.sink + self.window)

    def prefill(self, query_BHSD, key_BKTD, value_BKTD, scale, prompt_lengths=None) -> torch.Tensor:
        """Attention of the last S of T positions; see ``kernels.streaming``."""
        return kernels.streaming(query_BHSD, key_BKTD, value_BKTD, self.sink, self.window, scale)
