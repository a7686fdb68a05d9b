"""What a routed model is made of: the patterns and their sizes, the router, the base model it belongs to."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, Strict
from pydantic.dataclasses import dataclass

from flux_attention.errors import FluxConfigError
from flux_attention.validation import (
    NO_OTHER_KEYS,
    Class,
    Positive,
    Text,
    checked,
    expected,
    from_keys,
    text_keys,
)

#: Pooled tokens beyond this are a mistake.
MAX_POOL = 2**28
#: What one decision is about; heads are for comparison.
Granularity = Annotated[Literal["layer", "head"], expected("one of ['layer', 'head']")]
#: When routers read a prompt: while it is computed, or its two ends beforehand.
Decide = Annotated[Literal["prefill", "ends"], expected("one of ['prefill', 'ends']")]
DECIDE = ("prefill", "ends")
#: Keys that adapters of earlier versions do not have.
LATER_KEYS = {"decide", "end_tokens", "ranking", "budget"}


#: A share of sparse layers, Ω_MSR.
Budget = Annotated[float, Strict(), Field(ge=0, le=1), expected("a share of sparse layers between 0 and 1")]
WholeNumbers = Annotated[tuple[Annotated[int, Strict()], ...], expected("a list of numbers")]
Numbers = Annotated[tuple[Annotated[float, Strict()], ...], expected("a list of numbers")]
PooledTokens = Annotated[Positive, Field(le=MAX_POOL), expected(f"at most {MAX_POOL} tokens")]


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
    routed_layers: WholeNumbers
    sample: Numbers | None = None

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


#: A pattern's name and sizes; what they may be is for ``patterns`` to check.
PatternSettings = Annotated[dict[str, Any], expected("a pattern's name and sizes, such as {'pattern': 'full'}")]
#: The sizes of sparse patterns, with what ``FluxConfig(pattern=…)`` takes where they are not given.
DEFAULT_SIZES = {
    "streaming": {"sink": 128, "window": 1024},
    "triangle": {"sink": 128, "window": 1024, "last_n": 128},
}


def _sparse_by_keywords(
    pattern: str = "streaming", sink: int | None = None, window: int | None = None, last_n: int | None = None
) -> dict[str, Any]:
    """Write ``FluxConfig``'s shorthand out; a size that the pattern does not have is left out."""
    given = {"sink": sink, "window": window, "last_n": last_n}
    sizes = DEFAULT_SIZES.get(pattern, {}) if isinstance(pattern, str) else {}
    return {"pattern": pattern, **{name: size if given[name] is None else given[name] for name, size in sizes.items()}}


def _with_shorthand(cls: type[Class]) -> type[Class]:
    """Let ``FluxConfig`` take ``pattern``, ``sink``, ``window`` and ``last_n`` instead of ``sparse``."""
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self, *args: Any, **values: Any) -> None:
        short = {name: values.pop(name) for name in ("pattern", "sink", "window", "last_n") if name in values}
        if short and (args or "sparse" in values):
            raise FluxConfigError(f"sparse and {sorted(short)} are both there: the latter are a shorthand for sparse")
        if short:
            values["sparse"] = _sparse_by_keywords(**short)
        init(self, *args, **values)

    setattr(cls, "__init__", __init__)  # noqa: B010 - see validation.checked
    return cls


@_with_shorthand
@checked(FluxConfigError)
@dataclass(frozen=True, config=NO_OTHER_KEYS)
class FluxConfig:
    """
    Configuration of a routed model.

    ``FluxConfig(pattern="streaming", sink=128, window=1024)`` is short for ``sparse`` of these; sizes that are left out
    are 128 for ``sink``, 1024 for ``window`` and, for ``triangle``, 128 for ``last_n``.

    Parameters
    ----------
    sparse : dict
        What sparse attention (SA) computes: ``pattern``, a name in ``patterns.SPARSE_PATTERNS``, and its sizes. Tokens
        behind the prompt see sink + window only, whatever the pattern.
    full : dict
        What full attention (FA) computes: ``pattern``, a name in ``patterns.FULL_PATTERNS``, and its sizes.
    pool_size : int
        The router reads the first and the last ``pool_size`` prompt tokens (P).
    granularity : {"layer", "head"}
        What one decision is about: a whole layer, or (to compare with, see ``hf.heads``) one of its KV heads.
    decide : {"prefill", "ends"}
        When routers read a prompt: in each layer while the prompt is computed, or beforehand in a short pass over its
        first and last tokens alone.
    end_tokens : int
        With ``decide="ends"``, the tokens read at each end (E), at least ``pool_size``.
    ranking : tuple of int, optional
        The routed layers, the one that needs full attention most first. There are no routers then: every input runs
        the same layers full, the first ones of the ranking.
    budget : float, optional
        The share of layers that run sparse (Ω_MSR), unless ``attach`` is told otherwise: of a ``ranking`` exactly, of
        routers that were trained with budgets about. Other routers have none.
    base_model : BaseModel, optional
        Filled in by ``attach``; checked when routers are loaded.

    Raises
    ------
    FluxConfigError
        For values of the wrong kind, or that do not fit together. Patterns' names and sizes are checked where patterns
        are made: by ``attach``, recipes, and when an adapter is loaded.
    """

    sparse: PatternSettings = Field(default_factory=_sparse_by_keywords)
    full: PatternSettings = Field(default_factory=lambda: {"pattern": "full"})
    pool_size: PooledTokens = 100
    granularity: Granularity = "layer"
    decide: Decide = "prefill"
    end_tokens: PooledTokens = 128
    ranking: WholeNumbers | None = None
    budget: Budget | None = None
    base_model: Annotated[BaseModel | None, from_keys(BaseModel), expected("an object or null")] = None

    if TYPE_CHECKING:  # with the shorthand, which no checker sees in ``_with_shorthand``

        def __init__(
            self,
            sparse: dict[str, Any] = ...,
            full: dict[str, Any] = ...,
            pool_size: int = ...,
            granularity: Literal["layer", "head"] = ...,
            decide: Literal["prefill", "ends"] = ...,
            end_tokens: int = ...,
            ranking: tuple[int, ...] | None = ...,
            budget: float | None = ...,
            base_model: BaseModel | None = ...,
            *,
            pattern: str = ...,
            sink: int | None = ...,
            window: int | None = ...,
            last_n: int | None = ...,
        ) -> None: ...

    def __post_init__(self):
        if self.decide == "ends" and self.end_tokens < self.pool_size:
            raise FluxConfigError(
                f"end_tokens is {self.end_tokens}, but routers read {self.pool_size} tokens at each end (pool_size); "
                "expected at least as many"
            )
        if self.ranking is not None and self.budget is None:
            raise FluxConfigError("a ranking needs a budget, the share of layers that run sparse")
        if self.ranking is not None and (self.granularity == "head" or self.decide == "ends"):
            raise FluxConfigError(
                f"a ranking is of layers and has no routers, but granularity is {self.granularity} and decide "
                f"{self.decide}; expected layer and prefill"
            )
        if self.ranking is not None and len(set(self.ranking)) < len(self.ranking):
            raise FluxConfigError(f"ranking is {list(self.ranking)}, expected each routed layer once")

    def with_budget(self, budget: float) -> FluxConfig:
        """
        Return this configuration with another budget.

        Raises
        ------
        FluxConfigError
            If it has none.
        """
        if self.budget is None:
            raise FluxConfigError(
                f"a budget of {budget} was asked for, but these routers were not trained with one and decide how many "
                "layers run sparse themselves; calibrate the model, or train with `budget: true`"
            )
        if budget is None:
            raise FluxConfigError("budget is None, expected a share of sparse layers between 0 and 1")
        return replace(self, budget=budget)

    @property
    def full_layers(self) -> tuple[int, ...]:
        """The layers that run full for every input, by ``ranking`` and ``budget``, in the model's order."""
        if self.ranking is None or self.budget is None:
            raise FluxConfigError("only a ranking says which layers run full for every input; routers read the input")
        count = len(self.ranking) - round(self.budget * len(self.ranking))
        return tuple(sorted(self.ranking[:count]))

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
        if "pattern" in values:  # as versions before 0.2 wrote it
            flat = {name: values[name] for name in ("pattern", "sink", "window", "last_n") if name in values}
            if missing := {"pattern", "sink", "window", "last_n"} - set(flat):
                raise FluxConfigError(f"missing keys {sorted(missing)}")
            if both := {"sparse", "full"} & set(values):
                raise FluxConfigError(
                    f"pattern and {sorted(both)} are both there, keys of an earlier and of this version"
                )
            values = {name: value for name, value in values.items() if name not in flat}
            values |= {"sparse": _sparse_by_keywords(**flat), "full": {"pattern": "full"}}
        config = cls(**text_keys(values))
        missing = sorted({field.name for field in fields(cls)} - set(values) - LATER_KEYS)
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


def with_options(config: FluxConfig, budget: float | None = None, decide: str | None = None) -> FluxConfig:
    """
    Put what ``attach`` was given in place of what an adapter says; None leaves it.

    Raises
    ------
    FluxConfigError
        For values that cannot be, or not with this adapter.
    """
    config = config if budget is None else config.with_budget(budget)
    if decide is None:
        return config
    # The ends are long enough for what routers read.
    return replace(config, decide=decide, end_tokens=max(config.end_tokens, config.pool_size))
