"""Checks what users give: makes pydantic dataclasses speak by this library's own errors, and refuses unknown names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from dataclasses import fields
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, Strict, ValidationError, WrapValidator
from pydantic_core import ErrorDetails, PydanticCustomError

#: For ``pydantic.dataclasses.dataclass(config=…)``: unknown keys are errors.
NO_OTHER_KEYS = ConfigDict(extra="forbid")
Class = TypeVar("Class")


def expected(words: str) -> WrapValidator:
    """Make metadata of ``Annotated`` that says what a value must be; it speaks for all that stands to its left."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            if error.errors()[0]["type"] in ("expected", "value_error"):  # said already, and more exactly
                raise
            raise PydanticCustomError("expected", "expected {words}", {"words": words}) from None

    return WrapValidator(check)


def from_keys(cls: type) -> BeforeValidator:
    """Make metadata of ``Annotated`` that makes a ``cls``, itself ``checked``, of a dict."""
    return BeforeValidator(lambda value: cls(**text_keys(value)) if isinstance(value, dict) else value)


def text_keys(values: dict[Any, Any]) -> dict[str, Any]:
    """Make keyword arguments of what YAML may give: a key that is a number is an unknown key like any other."""
    return {str(key): value for key, value in values.items()}


#: Whole numbers that are no ``bool``.
Positive = Annotated[int, Strict(), Field(ge=1), expected("a whole number, at least 1")]
Natural = Annotated[int, Strict(), Field(ge=0), expected("a whole number, at least 0")]
Text = Annotated[str, Strict(), expected("text")]
NonemptyText = Annotated[str, Strict(), Field(min_length=1), expected("text")]


def checked(error: type[ValueError], within: str = "") -> Callable[[type[Class]], type[Class]]:
    """
    Make a class decorator over pydantic's ``dataclass`` that turns its ``ValidationError`` into an ``error``.

    Parameters
    ----------
    error : type
        What is raised; its message names the key, what was found and what was expected.
    within : str
        The key that holds such objects in others.
    """

    def decorate(cls: type[Class]) -> type[Class]:
        init = cls.__init__

        @functools.wraps(init)
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            try:
                init(self, *args, **kwargs)
            except ValidationError as found:
                problems = found.errors()
            else:
                return
            if problems[0]["type"] == "value_error":  # of ``__post_init__``, or of an object within
                raise problems[0]["ctx"]["error"]
            raise error(_explained(problems, cls, within))

        setattr(cls, "__init__", __init__)  # noqa: B010 - of a class that type checkers know, no other name may be set
        return cls

    return decorate


def _explained(problems: list[ErrorDetails], cls: type[Any], within: str) -> str:
    """Say what is wrong with the values of a ``cls``: unknown keys before missing ones, and those before values."""
    where, known = within or cls.__name__, [field.name for field in fields(cls)]
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(problem["type"], []).append(str(problem["loc"][-1]))
    if unknown := kinds.get("unexpected_keyword_argument"):
        return f"unknown keys {sorted(unknown)} in {where}; known keys are {known}"
    if missing := kinds.get("missing"):
        return f"{where} is incomplete: missing keys {missing}"
    if surplus := kinds.get("unexpected_positional_argument"):
        return f"{where} takes {len(known)} values, but found {len(surplus)} more"
    name, *inner = problems[0]["loc"]
    if isinstance(name, int):  # a positional argument
        name = known[name]
    name = ": ".join([f"{within}.{name}" if within else name, *map(repr, inner)])
    return f"{name} is {problems[0]['input']!r}, {problems[0]['msg']}"


def check_known(what: str, names: Iterable[str], known: Collection[str]) -> None:
    """
    Refuse names that are not among the known ones.

    Raises
    ------
    ValueError
        With the unknown ones and all known ones.
    """
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"unknown {what} {unknown}, expected some of {list(known)}")
