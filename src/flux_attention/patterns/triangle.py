"""Triangle attention is streaming, but the prompt's last tokens attend fully."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from flux_attention import kernels
from flux_attention.patterns.streaming import Streaming, rows_by_length, writable


@dataclass(frozen=True)
class Triangle(Streaming):
    """
    Is ``Streaming`` for all queries but the last ``last_n`` of the prompt, which see every key.

    Tokens behind the prompt attend to sink and window only, as the other keys are no longer kept.
    """

    name: ClassVar[str] = "triangle"

    last_n: int = field(metadata={"min": 1})

    def mask(self, length: int, prompt_length: int | None = None) -> torch.Tensor:
        """See ``Pattern.mask``."""
        prompt_length = length if prompt_length is None else prompt_length
        mask = super().mask(length, prompt_length)
        rows = slice(max(0, prompt_length - self.last_n), prompt_length)
        mask[rows] = torch.ones(length, length, dtype=torch.bool).tril()[rows]
        return mask

    def prefill(self, query_BHSD, key_BKTD, value_BKTD, scale, prompt_lengths=None) -> torch.Tensor:
        """See ``Pattern.prefill``; of a whole prompt (S = T)."""
        output = writable(super().prefill(query_BHSD, key_BKTD, value_BKTD, scale, prompt_lengths))
        lengths = prompt_lengths or [query_BHSD.shape[2]] * len(query_BHSD)
        for length, rows in rows_by_length(output, lengths):
            last = slice(max(0, length - self.last_n), length)
            output[rows, :, last] = kernels.full(
                query_BHSD[rows, :, last], key_BKTD[rows, :, :length], value_BKTD[rows, :, :length], scale
            )
        return output

    def spans(self, length: int, prompt_length: int) -> list[tuple[int, int, int, int]]:
        """See ``Pattern.spans``."""
        last = max(0, prompt_length - self.last_n)
        ((_, _, sink, window),) = super().spans(length, prompt_length)
        return [
            (0, last, sink, window),
            (last, prompt_length, 0, kernels.UNBOUNDED),
            (prompt_length, length, sink, window),
        ]

    def pairs(self, length: int) -> int:
        """See ``Pattern.pairs``."""
        # The last rows see i + 1 keys.
        extra = (i + 1 - self._seen(i) for i in range(max(0, length - self.last_n), length))
        return super().pairs(length) + sum(extra)
