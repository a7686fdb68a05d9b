"""Code completion: the next line of a real source file, with other files of the same library before it."""

from __future__ import annotations

import io
import re
import tokenize

from flux_attention.tasks.corpus import Corpus
from flux_attention.tasks.natural.draft import Draft, tail
from flux_attention.tasks.words import Words

NAME = re.compile(r"[A-Za-z_]\w{2,}")
#: Lines before the one asked for, at least; and how long that one is.
BEFORE, CHARS = 40, range(15, 80)
OPENING = "Complete the code below. Several files stand there, and the last one breaks off.\n\n"
QUESTION = "Write the next line of the last file. Reply with this one line of code only."
#: Files before the last one, for each token of the prompt.
CHARS_A_TOKEN = 8


def _text_lines(source: str) -> set[int]:
    """Number the lines, from 0, that stand in strings of several lines or in comments."""
    found = set()
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT or token.start[0] != token.end[0]:
                found.update(range(token.start[0] - 1, token.end[0]))
    except (tokenize.TokenError, SyntaxError):
        return set(range(source.count("\n") + 1))
    return found


def askable_lines(source: str) -> list[int]:
    """Number the lines of code that can be foretold: every name in them has stood in the file before."""
    texts, known, found = _text_lines(source), set(), []
    for number, line in enumerate(source.splitlines()):
        names = set(NAME.findall(line))
        if (
            number >= BEFORE
            and number not in texts
            and len(line.strip()) in CHARS
            and len(names) > 1
            and names <= known
        ):
            found.append(number)
        known |= names
    return found


def completion(corpus: Corpus, words: Words, length: int) -> Draft:
    """Ask for the next line of a file that breaks off."""
    files = words.rng.sample(corpus.code, len(corpus.code))
    path, source, found = next((path, text, found) for path, text in files if (found := askable_lines(text)))
    number = words.rng.choice(found)
    lines = source.splitlines()
    last = f"# File: {path}\n" + "\n".join(lines[:number]) + "\n"
    others, room = [], CHARS_A_TOKEN * length - len(last)
    for other, text in files:
        if room > 0 and other != path:
            others.append(f"# File: {other}\n{text.rstrip()}\n\n\n")
            room -= len(text)
    code = tail("".join(others) + last, "")
    line = lines[number].strip()

    def context(chars: int) -> str:
        return OPENING + code(max(200, chars - len(OPENING))).rstrip()

    return Draft(context, QUESTION, line, (line,))
