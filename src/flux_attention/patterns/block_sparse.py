"""Block-sparse prefill computes the blocks of keys that a cheap estimate finds worth it, anew for each prompt."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from flux_attention import kernels
from flux_attention.errors import FluxConfigError, UnsupportedModelError
from flux_attention.patterns.base import MAX_TOKENS, Pattern
from flux_attention.patterns.full import Full
from flux_attention.patterns.streaming import Streaming, rows_by_length

#: By which a real model's answers lost little at 16,384 tokens (docs/block-sparse.md); the first selects fewer blocks.
THRESHOLDS = {"maximum": 0.025, "mass": 0.95}


#: One for all heads, or one each.
Threshold = float | tuple[float, ...]


def _checked(threshold: object) -> Threshold:
    given = threshold if isinstance(threshold, list | tuple) else [threshold]
    for value in given:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise FluxConfigError(f"threshold is {value!r}, expected a number above 0, at most 1")
    if not given:
        raise FluxConfigError("threshold is empty, expected one number, or one for each head")
    return tuple(given) if isinstance(threshold, list | tuple) else given[0]


def _by_layer(thresholds: Mapping[Any, object]) -> dict[int, Threshold]:
    if wrong := [layer for layer in thresholds if not str(layer).isdecimal()]:
        raise FluxConfigError(f"threshold names {wrong}, expected numbers of layers")
    return {int(layer): _checked(value) for layer, value in thresholds.items()}


@dataclass(frozen=True)
class BlockSparse(Pattern):
    """
    Lets each block of a prompt's queries see the blocks of keys that are selected for it; later tokens see all.

    A prompt that is too short for that to be faster sees all, too. What counts is the sequence's own length in the call
    that begins it: the host knows it, and no other sequence of a batch changes it. So a loop of one's own that reads a
    prompt in several calls selects in the first one, by that one's length, and nowhere else.

    Attributes
    ----------
    threshold : float, tuple of float or dict, optional
        A share of the row's highest score ("maximum"), or of all its scores ("mass"), above 0 and at most 1; one for
        all heads, or one each; or such thresholds by layer; default, also of layers that are not named: that of
        ``THRESHOLDS``.
    select : {"maximum", "mass"}
        See ``kernels.by_maximum`` and ``kernels.by_mass``.
    stride : int
        Of the scores, a divisor of 128: their cost is 1 / (2 · stride) of exact attention's.
    correct : bool
        Whether blocks that are not selected count by their means.
    from_tokens : int, optional
        Shorter prompts attend exactly; default: as was measured on this kind of GPU, on a CPU any length selects. See
        ``kernels.block_sparse_from``. 0 selects everywhere.
    """

    name: ClassVar[str] = "block_sparse"
    trains: ClassVar[bool] = False

    threshold: Threshold | Mapping[int, Threshold] | None = None
    select: str = "maximum"
    stride: int = 16
    correct: bool = False
    from_tokens: int | None = None

    def __post_init__(self):
        if self.select not in kernels.SELECT:
            raise FluxConfigError(f"select is {self.select!r}, expected one of {list(kernels.SELECT)}")
        if self.threshold is None:
            object.__setattr__(self, "threshold", THRESHOLDS[self.select])
        checked = _by_layer(self.threshold) if isinstance(self.threshold, Mapping) else _checked(self.threshold)
        object.__setattr__(self, "threshold", checked)
        if not isinstance(self.stride, int) or isinstance(self.stride, bool) or self.stride not in (4, 8, 16, 32, 64):
            raise FluxConfigError(f"stride is {self.stride!r}, expected 4, 8, 16, 32 or 64")
        if not isinstance(self.correct, bool):
            raise FluxConfigError(f"correct is {self.correct!r}, expected true or false")
        given = 0 if self.from_tokens is None else self.from_tokens
        if not isinstance(given, int) or isinstance(given, bool) or not 0 <= given <= MAX_TOKENS:
            raise FluxConfigError(f"from_tokens is {given!r}, expected a number of tokens, 0 to {MAX_TOKENS}, or none")

    def to_dict(self) -> dict[str, Any]:
        """See ``Pattern.to_dict``."""
        found = super().to_dict()
        if isinstance(self.threshold, Mapping):  # as JSON has it
            found["threshold"] = {str(layer): value for layer, value in self.threshold.items()}
        return found

    def of_layer(self, layer: int) -> Pattern:
        """See ``Pattern.of_layer``."""
        return replace(self, threshold=self.threshold.get(layer)) if isinstance(self.threshold, Mapping) else self

    def check(self, layers: Collection[int]) -> None:
        """See ``Pattern.check``."""
        if isinstance(self.threshold, Mapping) and (unknown := sorted(set(self.threshold) - set(layers))):
            raise FluxConfigError(f"threshold names layers {unknown}, expected some of {sorted(layers)}")

    def mask(self, length: int, prompt_length: int | None = None) -> torch.Tensor:
        """
        See ``Pattern.mask``; there is none.

        Raises
        ------
        UnsupportedModelError
            What is seen depends on queries and keys.
        """
        raise UnsupportedModelError(f"what {self.name} sees depends on queries and keys: it has no mask")

    def prefill(self, query_BHSD, key_BKTD, value_BKTD, scale, prompt_lengths=None) -> torch.Tensor:
        """
        See ``Pattern.prefill``.

        Raises
        ------
        UnsupportedModelError
            Where gradients are needed; for as many thresholds as the layer has no heads.
        """
        states = query_BHSD, key_BKTD, value_BKTD
        if torch.is_grad_enabled() and any(part.requires_grad for part in states):
            raise UnsupportedModelError(
                f"gradients do not flow through {self.name}, which selects: train with the patterns full and streaming"
            )
        width, keys = query_BHSD.shape[2], key_BKTD.shape[2]
        # Only whole prompts may be of unlike lengths, or followed by other tokens.
        lengths = prompt_lengths if prompt_lengths and width == keys else [width]
        if min(lengths) >= width:
            return self.attend(*states, scale)
        output = torch.empty_like(query_BHSD)
        for length, rows in rows_by_length(output, [min(length, width) for length in lengths]):
            query, key, value = (part[rows] for part in states)
            seen = keys - width + length
            output[rows, :, :length] = self.attend(query[:, :, :length], key[:, :, :seen], value[:, :, :seen], scale)
            if length < width:
                output[rows, :, length:] = self.later.prefill(query[:, :, length:], key, value, scale)
        return output

    def attend(self, query_BHSD, key_BKTD, value_BKTD, scale) -> torch.Tensor:
        """
        Compute attention of prompts of one length, by selection or exactly.

        Raises
        ------
        UnsupportedModelError
            For as many thresholds as the layer has no heads.
        """
        heads = query_BHSD.shape[1]
        threshold = torch.tensor(self.threshold, dtype=torch.float32)
        if threshold.numel() not in (1, heads):
            raise UnsupportedModelError(
                f"there are {threshold.numel()} thresholds, expected 1 or {heads}, one each head"
            )
        if key_BKTD.shape[2] < self.selects_from(query_BHSD):
            return kernels.full(query_BHSD, key_BKTD, value_BKTD, scale)
        return kernels.block_sparse(
            query_BHSD, key_BKTD, value_BKTD, scale, self.select, threshold, self.stride, self.correct
        )

    def selects_from(self, query_BHSD) -> int:
        """Return the tokens from which prompts select: ``from_tokens``, or what is fast on these queries' device."""
        return kernels.block_sparse_from(query_BHSD) if self.from_tokens is None else self.from_tokens

    def density(self, query_BHSD, key_BKTD, scale) -> float:
        """Return what share of the causal blocks is selected, at any length: mean over sequences and heads."""
        share = torch.tensor(self.threshold, dtype=torch.float32)
        blocks = kernels.selected_blocks(query_BHSD, key_BKTD, scale, self.select, share, self.stride)
        return kernels.density(blocks).item()

    def spans(self, length: int, prompt_length: int) -> list[tuple[int, int, int, int]]:
        """See ``Pattern.spans``: there are none."""
        raise UnsupportedModelError(
            f"sequences packed into one row cannot run {self.name}, which selects for each: use a batch"
        )

    @property
    def later(self) -> Pattern:
        """Full attention."""
        return Full()

    def kept(self, length: int) -> int:
        """See ``Pattern.kept``: as later tokens need."""
        return self.later.kept(length)

    def pairs(self, length: int) -> int:
        """See ``Pattern.pairs``; as many as there are: how many are selected depends on the prompt."""
        return length * (length + 1) // 2


@dataclass(frozen=True)
class SparseBlocks(BlockSparse):
    """
    Lets each block of a prompt's queries see selected blocks, as ``BlockSparse``; later tokens see sink + window.

    Attributes
    ----------
    sink, window : int
        Tokens; the window includes the query's own.
    """

    sink: int = field(default=128, kw_only=True)
    window: int = field(default=1024, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        Streaming(self.sink, self.window)  # wrong sizes fail here

    @property
    def later(self) -> Pattern:
        """Sink + window."""
        return Streaming(self.sink, self.window)
