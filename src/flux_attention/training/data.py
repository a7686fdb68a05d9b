"""Checks, reads or generates, and packs a recipe's data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from flux_attention.errors import DataError, RecipeError
from flux_attention.training.generated import generate
from flux_attention.training.packing import PackedExamples
from flux_attention.training.recipe import Recipe
from flux_attention.training.records import Example, Report
from flux_attention.training.tokenising import load_records

#: Keys of a source in a recipe, by its kind.
SOURCES = {
    "path": {"path", "name", "split", "limit", "chat_template", "chat_template_kwargs"},
    "generated": {"generated", "lengths", "tasks", "held_out", "max_chars"},
}


def check_sources(recipe: Recipe) -> None:
    """
    Check the keys of a recipe's sources; nothing is read.

    Raises
    ------
    RecipeError
        For unknown keys, or values of other types.
    """
    for source in recipe.data:
        kind = next((kind for kind in SOURCES if kind in source), None)
        for key, types in (("path", str), ("name", str), ("split", str), ("limit", int), ("chat_template", bool),
                           ("chat_template_kwargs", dict), ("lengths", list), ("tasks", dict), ("max_chars", int),
                           ("held_out", bool)):  # fmt: skip
            if key in source and (not isinstance(source[key], types) or (types is int and source[key] is True)):
                raise RecipeError(f"data: {key} is {source[key]!r}, expected {types.__name__}")
        if not all(isinstance(length, int) for length in source.get("lengths", [])):
            raise RecipeError(f"data: lengths is {source['lengths']!r}, expected a list of whole numbers")
        if source.get("limit", 1) < 1:
            raise RecipeError(f"data: limit is {source['limit']}, expected at least 1")
        if kind is None or (unknown := sorted(set(source) - SOURCES[kind])):
            what = f"unknown keys {unknown}" if kind else f"neither of {list(SOURCES)}"
            raise RecipeError(f"data: the source {source} has {what}; known are {sorted(SOURCES[kind or 'path'])}")


def load_data(
    recipe: Recipe, tokenizer, turn: Callable[[], AbstractContextManager] = nullcontext
) -> tuple[PackedExamples, Report]:
    """
    Load all sources of a recipe.

    Parameters
    ----------
    turn : callable
        See ``load_records``: several processes take turns.

    Raises
    ------
    RecipeError
        For a source with unknown keys.
    DataError
        If a source cannot be read, or no usable sequence is left.
    """
    report = Report()
    sources: list[Sequence[Example]] = []
    check_sources(recipe)
    for source in recipe.data:
        if "path" in source:
            examples: Sequence[Example] = load_records(
                source, tokenizer, recipe.max_length, recipe.targets, report, turn
            )
            report.tasks.update(example.task for example in examples)
        else:
            seed = len(sources) + 1000 * recipe.training_arguments["seed"]
            examples = generate(source, recipe, tokenizer, seed)
            report.tasks.update(examples.task(index) for index in range(len(examples)))
        sources.append(examples)
    report.used = sum(map(len, sources))
    if not report.used:
        found = report.malformed or report.left_out
        raise DataError(f"no usable record is left to train on\n{report}" if found else "there is no data")
    return PackedExamples(sources, recipe.pack_length, recipe.training_arguments["seed"]), report
