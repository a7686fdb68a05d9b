"""The forward context: what the forward call that is running in a thread has to say to layers, cache and compiled code.

A context travels to the layers as a keyword argument, so that gradient checkpointing, which runs layers again, finds
it; within a layer a context variable holds it, so that threads do not mix.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from flux_attention.config import FluxConfig
from flux_attention.hf.generation.progress import Progress
from flux_attention.patterns import Pattern

#: The name under which attention and mask functions are registered with transformers.
NAME = "flux"
#: The keyword that carries the context to attention layers.
CONTEXT = "flux_context"
#: The keyword by which attention is told that it is traced into a compiled layer.
COMPILED = "flux_compiled"


class ForwardContext(Protocol):
    """What a forward pass and a captured decode step have in common."""

    #: Whether it is a captured decode step.
    is_step: bool
    #: Whether the forward call is over; layers may still be computed again by gradient checkpointing.
    finished: bool
    #: Whether query modules' outputs are to be observed.
    reads_queries: bool
    #: Whether sequences lie behind one another in one row.
    is_packed: bool
    #: The routed layers' indices.
    routed: Collection[int]

    def observe(self, layer: int, output: torch.Tensor, source: torch.Tensor) -> None:
        """Read the output and the input of a layer's query module."""

    def attend(
        self, layer: int, query_BHSD: torch.Tensor, key_BKSD: torch.Tensor, value_BKSD: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Compute attention output (B, S, H, D) of one layer, and store its new keys and values."""

    def finish(self) -> Any:
        """End the forward call; returns what is to be published, or None."""


class AttachedModel(Protocol):
    """What generation knows of the handle (``handle.Routing``)."""

    model: Any
    config: FluxConfig
    layers: tuple[int, ...]
    units: tuple[Any, ...]
    sparse: Pattern
    cuda_graphs: bool
    steps: Any
    own_hooks: set
    is_attached: bool
    is_tensor_parallel: bool
    routes: Any
    full: Pattern

    def force(self, routes: Any) -> AbstractContextManager:
        """Force the routes of prefills within a ``with`` block."""

    def needs_whole_prompt(self, lengths: list[int], again: bool = False) -> str | None:
        """Say why prompts of these lengths have to come in one call, and what to do; None if they need not."""

    def publish_report(self, report: Any) -> None:
        """Make the report of a generation that has ended this thread's, and the latest."""


@dataclass(frozen=True)
class EnclosingCall:
    """
    The call of a model around the decoder, which may turn a padding mask into masks for each kind of layer.

    Attributes
    ----------
    attention_mask : torch.Tensor or None
        As it was given.
    input_ids : torch.Tensor or None
        As they were given.
    text_only : bool
        Whether no token is an image's, a video's or a sound's.
    """

    attention_mask: Any
    input_ids: torch.Tensor | None
    text_only: bool


@dataclass(frozen=True)
class GeneratedPrompt:
    """
    The prompt of a generation.

    Attributes
    ----------
    cache : transformers.Cache
        The KV cache that is generated with.
    columns : int
        Of the prompt, those that are cached already included.
    input_ids : torch.Tensor
        int64 (B, S), of the prompt, or of its new tokens only; of fewer columns where it was given as embeddings.
    attention_mask : torch.Tensor or None
        (B, S), 1 = real token.
    progress : Progress
        How far the generation is.
    """

    cache: Any
    columns: int
    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    progress: Progress

    def note(self, cache: Any, began: float, past: list[int], lengths: list[int]) -> None:
        """Note a forward call, if it is this generation's and not that of another prompt; see ``Progress.call``."""
        if cache is self.cache:
            is_prompt = cache is not None and cache.get_seq_length() < self.columns
            self.progress.call(began, is_prompt, past, lengths)


#: The context of the forward call that this thread is in.
current: ContextVar[ForwardContext | None] = ContextVar("flux_context", default=None)
#: The calls around the decoder's, outermost first.
enclosing: ContextVar[tuple[EnclosingCall, ...]] = ContextVar("flux_enclosing", default=())
#: What this thread generates from: a forward call with that cache may hold drafted tokens behind the prompt.
generated_prompt: ContextVar[GeneratedPrompt | None] = ContextVar("flux_generated_prompt", default=None)
