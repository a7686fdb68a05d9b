"""A draft is a question whose context can still be made longer or shorter, until its prompt has the length wanted."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

#: Of the length asked for, a prompt has at least so much, where the material suffices and can be cut.
FILLED = 0.98
ROUNDS = 12

#: Makes a context of about so many characters, of which only what the question needs may be more.
Context = Callable[[int], str]
#: A sentence ends, and the next begins.
SENTENCE = re.compile(r"(?<=[.!?]) (?=[A-Z])")


@dataclass(frozen=True)
class Draft:
    """
    Holds a question before its context has its length.

    Attributes
    ----------
    context : callable
        Makes the context, of about so many characters; the same for the same number.
    question, answer, expected
        As in ``Question``.
    """

    context: Context
    question: str
    answer: str
    expected: tuple[str, ...]


def fit(draft: Draft, length: int, count: Callable[[str], int]) -> tuple[str, int]:
    """
    Find a context whose prompt has nearly ``length`` tokens.

    Parameters
    ----------
    count : callable
        Of a context, the tokens of the whole prompt: encoded anew each time, as pieces' tokens do not add up.

    Returns
    -------
    context, tokens
        The longest context found whose prompt has at most ``length`` tokens; if there is none, the shortest one.
    """
    best, chars, low, high = None, 3 * length, -1, None
    for _ in range(ROUNDS):
        context = draft.context(chars)
        tokens = count(context)
        if tokens > length:
            high = chars
            if not chars:
                return context, tokens
        else:
            low, best = chars, max(best or (context, tokens), (context, tokens), key=lambda pair: pair[1])
            if tokens >= FILLED * length or (high is None and draft.context(2 * chars + 1) == context):
                break
        if high is None or low < 0:
            wanted = (1 + FILLED) / 2 * length
            chars = max(0, chars + int((wanted - tokens) * max(1, len(context)) / tokens))
            chars = max(chars, low + 1) if high is None else min(chars, high - 1)
        else:
            chars = (low + high) // 2
    if best is None:
        context = draft.context(0)
        return context, count(context)
    return best


def cut(text: str, chars: int) -> str:
    """Cut ``text`` behind its last whole word within ``chars`` characters."""
    if len(text) <= chars:
        return text
    return text[: max(0, text.rfind(" ", 0, max(0, chars) + 1))]


def fill(pieces: Iterable[str], chars: int, whole: bool = False) -> list[str]:
    """Take pieces up to ``chars`` characters; what is too long is cut, or left out where pieces stay ``whole``."""
    taken = []
    for piece in pieces:
        if len(piece) > chars:
            if whole:
                continue
            if kept := cut(piece, chars).rstrip():
                taken.append(f"{kept}\n\n" if piece.endswith("\n") else f"{kept} ")
            break
        taken.append(piece)
        chars -= len(piece)
    return taken


def sentences(paragraphs: Iterable[str]) -> list[str]:
    """Cut paragraphs into sentences, each with the space or empty line behind it."""
    found = []
    for paragraph in paragraphs:
        *inner, last = SENTENCE.split(paragraph)
        found += [f"{sentence} " for sentence in inner]
        found.append(f"{last}\n\n")
    return found


def hidden(
    facts: Sequence[str], filler: Sequence[str], rng: random.Random, opening: str = "", whole: bool = False
) -> Context:
    """
    Hide ``facts``, in their order, at random places between pieces of ``filler``.

    Parameters
    ----------
    facts, filler : sequence of str
        Each with the white space behind it.
    opening : str
        What stands before it all.
    whole : bool
        Whether pieces of the filler are used whole or not at all.
    """
    places = sorted(rng.random() for _ in facts)

    def context(chars: int) -> str:
        pieces = fill(filler, chars - len(opening) - sum(map(len, facts)), whole)
        parts, at = [opening], 0
        for place, fact in zip(places, facts, strict=True):
            end = int(place * (len(pieces) + 1))
            parts += [*pieces[at:end], fact]
            at = end
        return "".join([*parts, *pieces[at:]]).strip()

    return context


def tail(text: str, closing: str, at: str = "\n") -> Context:
    """Keep the end of ``text``, from a line on, and ``closing`` behind it."""

    def context(chars: int) -> str:
        start = max(0, len(text) + len(closing) - chars)
        if start:
            start = text.find(at, start) + len(at) or len(text)
        return text[start:] + closing

    return context
