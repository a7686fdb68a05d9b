"""Arithmetic word problems: after many worked examples, or with their facts spread over prose."""

from __future__ import annotations

from dataclasses import dataclass

from flux_attention.tasks.corpus import Corpus
from flux_attention.tasks.natural.draft import Draft, hidden
from flux_attention.tasks.natural.facts import in_prose
from flux_attention.tasks.words import GOODS, PEOPLE, Words, split_words


@dataclass(frozen=True)
class Problem:
    """Holds a word problem: what it tells, what it asks, how it is solved, and the number that comes out."""

    told: tuple[str, ...]
    asked: str
    solution: str
    result: int

    @property
    def worked(self) -> str:
        """The solution, with the result at its end."""
        return f"{self.solution} The answer is {self.result}."


def problem(words: Words, people: list[str], things: list[str]) -> Problem:
    """Make a problem of one or two steps, told in two facts that make sense far from each other."""
    draw = words.rng.randint
    (first, second), goods = words.rng.sample(people, 2), words.rng.choice(things)
    a, b, c = draw(11, 40), draw(2, 9), draw(2, 9)
    problems = [
        Problem(
            (f"{first} has {a} {goods}.", f"{second} has {b} more {goods} than {first}."),
            f"How many {goods} do {first} and {second} have together?",
            f"{first} has {a} {goods}. {second} has {a} + {b} = {a + b} {goods}. Together they have {a} + {a + b} = "
            f"{2 * a + b} {goods}.",
            2 * a + b,
        ),
        Problem(
            (f"{first} has {a} {goods}.", f"{second} has {b} times as many {goods} as {first}."),
            f"How many {goods} does {second} have?",
            f"{first} has {a} {goods}, and {second} has {b} times as many: {b} x {a} = {b * a} {goods}.",
            b * a,
        ),
        Problem(
            (f"{first} bought {b} boxes with {a} {goods} in each.", f"Later {first} gave {c} {goods} to {second}."),
            f"How many of these {goods} does {first} have left?",
            f"{first} bought {b} x {a} = {b * a} {goods}. After giving away {c}, {first} has {b * a} - {c} = "
            f"{b * a - c} {goods} left.",
            b * a - c,
        ),
        Problem(
            (f"{first} sells {goods} for {b} coins each.", f"{second} bought {a} {goods} from {first}."),
            f"How many coins did {second} pay {first} for the {goods}?",
            f"{second} bought {a} {goods} for {b} coins each: {a} x {b} = {a * b} coins.",
            a * b,
        ),
        Problem(
            (f"{first} collected {a} {goods} on Monday.", f"{first} collected {b} more {goods} on Tuesday."),
            f"How many {goods} did {first} collect on the two days together?",
            f"{first} collected {a} {goods} on Monday and {b} on Tuesday: {a} + {b} = {a + b} {goods}.",
            a + b,
        ),
    ]
    return words.rng.choice(problems)


def worked(corpus: Corpus, words: Words, length: int) -> Draft:
    """Ask a problem after as many worked ones as there is room for."""
    names = split_words(PEOPLE, words.held_out), split_words(GOODS, words.held_out)
    asked = problem(words, *names)
    examples = [problem(words, *names) for _ in range(2 + length // 30)]  # each has more tokens than that
    texts = [
        f"Problem: {' '.join(each.told)} {each.asked}\nSolution: {each.worked}\n\n"
        for each in examples
        if each != asked
    ]
    opening = "These are worked examples of word problems.\n\n"
    question = (
        "Solve this problem in the same way as the examples, just as briefly.\n\n"
        f"Problem: {' '.join(asked.told)} {asked.asked}\nSolution:"
    )
    return Draft(hidden([], texts, words.rng, opening, whole=True), question, asked.worked, (str(asked.result),))


def spread(corpus: Corpus, words: Words, length: int) -> Draft:
    """Ask a problem whose facts stand far apart in prose."""
    asked = problem(words, split_words(PEOPLE, words.held_out), split_words(GOODS, words.held_out))
    question = f"{asked.asked} Find the numbers in the text, work it out step by step, and end with the answer."
    return in_prose(list(asked.told), corpus, words.rng, (question, asked.worked), [str(asked.result)])
