"""Reads records of question and answer, or of plain text, as token sequences.

A record holds ``context``, ``question``, ``answer`` and ``metadata`` with ``task``, its task class, and ``is_prefix``,
whether the question stands before the context (the format of the method's public data). A record with ``text`` alone is
plain text, of the class "language modeling". A sequence is a prompt, which routers read, and an answer, which carries
the loss; of plain text all tokens are both.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flux_attention.errors import DataError

#: The task class of plain text.
PLAIN = "language modeling"


@dataclass(frozen=True)
class Example:
    """
    Holds one sequence.

    Attributes
    ----------
    input_ids : numpy.ndarray
        int32, prompt and answer.
    labels_from : int
        The first token that the loss is about; all after it are, too.
    prompt_length : int
        Tokens that routers may read.
    task : str
        Its task class.
    """

    input_ids: np.ndarray
    labels_from: int
    prompt_length: int
    task: str


@dataclass
class Report:
    """
    Counts what reading a source found.

    Attributes
    ----------
    used, shortened : int
        Records that became sequences, and those of them that were shortened to fit (``encode_record``).
    malformed : list of (str, str)
        Where each unusable record stands, and what is wrong with it.
    tasks : Counter
        Sequences of each task class.
    """

    used: int = 0
    shortened: int = 0
    malformed: list[tuple[str, str]] = field(default_factory=list)
    tasks: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{self.used:,} sequences: " + ", ".join(f"{n:,} {task}" for task, n in sorted(self.tasks.items()))]
        if self.shortened:
            lines.append(f"{self.shortened:,} of them were shortened to fit into max_length")
        if self.malformed:
            lines.append(f"{len(self.malformed):,} malformed records were left out:")
            lines += [f"  {where}: {reason}" for where, reason in self.malformed[:10]]
            if len(self.malformed) > 10:
                lines.append(f"  … and {len(self.malformed) - 10:,} more")
        return "\n".join(lines)


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
    if path.endswith((".jsonl", ".json")):
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        try:
                            record = json.loads(line)
                        except (ValueError, RecursionError) as error:
                            record = error
                        yield f"{path}, line {number}", record
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        return
    try:
        import datasets
    except ImportError:
        raise DataError(f"reading {path} needs datasets: pip install 'flux-attention[train]'") from None
    try:
        if path.endswith(".parquet"):
            rows = datasets.load_dataset("parquet", data_files=path, split="train")
        else:
            rows = datasets.load_dataset(path, source.get("name"), split=source.get("split", "train"))
    except Exception as error:  # datasets raises many kinds
        raise DataError(f"cannot read {path}: {type(error).__name__}: {error}") from None
    for number, row in enumerate(rows):
        yield f"{path}, row {number}", row


def _problem(record: Any, targets: dict[str, float]) -> str | None:
    """Say what is wrong with a record."""
    if isinstance(record, (ValueError, RecursionError)):
        return f"not JSON ({record})"
    if not isinstance(record, dict):
        return f"{type(record).__name__}, expected an object"
    if isinstance(record.get("text"), str) and record.get("question") is None:  # columns fill what is not there
        task = PLAIN
        if not record["text"].strip():
            return "text is empty"
        if not _is_text(record["text"]):
            return "text is not UTF-8 text"
    else:
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
        if not isinstance(metadata, dict):
            return "no metadata with task and is_prefix"
        task = metadata.get("task")
        if not isinstance(metadata.get("is_prefix", False), bool):
            return f"metadata.is_prefix is {metadata['is_prefix']!r}, expected true or false"
    if not isinstance(task, str) or task not in targets:
        return f"task {task!r} has no target in the recipe, which knows {list(targets)}"
    return None


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def encode_record(
    record: dict[str, Any],
    tokenizer,
    max_length: int,
    chat_template: bool,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> tuple[Example, bool]:
    """
    Encode a well-formed record as a sequence, and say whether it was shortened to fit.

    A prompt loses its middle; plain text and, beyond half of ``max_length``, an answer lose their ends.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's.
    max_length : int
        Tokens at most.
    chat_template : bool
        Whether context and question go through the tokenizer's chat template as a user's message.
    chat_template_kwargs : dict, optional
        What the template takes besides, such as ``enable_thinking``.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if record.get("question") is None:
        whole = tokenizer(record["text"])["input_ids"]
        ids = whole[:max_length]
        return Example(np.asarray(ids, np.int32), 1, len(ids), PLAIN), len(ids) < len(whole)
    metadata = record["metadata"]
    parts = [record["question"], record["context"]]
    text = "\n\n".join(part for part in (parts if metadata.get("is_prefix") else parts[::-1]) if part.strip())
    if chat_template:
        message = [{"role": "user", "content": text}]
        settings = {**(chat_template_kwargs or {}), "add_generation_prompt": True, "return_dict": True}
        prompt = tokenizer.apply_chat_template(message, **settings)["input_ids"]
    else:
        prompt = tokenizer(text + "\n")["input_ids"]
        if prompt and prompt[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
            prompt = prompt[:-1]
    whole = tokenizer(record["answer"], add_special_tokens=False)["input_ids"] + end
    answer = whole[: max(1, max_length // 2)]
    room = max_length - len(answer)
    shortened = len(prompt) > room or len(answer) < len(whole)
    if len(prompt) > room:  # what frames the context stands at both ends
        prompt = prompt[: (room + 1) // 2] + prompt[len(prompt) - room // 2 :]
    ids = np.asarray(prompt + answer, np.int32)
    return Example(ids, len(prompt), len(prompt), metadata["task"]), shortened


def load_records(
    source: dict[str, Any], tokenizer, max_length: int, targets: dict[str, float], report: Report
) -> list[Example]:
    """Load all usable records of a source as sequences; ``report`` counts the others."""
    from tqdm.auto import tqdm

    chat = source.get("chat_template")
    chat = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
    template_kwargs = source.get("chat_template_kwargs")
    examples: list[Example] = []
    for where, record in tqdm(read_records(source), desc=f"reading {source['path']}", unit=" records", delay=2):
        if len(examples) == source.get("limit"):
            break
        problem = _problem(record, targets)
        if problem is None:
            example, shortened = encode_record(record, tokenizer, max_length, chat, template_kwargs)
            if len(example.input_ids) > example.labels_from > 0:
                examples.append(example)
                report.shortened += shortened
                continue
            problem = f"{len(example.input_ids)} tokens, which leave none to learn"
        report.malformed.append((where, problem))
    return examples
