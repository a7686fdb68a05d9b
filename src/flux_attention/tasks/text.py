"""Finds real text that every machine has: the source code and documentation of the local Python installation.

Nothing is downloaded. A file belongs to the ``held_out`` split if a hash of its path below the library folder says
so, so the split is the same on every machine. Packages carry copies of each other's files: a held-out file is left out
if more than a few of its lines stand in training files too.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

SUFFIXES = (".py", ".pyi", ".rst", ".md", ".txt")
MAX_FILE_BYTES = 400_000
MAX_LINE_CHARS = 200  # longer lines are data tables, not text
HELD_OUT_FRACTION = 0.04
LONG_LINE_CHARS = 40  # shorter lines are the same everywhere: `return None`
MAX_SHARED_LINES = 0.1  # of a held-out file's long lines: licences and idioms
#: What is said where a run that stopped cannot go on, as its questions are others now.
OTHER_TEXT = (
    "the text that questions are made of is not what it was: another file, or that of this machine, which changes when "
    "packages are installed or removed; a file of your own stays the same"
)


def is_held_out(name: str, fraction: float = HELD_OUT_FRACTION) -> bool:
    """Whether ``name`` belongs to the held-out split: a fixed hash, so the same everywhere and always."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") < fraction * 2**32


#: What natural questions are made from: routers learn by the first, layers are ranked by the second.
SPLITS = ("train", "calibration", "test")


def split_of(name: str, fraction: float = HELD_OUT_FRACTION) -> str:
    """Name the one of ``SPLITS`` that ``name`` belongs to: "test" is the held-out one, "calibration" is as large."""
    if is_held_out(name, fraction):
        return "test"
    return "calibration" if is_held_out(name, 2 * fraction) else "train"


def belongs(name: str, split: bool | str, fraction: float = HELD_OUT_FRACTION) -> bool:
    """Whether ``name`` is of one of ``SPLITS``; or whether it is held out (True), or not (False)."""
    return (is_held_out(name, fraction) if isinstance(split, bool) else split_of(name, fraction)) == split


def iter_files(roots: list[Path], held_out: bool) -> Iterator[Path]:
    """Yield the text files of one split below ``roots``, sorted by path."""
    for root in roots:
        for path in sorted(root.rglob("*")):
            relative = path.relative_to(root)
            if path.suffix not in SUFFIXES or (root.name != "site-packages" and "site-packages" in relative.parts):
                continue
            if is_held_out(relative.as_posix()) == held_out and path.is_file():
                yield path


def read_text(path: Path) -> str | None:
    """Return the text of ``path``, or None if it is too large, too small, not UTF-8, or a data table."""
    size = path.stat().st_size
    if not 500 <= size <= MAX_FILE_BYTES:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    if max(map(len, text.split("\n"))) > MAX_LINE_CHARS or (not text.isprintable() and "\x00" in text):
        return None
    return text


def python_roots(site_packages: bool = False) -> list[Path]:
    """Return the folder of the standard library, and of the installed packages if asked for."""
    paths = sysconfig.get_paths()
    roots = [Path(paths["stdlib"])]
    if site_packages:
        roots.append(Path(paths["purelib"]))
    return roots


def long_lines(text: str) -> list[str]:
    """Return the lines by which a copy of ``text`` can be told."""
    return [line for line in map(str.strip, text.split("\n")) if len(line) >= LONG_LINE_CHARS]


@lru_cache(maxsize=2)
def _training_lines(site_packages: bool) -> frozenset[int]:
    """Hash the long lines of all training files, as the lines would fill a gigabyte."""
    texts = map(read_text, iter_files(python_roots(site_packages), held_out=False))
    return frozenset(hash(line) for text in texts if text is not None for line in long_lines(text))


def is_copied(text: str, site_packages: bool) -> bool:
    """Whether too many of the long lines of ``text`` stand in training files."""
    lines = long_lines(text)
    shared = _training_lines(site_packages)
    return sum(hash(line) in shared for line in lines) > MAX_SHARED_LINES * len(lines)


@lru_cache(maxsize=4)
def local_texts(held_out: bool, site_packages: bool = False, max_chars: int | None = None) -> tuple[str, ...]:
    """
    Read the local Python installation's text files of one split.

    Parameters
    ----------
    held_out : bool
        True for the split that the shipped model was not trained on.
    site_packages : bool
        Whether to read the installed packages too.
    max_chars : int, optional
        Stop once this many characters have been read.

    Returns
    -------
    tuple of str
        One text a file.

    Raises
    ------
    RuntimeError
        If no file is found (a Python installation stripped of its sources).
    """
    texts, chars = [], 0
    for path in iter_files(python_roots(site_packages), held_out):
        text = read_text(path)
        if text is None or (held_out and is_copied(text, site_packages)):
            continue
        texts.append(text)
        chars += len(text)
        if max_chars is not None and chars >= max_chars:
            break
    if not texts:
        raise RuntimeError(
            f"no source files found below {python_roots(site_packages)}; this Python installation has been stripped "
            "of its .py files, and the tasks need real text: use one that keeps them"
        )
    return tuple(texts)
