"""The batch layout of a forward call: which of its tokens are real, and how rows are left-aligned.

Shape suffixes: B batch, S columns, H heads, D head dim, N tokens of a sequence.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BatchLayout:
    """
    Which of a forward call's tokens are real.

    Attributes
    ----------
    width : int
        S, columns of the call, padding included.
    lengths : list of int
        Real tokens of each row.
    columns_BS : torch.Tensor or None
        int64, the column of each row's n-th real token, then of its padding; None where that is the identity
        (no padding, or padding on the right).
    real_BS : torch.Tensor or None
        bool on the CPU, which columns are real; None where all are.
    starts : list of int or None
        Of sequences packed behind one another into a single row: the column at which each begins. ``lengths`` are
        then the sequences', and B counts them.
    """

    width: int
    lengths: list[int]
    columns_BS: torch.Tensor | None = None
    real_BS: torch.Tensor | None = None
    starts: list[int] | None = None

    @classmethod
    def all_real(cls, batch: int, width: int) -> BatchLayout:
        """Describe a call without padding."""
        return cls(width, [width] * batch)

    @classmethod
    def packed(cls, lengths: list[int]) -> BatchLayout:
        """Describe sequences of these lengths behind one another in one row."""
        ends = list(itertools.accumulate(lengths))
        return cls(ends[-1], lengths, starts=[0, *ends[:-1]])

    @classmethod
    def from_mask(cls, real_BS: torch.Tensor, device: torch.device | str = "cpu") -> BatchLayout:
        """Describe a call by its bool mask on the CPU, True = real, for states on ``device``."""
        batch, width = real_BS.shape
        if real_BS.all():
            return cls.all_real(batch, width)
        columns = torch.argsort(~real_BS, dim=1, stable=True)
        identity = bool((columns == torch.arange(width, device="cpu")).all())
        return cls(width, real_BS.sum(1).tolist(), None if identity else columns.to(device), real_BS)

    @property
    def is_uniform(self) -> bool:
        """Whether no row has padding."""
        return self.real_BS is None

    def left_align(self, states_BHSD: torch.Tensor) -> torch.Tensor:
        """Bring the rows' real tokens to the front, in order."""
        if self.columns_BS is None:
            return states_BHSD
        index = self.columns_BS.to(states_BHSD.device)[:, None, :, None]
        return states_BHSD.take_along_dim(index, dim=2)

    def restore(self, states_BHSD: torch.Tensor) -> torch.Tensor:
        """Undo ``left_align``."""
        if self.columns_BS is None:
            return states_BHSD
        index = self.columns_BS.to(states_BHSD.device)[:, None, :, None].expand_as(states_BHSD)
        return torch.empty_like(states_BHSD).scatter(2, index, states_BHSD)

    def columns(self, slots_BN: torch.Tensor) -> torch.Tensor:
        """Return the columns at which tokens stand that are numbered from each sequence's start."""
        if self.starts is not None:
            return slots_BN + torch.tensor(self.starts, device="cpu")[:, None]
        if self.columns_BS is not None:
            return self.columns_BS.cpu().gather(1, slots_BN)
        return slots_BN

    def prompt_tokens(self, columns: int) -> list[int]:
        """Count each row's real tokens in the first so many columns."""
        if self.real_BS is None:
            return [min(columns, length) for length in self.lengths]
        return self.real_BS[:, :columns].sum(1).tolist()
