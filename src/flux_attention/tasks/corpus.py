"""Finds prose, documentation and code on the local machine, and cuts it into three splits that share no text.

Nothing is downloaded. Prose stands in the docstrings of the standard library and of NumPy, in the reference of the
Python language that ``help()`` shows, and in what packages say about themselves (see ``documents``). A file or package
belongs to a split by the hash of its path or name, as in ``text``; a paragraph of several of them counts once.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from functools import lru_cache
from importlib import metadata
from typing import cast

from flux_attention.tasks import text
from flux_attention.tasks.documents import Document, debian_packages, functions, python_packages
from flux_attention.validation import check_known

#: Of documents and files: there are few, and each split needs some.
FRACTION = 0.2
DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
#: Installed packages whose files are read, beside the standard library.
PACKAGES = ("numpy",)
SKIPPED = {"site-packages", "test", "tests", "testing", "_vendor", "idlelib", "lib2to3", "pydoc_data", "encodings"}
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
    documents : tuple of Document
        Documented packages and functions.
    code : tuple of (str, str)
        Source files: their paths below the library's folder, and what stands in them.
    """

    split: str
    prose: tuple[tuple[str, ...], ...] = field(repr=False)
    documents: tuple[Document, ...] = field(repr=False, default=())
    code: tuple[tuple[str, str], ...] = field(repr=False, default=())

    def digest(self) -> str:
        """Hash all that is in it (SHA-256): packages that come and go change it."""
        return hashlib.sha256(repr((self.split, self.prose, self.documents, self.code)).encode()).hexdigest()

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
        letters = sum(sign.isascii() and (sign.isalpha() or sign == " ") for sign in paragraph)
        if len(words) not in WORDS or letters < MIN_LETTERS * len(paragraph):
            continue
        if paragraph[0].isupper() and paragraph[-1] in ".!?:" and "http" not in paragraph:
            found.append(paragraph)
    return found


def _code() -> Iterator[tuple[str, str]]:
    """Yield source files, with their paths below the library's folder."""
    for root in text.python_roots(site_packages=True):
        for folder in PACKAGES if root.name == "site-packages" else (".",):
            for path in sorted((root / folder).rglob("*.py")):
                relative = path.relative_to(root)
                source = None if SKIPPED & set(relative.parts) else text.read_text(path)
                if source is not None:
                    yield relative.as_posix(), source


@dataclass
class _Material:
    """Collects one split's material."""

    prose: list[tuple[str, ...]]
    documents: list[Document]
    code: list[tuple[str, str]]


@lru_cache(maxsize=1)
def _read() -> dict[str, Corpus]:
    from pydoc_data.topics import topics

    splits = {split: _Material([], [], []) for split in text.SPLITS}
    seen: set[str] = set()

    def add(name: str, source: str) -> _Material:
        material = splits[text.split_of(name, FRACTION)]
        new = tuple(dict.fromkeys(paragraph for paragraph in prose_of(source) if paragraph not in seen))
        seen.update(new)
        if new:
            material.prose.append(new)
        return material

    for path, source in _code():
        material = add(path, "\n\n".join(DOCSTRING.findall(source)))
        material.code.append((path, source))
        material.documents += functions(path, source)
    for name, source in sorted(topics.items()):
        add(name, source)
    for document in (*debian_packages(), *python_packages()):
        add(document.origin, document.text).documents.append(document)
    for found in sorted(metadata.distributions(), key=lambda found: found.name.lower()):
        add(found.name.lower(), str(cast(Message, found.metadata).get_payload() or ""))
    corpora = {}
    for split, material in splits.items():
        random.Random(split).shuffle(material.prose)
        corpora[split] = Corpus(split, tuple(material.prose), tuple(material.documents), tuple(material.code))
    return corpora


def local_corpus(split: str) -> Corpus:
    """
    Read the local machine's prose, documentation and code of one split.

    Parameters
    ----------
    split : str
        "train", "calibration" or "test".

    Raises
    ------
    ValueError
        For another name.
    RuntimeError
        If there is no text (a Python installation stripped of its sources).
    """
    check_known("splits", [split], text.SPLITS)
    corpus = _read()[split]
    if not corpus.prose or not corpus.code:
        raise RuntimeError(
            f"no source files found below {text.python_roots(True)}; this Python installation has been stripped of its "
            ".py files, and natural questions need their text: use one that keeps them"
        )
    return corpus
