"""A pattern says which keys a layer may see, how they are attended to, what is kept, and what it costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from flux_attention.errors import FluxConfigError

#: Sizes beyond this are mistakes, and kernels count in 32 bits.
MAX_TOKENS = 2**28


@dataclass(frozen=True)
class Pattern(ABC):
    """
    Says which keys each query of a layer sees; subclasses are frozen dataclasses whose fields are the pattern's sizes.

    A field's metadata may hold ``min``, the least size; the greatest is ``MAX_TOKENS``.
    """

    #: Its name in configurations.
    name: ClassVar[str]
    #: Whether gradients flow through ``prefill``.
    trains: ClassVar[bool] = True

    def __post_init__(self):
        for size in fields(self):
            value, minimum = getattr(self, size.name), size.metadata.get("min", 0)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise FluxConfigError(f"{size.name} is {value!r}, expected a whole number, at least {minimum}")
            if value > MAX_TOKENS:
                raise FluxConfigError(f"{size.name} is {value}, expected at most {MAX_TOKENS} tokens")

    def to_dict(self) -> dict[str, Any]:
        """Return the pattern's name and sizes, as a configuration holds them; sizes at their default are left out."""
        sizes = {size.name: getattr(self, size.name) for size in fields(self)}
        return {"pattern": self.name} | {
            size.name: sizes[size.name] for size in fields(self) if sizes[size.name] != size.default
        }

    def of_layer(self, layer: int) -> Pattern:
        """Return the pattern of one layer, where layers differ."""
        return self

    def check(self, layers: Collection[int]) -> None:
        """
        Check what it says of layers against those that there are.

        Raises
        ------
        FluxConfigError
            If it names others.
        """
        return

    @abstractmethod
    def mask(self, length: int, prompt_length: int | None = None) -> torch.Tensor:
        """
        Define which key each query sees; for tests, not a way to compute.

        Parameters
        ----------
        length : int
            S, tokens of the sequence.
        prompt_length : int, optional
            The first so many of them are the prompt; default: all.

        Returns
        -------
        torch.Tensor
            bool (S, S).
        """

    @abstractmethod
    def prefill(
        self,
        query_BHSD: torch.Tensor,
        key_BKTD: torch.Tensor,
        value_BKTD: torch.Tensor,
        scale: float,
        prompt_lengths: list[int] | None = None,
    ) -> torch.Tensor:
        """
        Compute attention of the last S of T positions; see ``kernels.full``.

        ``prompt_lengths`` are the rows' prompts, which may be followed by other tokens; default: all S.
        """

    @abstractmethod
    def spans(self, length: int, prompt_length: int) -> list[tuple[int, int, int, int]]:
        """
        Cut a sequence, of which the first ``prompt_length`` tokens are prompt, into queries that see alike.

        Returns
        -------
        list of (int, int, int, int)
            First position, end, and the sink and the window that these queries see; in order, some may be empty.

        Raises
        ------
        UnsupportedModelError
            If the pattern has no such spans.
        """

    @property
    @abstractmethod
    def later(self) -> Pattern:
        """The pattern of tokens behind the prompt, which decides what a row has to keep."""

    @abstractmethod
    def kept(self, length: int) -> int:
        """Count the tokens whose keys and values are kept of a sequence of ``length``."""

    @abstractmethod
    def pairs(self, length: int) -> int:
        """Count the query-key pairs that are computed for a prompt of ``length`` tokens."""
