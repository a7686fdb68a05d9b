"""Makes training sequences of the questions of ``tasks``, when they are asked for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from flux_attention.errors import RecipeError
from flux_attention.tasks.families import EVERY_FAMILY
from flux_attention.tasks.samples import Haystack, make_sample
from flux_attention.tasks.text import local_texts
from flux_attention.training.recipe import Recipe
from flux_attention.training.records import PLAIN, Example

#: The families of ``tasks`` as task classes, where a recipe does not say otherwise.
GENERATED_TASKS = {
    "single_needle": "look-up",
    "multi_key": "look-up",
    "copy": "copy",
    "multi_value": "multi-step",
    "two_hop": "multi-step",
    "count": "multi-step",
    "plain": PLAIN,
}


class Generated(Sequence):
    """
    Makes questions of ``tasks``, hidden in the source text of the local Python installation: no download.

    The sequence of one index is always the same; families take turns.

    Parameters
    ----------
    count : int
        Sequences.
    lengths : sequence of int
        Tokens; drawn from for each sequence.
    tasks : dict of str to str
        The task class of each family that takes part.
    max_chars, held_out
        See ``local_texts``; held-out names, values and text are those of evaluation.
    seed : int
        Sources of different seeds have no sequence in common: a recipe's sources, and runs of different seeds.
    """

    def __init__(
        self,
        tokenizer,
        count: int,
        lengths: Sequence[int],
        tasks: dict[str, str],
        max_chars: int,
        held_out: bool,
        seed: int,
    ):
        self.tokenizer, self.tasks, self.held_out = tokenizer, tasks, held_out
        self.haystack = Haystack(local_texts(held_out, site_packages=True, max_chars=max_chars), tokenizer)
        self.families, self.first = list(tasks), seed * 10_000_000
        self.lengths = [random.Random(f"length-{self.first + index}").choice(list(lengths)) for index in range(count)]

    def __len__(self) -> int:
        return len(self.lengths)

    def task(self, index: int) -> str:
        """Return the task class of a sequence."""
        return self.tasks[self.families[index % len(self.families)]]

    def __getitem__(self, index: int) -> Example:
        family = self.families[index % len(self.families)]
        sample = make_sample(
            family, self.haystack, self.tokenizer, self.lengths[index], self.first + index, self.held_out
        )
        prompt = len(sample.prompt_ids)
        return Example(sample.input_ids, prompt, prompt, self.task(index))


def generate(source: dict[str, Any], recipe: Recipe, tokenizer, seed: int) -> Generated:
    """
    Make the questions that a recipe's source asks for.

    Raises
    ------
    RecipeError
        For families, lengths or task classes that cannot be.
    ValueError
        If a length cannot hold a family's facts, or the text is shorter.
    """
    tasks = source.get("tasks", GENERATED_TASKS)
    lengths = source.get("lengths", [min(4096, recipe.max_length)])
    if missing := sorted(set(tasks.values()) - set(recipe.targets)):
        raise RecipeError(
            f"data: task classes {missing} have no target in the recipe: add them, or name others in tasks"
        )
    if unknown := sorted(set(tasks) - set(EVERY_FAMILY)):
        raise RecipeError(f"data: unknown families {unknown}; known are {list(EVERY_FAMILY)}")
    if not lengths or min(lengths) < 256 or max(lengths) > recipe.max_length:
        raise RecipeError(f"data: lengths are {lengths}, expected 256 to max_length ({recipe.max_length}) tokens")
    count = source["generated"]
    if not isinstance(count, int) or count < 1 or not tasks:
        raise RecipeError(f"data: generated is {count!r} of {len(tasks)} families, expected how many sequences")
    made = Generated(
        tokenizer, count, lengths, tasks, source.get("max_chars", 20_000_000), source.get("held_out", False), seed
    )
    for family in tasks:  # fails now, not in the middle of the run
        for length in (min(lengths), max(lengths)):
            make_sample(family, made.haystack, tokenizer, length, 0, made.held_out)
    return made
