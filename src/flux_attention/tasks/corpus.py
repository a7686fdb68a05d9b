"""Finds prose on the local machine, and cuts it into three splits that share no text.

Nothing is downloaded. Prose stands in the docstrings of the standard library and of the NumPy,
in the reference of the Python language that ``help()`` shows, and in what installed packages say about themselves. A
file belongs to a split by the hash of its path, as in ``text``; a paragraph that stands in several files counts once.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from flux_attention.tasks import text

#: Of documents and files: there are few, and each split needs some.
FRACTION = 0.2
DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
#: Installed packages whose docstrings are read.
PACKAGES = ("numpy",)
WORDS = range(12, 200)
MIN_LETTERS = 0.93


@dataclass(frozen=True)
class Corpus:
    """
    Holds what natural questions of one split are made from.

    Attributes
    ----------
    split : str
        One of ``text.SPLITS``.
    prose : tuple of tuple of str
        Texts, as their paragraphs.
    """

    split: str
    prose: tuple[tuple[str, ...], ...]

    def paragraphs(self, rng: random.Random) -> list[str]:
        """List all paragraphs, text after text, from a random text on."""
        start = rng.randrange(len(self.prose))
        return [paragraph for text in (*self.prose[start:], *self.prose[:start]) for paragraph in text]


def prose_of(source: str) -> list[str]:
    """List the paragraphs of ``source`` that are English sentences, not code, lists or tables."""
    found = []
    for block in re.split(r"\n\s*\n", source):
        words = block.split()
        paragraph = " ".join(words)
        letters = sum(sign.isalpha() or sign == " " for sign in paragraph)
        if len(words) not in WORDS or letters < MIN_LETTERS * len(paragraph):
            continue
        if paragraph[0].isupper() and paragraph[-1] in ".!?:" and "http" not in paragraph:
            found.append(paragraph)
    return found


def _docstrings(root: Path, folders: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            relative = path.relative_to(root)
            if not {"site-packages", "test", "tests", "testing", "_vendor"} & set(relative.parts):
                source = text.read_text(path)
                if source is not None:
                    yield relative.as_posix(), "\n\n".join(DOCSTRING.findall(source))


def _texts() -> Iterator[tuple[str, str]]:
    """Yield texts by names that are the same on every machine that has them."""
    library, *packages = text.python_roots(site_packages=True)
    yield from _docstrings(library, (".",))
    for root in packages:
        yield from _docstrings(root, PACKAGES)
    from pydoc_data.topics import topics

    yield from sorted(topics.items())
    for distribution in sorted(metadata.distributions(), key=lambda found: found.name):
        yield distribution.name, str(distribution.metadata.get_payload() or "")


@lru_cache(maxsize=1)
def _read() -> dict[str, Corpus]:
    prose: dict[str, list[tuple[str, ...]]] = {split: [] for split in text.SPLITS}
    seen: set[str] = set()
    for name, source in _texts():
        new = tuple(dict.fromkeys(paragraph for paragraph in prose_of(source) if paragraph not in seen))
        seen.update(new)
        if new:
            prose[text.split_of(name, FRACTION)].append(new)
    corpora = {}
    for split, texts in prose.items():
        random.Random(split).shuffle(texts)
        corpora[split] = Corpus(split, tuple(texts))
    return corpora


def local_corpus(split: str) -> Corpus:
    """
    Read the local machine's prose of one split.

    Parameters
    ----------
    split : str
        "train", "calibration" or "test".
    """
    return _read()[split]
