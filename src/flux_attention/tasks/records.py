"""Reads records of question and answer, or of plain text, for training, calibration and evaluation alike.

A record holds ``context``, ``question``, ``answer`` and, where it is trained on, ``metadata`` with ``task``, its task
class, and ``is_prefix``, whether the question stands before the context (the format of the method's public data). A
record with ``text`` alone is plain text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from flux_attention.errors import DataError
from flux_attention.tasks.questions import PROSE, Question

#: Words and letters, up to which an answer is right if it is found in what a model says; longer ones are compared.
SHORT_ANSWER, SHORT_LETTERS = 8, 80


def read_records(source: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """
    Yield the records of a source, with where each stands; a line that is not JSON comes as the error that it raised.

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
        try:
            with open(path, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield f"{path}, line {number}", parse_line(line)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        return
    for number, row in enumerate(open_dataset(source)):
        yield f"{path}, row {number}", row


def has_lines(path: str) -> bool:
    """Whether a source is a file with a record in each line."""
    return path.endswith((".jsonl", ".json"))


def parse_line(line: bytes) -> Any:
    """Parse a line of a file; if it is not JSON, return the error that it raised."""
    try:
        return json.loads(line.decode("utf-8", errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        return error


def open_dataset(source: dict[str, Any]):
    """
    Open a source that ``datasets`` reads; see ``read_records``.

    Returns
    -------
    datasets.Dataset
        One row a record.
    """
    path = source["path"]
    try:
        import datasets
    except ImportError:
        raise DataError(f"reading {path} needs datasets: pip install 'flux-attention[train]'") from None
    try:
        if path.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=path, split="train")
        return datasets.load_dataset(path, source.get("name"), split=source.get("split", "train"))
    except Exception as error:  # datasets raises many kinds
        raise DataError(f"cannot read {path}: {type(error).__name__}: {error}") from None


def is_plain(record: dict[str, Any]) -> bool:
    """Whether a record is plain text; tables fill with None what is not there."""
    return isinstance(record.get("text"), str) and record.get("question") is None


def problem_with(record: Any) -> str | None:
    """Say what is wrong with a record, wherever it is used; None if nothing is."""
    if isinstance(record, (ValueError, RecursionError)):
        return f"not JSON ({record})"
    if not isinstance(record, dict):
        return f"{type(record).__name__}, expected an object"
    if is_plain(record):
        if not record["text"].strip():
            return "text is empty"
        return None if _is_text(record["text"]) else "text is not UTF-8 text"
    for key in ("context", "question", "answer"):
        if not isinstance(record.get(key), str):
            return f"{key} is {type(record.get(key)).__name__}, expected text" if key in record else f"no {key}"
        if not _is_text(record[key]):
            return f"{key} is not UTF-8 text"
    if not record["answer"].strip():
        return "answer is empty"
    if not record["context"].strip() and not record["question"].strip():
        return "context and question are empty"
    metadata = record.get("metadata")
    if isinstance(metadata, dict) and not isinstance(metadata.get("is_prefix", False), bool):
        return f"metadata.is_prefix is {metadata['is_prefix']!r}, expected true or false"
    return None


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def question_of(record: dict[str, Any]) -> Question:
    """
    Make a question of a well-formed record.

    Its family and task class are the record's ``task``, else "records". A short answer has to occur in what a model
    says ("match"), a long one is compared with it ("rouge-l"); plain text has its perplexity.
    """
    metadata = record.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    if is_plain(record):
        return Question(record["text"], "", "", (), "prose", "perplexity", PROSE)
    task = metadata.get("task") if isinstance(metadata.get("task"), str) else "records"
    answer = record["answer"].strip()
    is_short = len(answer.split()) <= SHORT_ANSWER and len(answer) <= SHORT_LETTERS
    metric = "match" if is_short else "rouge-l"
    first = bool(metadata.get("is_prefix"))
    # A model that says "Oslo" where the record says "Oslo." is right.
    return Question(record["context"], record["question"], answer, (answer.rstrip("."),), task, metric, task, first)


def read_questions(source: dict[str, Any], limit: int | None = None) -> list[Question]:
    """
    Read a user's records as questions.

    Parameters
    ----------
    source : dict
        As for ``read_records``.
    limit : int, optional
        Questions at most; default: all.

    Raises
    ------
    DataError
        If there is no such file or dataset, or no record in it; for a record that is not well-formed, with its place.
    """
    questions: list[Question] = []
    for where, record in read_records(source):
        if len(questions) == limit:
            break
        if (problem := problem_with(record)) is not None:
            raise DataError(
                f"{where}: {problem}; expected an object with the texts context, question and answer, or with text"
            )
        questions.append(question_of(record))
    if not questions:
        raise DataError(f"{source['path']} holds no records; expected objects with context, question and answer")
    return questions
