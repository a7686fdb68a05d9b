"""Full attention lets every query see every key up to its own position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from flux_attention import kernels
from flux_attention.patterns.base import Pattern


@dataclass(frozen=True)
class Full(Pattern):
    """Lets each query see the whole context before it."""

    name: ClassVar[str] = "full"

    def mask(self, length: int, prompt_length: int | None = None) -> torch.Tensor:
        """See ``Pattern.mask``."""
        return torch.ones(length, length, dtype=torch.bool).tril()

    def prefill(self, query_BHSD, key_BKTD, value_BKTD, scale, prompt_lengths=None) -> torch.Tensor:
        """See ``Pattern.prefill``."""
        return kernels.full(query_BHSD, key_BKTD, value_BKTD, scale)

    def spans(self, length: int, prompt_length: int) -> list[tuple[int, int, int, int]]:
        """See ``Pattern.spans``."""
        return [(0, length, 0, kernels.UNBOUNDED)]

    @property
    def later(self) -> Full:
        """The pattern itself."""
        return self

    def kept(self, length: int) -> int:
        """See ``Pattern.kept``: all."""
        return length

    def pairs(self, length: int) -> int:
        """See ``Pattern.pairs``."""
        return length * (length + 1) // 2
