"""Full attention: every query sees every key up to its own position."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flux_attention import kernels


@dataclass(frozen=True)
class Full:
    """Causal attention over the whole context."""

    def mask(self, length: int, prompt_length: int | None = None) -> torch.Tensor:
        """bool (length, length): which key each query sees. A definition for tests, not a way to compute."""
        return torch.ones(length, length, dtype=torch.bool).tril()

    def pairs(self, length: int) -> int:
        """Query-key pairs computed for a prompt of ``length`` tokens."""
        return length * (length + 1) // 2

    def prefill(self, query_BHSD, key_BKTD, value_BKTD, scale, prompt_lengths=None) -> torch.Tensor:
        """Attention of the last S of T positions; see ``kernels.full``."""
        return kernels.full(query_BHSD, key_BKTD, value_BKTD, scale)
