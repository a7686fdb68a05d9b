"""What a routed model is made of: the sparse pattern and its sizes, the router, the base model it belongs to."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Strict
from pydantic.dataclasses import dataclass

from flux_attention.validation import (
    NO_OTHER_KEYS,
    Positive,
    Text,
    checked,
    expected,
    from_keys,
    text_keys,
    whole_number,
)

#: Sizes beyond this are mistakes, and kernels count in 32 bits.
MOST_TOKENS = 2**28
#: Names of the sparse-attention patterns (METHOD: "Patterns").
PATTERNS = ("streaming", "triangle")
#: What one decision is about; heads are for comparison.
GRANULARITIES = ("layer", "head")


class FluxConfigError(ValueError):
    """A configuration value, or a configuration file, that cannot be used; the message says which and why."""


def _tokens(least: int):
    return Annotated[whole_number(least), Field(le=MOST_TOKENS), expected(f"at most {MOST_TOKENS} tokens")]


def _one_of(names: tuple[str, ...]):
    return Annotated[Literal[names], expected(f"one of {list(names)}")]


def _numbers(kind: type):
    return Annotated[tuple[Annotated[kind, Strict()], ...], expected("a list of numbers")]


@checked(FluxConfigError, within="base_model")
@dataclass(frozen=True, config=NO_OTHER_KEYS)
class BaseModel:
    """
    The shape of the language model that routers were made for.

    Attributes
    ----------
    name : str
        Path or Hub id, for people; not compared.
    model_type : str
        ``config.model_type`` of the text decoder, for example ``qwen3``.
    num_layers, hidden_size, num_heads, num_kv_heads, head_dim, vocab_size : int
        The decoder's sizes; ``head_dim`` is that of the routed layers.
    routed_layers : tuple of int
        Indices of the layers that have a router: those with full attention over the whole context.
    sample : tuple of float, optional
        A few embedding weights, to tell models of one shape apart. Compared loosely, so that fine-tunes and other
        dtypes pass; None where weights were not at hand.

    Raises
    ------
    FluxConfigError
        For a value of the wrong kind or out of range.
    """

    name: Text
    model_type: Text
    num_layers: Positive
    hidden_size: Positive
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    vocab_size: Positive
    routed_layers: _numbers(int)
    sample: _numbers(float) | None = None

    def differences(self, other: BaseModel) -> list[str]:
        """What differs from ``other``, one readable phrase each; empty if routers of one fit the other."""
        found = [
            f"{field.name} is {getattr(other, field.name)!r}, expected {getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name not in ("name", "sample") and getattr(self, field.name) != getattr(other, field.name)
        ]
        if not found and self.sample and other.sample:
            change = math.dist(self.sample, other.sample) / (math.hypot(*self.sample) or 1.0)
            if change > 0.2:
                found.append(f"its shape fits, but its embedding weights are others (they differ by {change:.0%})")
        return found


@checked(FluxConfigError)
@dataclass(frozen=True, config=NO_OTHER_KEYS)
class FluxConfig:
    """
    Configuration of a routed model.

    Parameters
    ----------
    pattern : {"streaming", "triangle"}
        What sparse attention (SA) computes in prefill. In decode it is always sink + window.
    sink : int
        First tokens of the sequence that every query sees (A in the method).
    window : int
        Latest tokens, the query's own included, that a query sees (W).
    last_n : int
        ``triangle`` only: so many last prompt tokens attend fully.
    pool_size : int
        The router reads the first and the last ``pool_size`` prompt tokens (P).
    granularity : {"layer", "head"}
        What one decision is about: a whole layer, or (to compare with, see ``heads``) one of its KV heads.
    base_model : BaseModel, optional
        Filled in by ``attach``; checked when routers are loaded.

    Raises
    ------
    FluxConfigError
        For an unknown pattern or a size out of range.
    """

    pattern: _one_of(PATTERNS) = "streaming"
    sink: _tokens(0) = 128
    window: _tokens(1) = 1024
    last_n: _tokens(1) = 128
    pool_size: _tokens(1) = 100
    granularity: _one_of(GRANULARITIES) = "layer"
    base_model: Annotated[BaseModel | None, from_keys(BaseModel), expected("an object or null")] = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; ``from_dict`` of it is equal to this configuration."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FluxConfig:
        """
        The configuration that ``to_dict`` described.

        Raises
        ------
        FluxConfigError
            For unknown keys (by name), missing ones, or values out of range.
        """
        if not isinstance(values, dict):
            raise FluxConfigError(f"expected a JSON object, found {type(values).__name__}")
        config = cls(**text_keys(values))
        missing = sorted({field.name for field in fields(cls)} - set(values))
        if missing:
            raise FluxConfigError(f"missing keys {missing}")
        return config

    def to_json(self, path: str | Path) -> None:
        """Write the configuration to ``path``."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> FluxConfig:
        """
        Read a configuration from ``path``.

        Raises
        ------
        FluxConfigError
            If the file is not JSON or does not describe a configuration; the message names the file.
        FileNotFoundError
            If there is no such file.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise FluxConfigError(f"{path} is not valid JSON ({error}); the file may be truncated") from None
        except FluxConfigError as error:
            raise FluxConfigError(f"{path}: {error}") from None
