"""Opens files and datasets of records as rows that several processes can read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from flux_attention.errors import DataError
from flux_attention.tasks.records import has_lines, open_dataset, parse_line

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Source:
    """
    Holds the rows of a file or dataset.

    Attributes
    ----------
    rows : datasets.Dataset
        One row a record: of a JSONL file where its line stands, so that no second copy of the file is made.
    read : callable
        Takes a batch of rows, gives their records; for a line that is not JSON the error that it raised.
    where : callable
        Says where the row of an index stands.
    contents : str
        Changes with what is in the rows.
    size : int
        Bytes.
    """

    rows: Dataset
    read: Callable[[dict[str, list]], list]
    where: Callable[[int], str]
    contents: str
    size: int


def open_source(source: dict[str, Any]) -> Source:
    """
    Open a recipe's source.

    Parameters
    ----------
    source : dict
        ``path``: a ``.jsonl`` or ``.parquet`` file, or an id for ``datasets.load_dataset`` (``name``, ``split``).

    Raises
    ------
    DataError
        If there is no such file or dataset.
    """
    path = source["path"]
    if has_lines(path):
        return _open_lines(path)
    rows = open_dataset(source)
    return Source(rows, _read_rows, lambda index: f"{path}, row {index}", rows._fingerprint, rows.data.nbytes)


def _read_rows(batch: dict[str, list]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _open_lines(path: str) -> Source:
    """Find where the lines of a file stand that hold something, and hash it."""
    try:
        from datasets import Dataset
    except ImportError:
        raise DataError(f"training on {path} needs datasets: pip install 'flux-attention[train]'") from None
    digest, places, start = hashlib.sha256(), {"line": [], "start": [], "bytes": []}, 0
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                digest.update(line)
                if line.strip():
                    for name, value in zip(places, (number, start, len(line)), strict=True):
                        places[name].append(value)
                start += len(line)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None

    def where(index: int) -> str:
        return f"{path}, line {places['line'][index]}"

    return Source(Dataset.from_dict(places), partial(_read_lines, path), where, digest.hexdigest(), start)


def _read_lines(path: str, batch: dict[str, list]) -> list[Any]:
    records = []
    with open(path, "rb") as file:
        for start, size in zip(batch["start"], batch["bytes"], strict=True):
            file.seek(start)
            records.append(parse_line(file.read(size)))
    return records
