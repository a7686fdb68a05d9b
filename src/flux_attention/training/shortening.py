"""Shortens a context around the passages in which its answer stands."""

from __future__ import annotations

import re
from itertools import zip_longest

import numpy as np

#: Characters that stay on either side of a passage: the sentence that it stands in.
AROUND = 200
#: Stands where text was left out.
GAP = "\n…\n"
#: What an answer may have around it that its context has not.
_EDGES = " \t\r\n\"'`“”‘’.,;:!?*()[]{}"
#: What stands between an answer's parts; the comma in 1,234 does not.
_BETWEEN = re.compile(r"[;\n]|,(?!\d{3}(?!\d))|\band\b")
#: An answer of more parts is a text, such as code, whose lines occur everywhere.
_MOST = 32
_ITEM = re.compile(r"\s*(?:[-*•]|\d+[.)])\s+")
#: Letters and digits of scripts that set spaces between words: Thai and what comes after it (Chinese, Japanese) do not.
_LETTER = r"[^\W\u0e00-\U0010ffff]"

#: Where a text stands in another, [start, end) in characters.
Place = tuple[int, int]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _places(text: str, context: str, plain: str) -> list[Place]:
    """Find a text in a context as whole words, whatever the case and the white space between words."""
    words = text.split()
    if _plain(text) not in plain:  # a hundred times as fast as the search below
        return []
    before, after = (f"(?{way}{_LETTER})" if re.match(_LETTER, text[at]) else "" for way, at in (("<!", 0), ("!", -1)))
    pattern = before + r"\s+".join(map(re.escape, words)) + after
    return [found.span() for found in re.finditer(pattern, context, re.IGNORECASE)]


def answer_places(answer: str, context: str) -> list[list[Place]]:
    """
    Find where an answer's text stands in its context.

    Returns
    -------
    list of list of (int, int)
        Of each part of the answer its places, in order. The whole answer is one part where it occurs; else its items
        are, between commas, semicolons, line ends or "and", if they are not many and at least half of them occur: most
        of a summary does not.
    """
    whole, plain = answer.strip(_EDGES) or answer.strip(), _plain(context)
    if places := _places(whole, context, plain):
        return [places]
    items = [_ITEM.sub("", item, count=1).strip(_EDGES) for item in _BETWEEN.split(answer)]
    items = list(dict.fromkeys(filter(None, items)))
    if len(items) > _MOST:
        return []
    found = [places for item in items if (places := _places(item, context, plain))]
    return found if 2 * len(found) >= len(items) else []


def _outermost_first(places: list[Place]) -> list[Place]:
    """Order places: the first, the last, the second, the last but one; questions often ask for the first or last."""
    half = (len(places) + 1) // 2
    pairs = zip_longest(places[:half], places[: half - 1 : -1])
    return [place for pair in pairs for place in pair if place is not None]


def shorten(context: str, parts: list[list[Place]], length: int) -> str:
    """
    Shorten a context to ``length`` characters: an answer's passages stay, and for the rest of the room both ends.

    Parameters
    ----------
    parts : list of list of (int, int)
        See ``answer_places``. One place of each part stays with the text around it, whatever ``length`` is; the others,
        the outermost first, as long as there is room.
    length : int
        Characters of the context that are kept, without the ``GAP`` between them.
    """
    kept, used = np.zeros(len(context), bool), 0
    for number, turn in enumerate(zip_longest(*map(_outermost_first, parts))):
        for start, end in filter(None, turn):
            passage = kept[max(0, start - AROUND) : end + AROUND]
            added = len(passage) - int(passage.sum())
            if number == 0 or used + added <= length:
                passage[:] = True
                used += added
    # As many characters of both ends as there is room for: those of a passage are counted already.
    head = np.concatenate([[0], np.cumsum(~kept)])
    low, high = 0, len(context)
    while low < high:
        ends = (low + high + 1) // 2
        added = head[(ends + 1) // 2] + head[-1] - head[len(context) - ends // 2]
        low, high = (ends, high) if used + added <= length else (low, ends - 1)
    kept[: (low + 1) // 2] = kept[len(context) - low // 2 :] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]]).astype(np.int8)))
    return GAP.join(context[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True))
