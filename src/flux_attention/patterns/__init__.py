"""Patterns say what keys a layer may see: one file each, and the registry by which configurations name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from flux_attention.config import FluxConfig
from flux_attention.errors import FluxConfigError
from flux_attention.patterns.base import Pattern
from flux_attention.patterns.block_sparse import BlockSparse, SparseBlocks
from flux_attention.patterns.full import Full
from flux_attention.patterns.streaming import Streaming
from flux_attention.patterns.triangle import Triangle

__all__ = [
    "FULL_PATTERNS",
    "SPARSE_PATTERNS",
    "BlockSparse",
    "Full",
    "Pattern",
    "SparseBlocks",
    "Streaming",
    "Triangle",
    "build",
    "full_pattern",
    "sparse_pattern",
]

#: What full layers may compute, and what sparse layers may, by name.
FULL_PATTERNS: dict[str, type[Pattern]] = {kind.name: kind for kind in (Full, BlockSparse)}
SPARSE_PATTERNS: dict[str, type[Pattern]] = {kind.name: kind for kind in (Streaming, Triangle, SparseBlocks)}


def build(settings: Mapping[str, Any], registry: Mapping[str, type[Pattern]]) -> Pattern:
    """
    Make the pattern that a configuration names.

    Parameters
    ----------
    settings : mapping
        ``pattern``, a name in the registry, and the sizes of that pattern; those that have a default may be left out.
    registry : mapping of str to type
        ``FULL_PATTERNS`` or ``SPARSE_PATTERNS``.

    Raises
    ------
    FluxConfigError
        For an unknown name, sizes that are missing, unknown or out of range.
    """
    sizes = dict(settings)
    name = sizes.pop("pattern", None)
    if name not in registry:
        raise FluxConfigError(f"pattern is {name!r}, expected one of {list(registry)}")
    known = {size.name for size in fields(registry[name])}
    optional = {size.name for size in fields(registry[name]) if size.default is not MISSING}
    if wrong := (known - optional - set(sizes)) | (set(sizes) - known):
        raise FluxConfigError(
            f"the pattern {name!r} has the sizes {sorted(known)}; unknown or missing: {sorted(wrong)}"
        )
    return registry[name](**sizes)


def sparse_pattern(config: FluxConfig) -> Pattern:
    """Make the pattern that sparse layers use; see ``build``, and ``Pattern.check`` where the model is known."""
    return _checked(build(config.sparse, SPARSE_PATTERNS), config)


def full_pattern(config: FluxConfig) -> Pattern:
    """Make the pattern that full layers use, as ``sparse_pattern`` does."""
    return _checked(build(config.full, FULL_PATTERNS), config)


def _checked(pattern: Pattern, config: FluxConfig) -> Pattern:
    if config.base_model is not None:
        pattern.check(config.base_model.routed_layers)
    return pattern
