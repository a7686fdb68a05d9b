"""Writes files whole or not at all, into folders that are checked before."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """
    Give a file to write to within a ``with`` block, which takes the place of ``path`` at its end.

    A full disk, an error or an interrupt within the block leaves what was at ``path`` as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as scratch:
        yield Path(scratch) / path.name
        os.replace(Path(scratch) / path.name, path)


def check_writable(folder: str | os.PathLike) -> None:
    """
    Make a folder, and a file in it for a moment: what cannot be written is known before hours of work.

    Raises
    ------
    ValueError
        With the system's reason.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror or error}; name another folder") from None
