"""What a routed model is made of: the sparse pattern and its sizes, the router, the base model it belongs to."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

#: Sizes beyond this are mistakes, and kernels count in 32 bits.
MOST_TOKENS = 2**28
#: Names of the sparse-attention patterns (METHOD: "Patterns").
PATTERNS = ("streaming", "triangle")
#: What one decision is about; heads are for comparison.
GRANULARITIES = ("layer", "head")


def _check_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise FluxConfigError(f"{name} is {value!r}, expected a whole number, at least {least}")


class FluxConfigError(ValueError):
    """A configuration value, or a configuration file, that cannot be used; the message says which and why."""


def _check_keys(cls: type, values: dict[str, Any]) -> None:
    known = [field.name for field in fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise FluxConfigError(f"unknown {cls.__name__} keys {unknown}; known keys are {known}")


@dataclass(frozen=True)
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

    name: str
    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    routed_layers: tuple[int, ...]
    sample: tuple[float, ...] | None = None

    def __post_init__(self):
        for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
            _check_int("base_model." + name, getattr(self, name), 1)
        for name in ("name", "model_type"):
            if not isinstance(getattr(self, name), str):
                raise FluxConfigError(f"base_model.{name} is {getattr(self, name)!r}, expected text")
        for name, kinds in (("routed_layers", int), ("sample", (int, float))):
            values = getattr(self, name)
            if values is None and name == "sample":
                continue
            if not isinstance(values, (list, tuple)) or not all(isinstance(value, kinds) for value in values):
                raise FluxConfigError(f"base_model.{name} is {values!r}, expected a list of numbers")
            object.__setattr__(self, name, tuple(values))

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


@dataclass(frozen=True)
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

    pattern: str = "streaming"
    sink: int = 128
    window: int = 1024
    last_n: int = 128
    pool_size: int = 100
    granularity: str = "layer"
    base_model: BaseModel | None = None

    def __post_init__(self):
        if self.pattern not in PATTERNS:
            raise FluxConfigError(f"pattern is {self.pattern!r}, expected one of {list(PATTERNS)}")
        if self.granularity not in GRANULARITIES:
            raise FluxConfigError(f"granularity is {self.granularity!r}, expected one of {list(GRANULARITIES)}")
        for name, least in (("sink", 0), ("window", 1), ("last_n", 1), ("pool_size", 1)):
            _check_int(name, getattr(self, name), least)
            if getattr(self, name) > MOST_TOKENS:
                raise FluxConfigError(f"{name} is {getattr(self, name)}, expected at most {MOST_TOKENS} tokens")

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
        values = dict(values)
        _check_keys(cls, values)
        base = values.get("base_model")
        if base is not None and not isinstance(base, BaseModel):
            if not isinstance(base, dict):
                raise FluxConfigError(f"base_model is {base!r}, expected an object or null")
            _check_keys(BaseModel, base)
            try:
                values["base_model"] = BaseModel(**base)
            except TypeError as error:
                raise FluxConfigError(f"base_model is incomplete: {error}") from None
        config = cls(**values)
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
