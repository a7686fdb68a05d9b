"""Which keys a layer may see: one file a pattern. Each has its mask, its prefill and its count of pairs."""

from __future__ import annotations

from flux_attention.config import FluxConfig
from flux_attention.patterns.full import Full
from flux_attention.patterns.streaming import Streaming
from flux_attention.patterns.triangle import Triangle

__all__ = ["Full", "Streaming", "Triangle", "sparse_pattern"]


def sparse_pattern(config: FluxConfig) -> Streaming:
    """The pattern that sparse layers use in prefill; all of them keep and decode sink + window."""
    if config.pattern == "triangle":
        return Triangle(config.sink, config.window, config.last_n)
    return Streaming(config.sink, config.window)
