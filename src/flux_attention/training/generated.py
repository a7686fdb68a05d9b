"""Makes training sequences of the questions of ``tasks``, when they are asked for."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from flux_attention.errors import RecipeError
from flux_attention.tasks.corpus import Corpus, local_corpus
from flux_attention.tasks.families import EVERY_FAMILY
from flux_attention.tasks.questions import NATURAL, as_sample, make_question
from flux_attention.tasks.samples import Haystack, Sample, make_sample
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
    Makes questions of ``tasks``, hidden in text of the local Python installation: no download.

    The sequence of one index is always the same; families take turns. Those of ``questions.NATURAL`` go through the
    tokenizer's chat template, where it has one.

    Parameters
    ----------
    count : int
        Sequences.
    lengths : sequence of int
        Tokens; drawn from for each sequence, of which those in natural language have a little less.
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
        self.max_chars = max_chars
        self.families, self.first = list(tasks), seed * 10_000_000
        self.lengths = [random.Random(f"length-{self.first + index}").choice(list(lengths)) for index in range(count)]

    @cached_property
    def haystack(self) -> Haystack:
        """The text that questions of ``families.EVERY_FAMILY`` are hidden in."""
        return Haystack(local_texts(self.held_out, site_packages=True, max_chars=self.max_chars), self.tokenizer)

    @cached_property
    def corpus(self) -> Corpus:
        """What questions in natural language are made from."""
        return local_corpus("test" if self.held_out else "train")

    def digest(self) -> bytes:
        """Hash what the sequences are made from (SHA-256)."""
        found = hashlib.sha256(repr([self.lengths, self.tasks, self.held_out, self.first]).encode())
        if not set(self.families) <= set(NATURAL):
            found.update(self.haystack.tokens.tobytes())
        if set(self.families) & set(NATURAL):
            found.update(self.corpus.digest().encode())
        return found.digest()

    def __len__(self) -> int:
        return len(self.lengths)

    def task(self, index: int) -> str:
        """Return the task class of a sequence."""
        return self.tasks[self.families[index % len(self.families)]]

    def __getitem__(self, index: int) -> Example:  # ty: ignore[incompatible-method-override]
        sample = self.make(self.families[index % len(self.families)], self.lengths[index], self.first + index)
        prompt = len(sample.prompt_ids)
        return Example(sample.input_ids, prompt, prompt, self.task(index))

    def make(self, family: str, length: int, seed: int) -> Sample:
        """Make a sample of ``length`` tokens at most, answer included."""
        if family not in NATURAL:
            return make_sample(family, self.haystack, self.tokenizer, length, seed, self.held_out)
        sample = self._ask(family, length, seed)
        while (surplus := len(sample.input_ids) - length) > 0:  # the answer, whose length was not known
            sample = self._ask(family, len(sample.prompt_ids) - surplus, seed)
        return sample

    def _ask(self, family: str, length: int, seed: int) -> Sample:
        return as_sample(make_question(family, self.corpus, self.tokenizer, length, seed), self.tokenizer)


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
    if unknown := sorted(set(tasks) - {*EVERY_FAMILY, *NATURAL}):
        raise RecipeError(f"data: unknown families {unknown}; known are {[*EVERY_FAMILY, *NATURAL]}")
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
            made.make(family, length, 0)
    return made
