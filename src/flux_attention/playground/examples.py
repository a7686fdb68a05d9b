"""Examples: the source of Python's argparse, which every machine has, with a few facts in it, and what to ask."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import dataclass

#: The text's characters: about 4,000 tokens, several times what sparse layers of the shipped model see.
CHARACTERS = 12_000
#: Far before the end, where a window does not reach.
FACTS = (
    *("Otto lives in Durban.", "Maya lives in Quito.", "Hugo lives in Bern.", "Lena lives in Cork."),
    *("Victor is a guest of Lena in secret.", "Gustav is a guest of Otto in secret."),
    *("Astrid is a guest of Hugo in secret.", "Silas is a guest of Maya in secret."),
    "The secret code of the silver whale is 48213.",
)


@dataclass(frozen=True)
class Example:
    """
    One prompt to begin with.

    Attributes
    ----------
    name : str
        On its button.
    question : str
        What is asked about the text; empty to continue it.
    answer : str
        What the text says; empty where there is no right answer.
    facts : tuple of str
        The sentences that say so.
    """

    name: str
    question: str
    answer: str = ""
    facts: tuple[str, ...] = ()


EXAMPLES = (
    Example("Two look-ups", "In which city is Gustav?", "Durban", (FACTS[5], FACTS[0])),
    Example("One fact", "What is the secret code of the silver whale?", "48213", (FACTS[8],)),
    Example("No question", ""),
)


def example_text() -> str:
    """Return the text that all examples share; so a visitor sees that it is the question that changes routes."""
    try:
        lines = inspect.getsource(argparse).split("\n")
    except OSError:  # a Python installation without its sources: the facts alone, which is enough to ask
        return "\n".join(f"# {fact}" for fact in FACTS)
    for place, fact in enumerate(FACTS):
        lines.insert(60 + 20 * place, f"# {fact}")
    text = "\n".join(lines)[:CHARACTERS]
    return text[: text.rindex("\n")]


def right_answer(text: str, question: str) -> str:
    """Return what the text says, where text and question are an example's; else nothing."""
    answers = {example.question: example.answer for example in EXAMPLES}
    return answers.get(question.strip(), "") if text == example_text() else ""
