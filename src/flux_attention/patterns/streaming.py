"""Streaming attention sees the first tokens (sink) and the latest ones (window)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from flux_attention import kernels
from flux_attention.patterns.base import Pattern


@dataclass(frozen=True)
class Streaming(Pattern):
    """
    Sees sink + window: key j is seen by query i if j ≤ i and (j < sink or i − j < window). Exact token counts.

    Parameters
    ----------
    sink, window : int
        Tokens; the window includes the query's own.
    """

    name: ClassVar[str] = "streaming"

    sink: int
    window: int = field(metadata={"min": 1})

    def mask(self, length: int, prompt_length: int | None = None) -> torch.Tensor:
        """See ``Pattern.mask``."""
        i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
        return (j <= i) & ((j < self.sink) | (i - j < self.window))

    def prefill(self, query_BHSD, key_BKTD, value_BKTD, scale, prompt_lengths=None) -> torch.Tensor:
        """See ``Pattern.prefill``."""
        return kernels.streaming(query_BHSD, key_BKTD, value_BKTD, self.sink, self.window, scale)

    def spans(self, length: int, prompt_length: int) -> list[tuple[int, int, int, int]]:
        """See ``Pattern.spans``."""
        return [(0, length, self.sink, self.window)]

    @property
    def later(self) -> Streaming:
        """Sink + window."""
        return Streaming(self.sink, self.window)

    def kept(self, length: int) -> int:
        """See ``Pattern.kept``."""
        return min(length, self.sink + self.window)

    def pairs(self, length: int) -> int:
        """See ``Pattern.pairs``."""
        kept = self.kept(length)
        return kept * (kept + 1) // 2 + (length - kept) * (self.sink + self.window)
