"""Streaming attention sees the first tokens (sink) and the latest ones (window)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from flux_attention import kernels
from flux_attention.errors import UnsupportedModelError
from flux_attention.patterns.base import Pattern


def rows_by_length(output: torch.Tensor, lengths: list[int]) -> Iterator[tuple[int, slice | torch.Tensor]]:
    """Give each length that there is, with the rows of ``output`` that have it."""
    for length in sorted(set(lengths)):
        rows = [row for row, other in enumerate(lengths) if other == length]
        yield length, slice(None) if len(rows) == len(lengths) else kernels.index_on(output.device, rows)


def writable(output: torch.Tensor) -> torch.Tensor:
    """Return attention's output to write to; a copy where its backward pass would miss what was there."""
    return output.clone() if output.requires_grad else output


@dataclass(frozen=True)
class Streaming(Pattern):
    """
    Sees sink + window: key j is seen by query i if j ≤ i and (j < sink or i − j < window). Exact token counts.

    With a ``block_size`` above 1, sink and window are rounded up to whole blocks, and within the prompt blocks of
    queries see whole blocks of keys: i // block_size − j // block_size < window / block_size takes the place of
    i − j < window. Tokens behind the prompt see the rounded sink and window exactly.

    Parameters
    ----------
    sink, window : int
        Tokens; the window includes the query's own, or its own block.
    block_size : int
        Tokens of a block; 1 is exact.
    """

    name: ClassVar[str] = "streaming"

    sink: int
    window: int = field(metadata={"min": 1})
    block_size: int = field(default=1, kw_only=True, metadata={"min": 1})

    def mask(self, length: int, prompt_length: int | None = None) -> torch.Tensor:
        """See ``Pattern.mask``."""
        i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
        sink, window, block = self.later.sink, self.later.window, self.block_size
        near = i - j < window
        if block > 1:
            in_prompt = i < (length if prompt_length is None else prompt_length)
            near = torch.where(in_prompt, i // block - j // block < window // block, near)
        return (j <= i) & ((j < sink) | near)

    def prefill(self, query_BHSD, key_BKTD, value_BKTD, scale, prompt_lengths=None) -> torch.Tensor:
        """See ``Pattern.prefill``; with blocks and prompts that other tokens follow, of a whole sequence (S = T)."""
        states = query_BHSD, key_BKTD, value_BKTD
        if self.block_size == 1:
            return kernels.streaming(*states, self.sink, self.window, scale)
        later = self.later
        output = kernels.block_streaming(*states, later.sink, later.window, self.block_size, scale)
        if not prompt_lengths or min(prompt_lengths) >= query_BHSD.shape[2]:
            return output
        output = writable(output)
        for length, rows in rows_by_length(output, prompt_lengths):
            if length < query_BHSD.shape[2]:
                behind = query_BHSD[rows, :, length:], key_BKTD[rows], value_BKTD[rows]
                output[rows, :, length:] = later.prefill(*behind, scale)
        return output

    def spans(self, length: int, prompt_length: int) -> list[tuple[int, int, int, int]]:
        """See ``Pattern.spans``; with blocks every query of one sees another window."""
        if self.block_size > 1:
            raise UnsupportedModelError(
                f"sequences packed into one row cannot run {self.name} with block_size {self.block_size}: leave "
                "block_size out of the adapter's sparse pattern, which then counts exact tokens, or use a batch"
            )
        return [(0, length, self.sink, self.window)]

    @property
    def later(self) -> Streaming:
        """Sink + window, in whole blocks."""
        block = self.block_size
        return Streaming(-(-self.sink // block) * block, -(-self.window // block) * block)

    def kept(self, length: int) -> int:
        """See ``Pattern.kept``."""
        return min(length, self.later.sink + self.later.window)

    def pairs(self, length: int) -> int:
        """See ``Pattern.pairs``."""
        kept, block = self.kept(length), self.block_size
        blocks, left = divmod(length - kept, block)
        # A query that does not see everything sees all but its own block, and that up to itself.
        others = self.later.sink + self.later.window - block
        own = blocks * (block * (block + 1) // 2) + left * (left + 1) // 2
        return kept * (kept + 1) // 2 + (length - kept) * others + own

    def _seen(self, i: int) -> int:
        """Count the keys that query ``i`` of the prompt sees."""
        return min(i, self.later.sink + self.later.window - self.block_size + i % self.block_size) + 1
