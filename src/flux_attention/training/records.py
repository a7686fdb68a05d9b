"""Reads records of question and answer, or of plain text, as token sequences.

A record holds ``context``, ``question``, ``answer`` and ``metadata`` with ``task``, its task class, and ``is_prefix``,
whether the question stands before the context (the format of the method's public data). A record with ``text`` alone is
plain text, of the class "language modeling". A sequence is a prompt, which routers read, and an answer, which carries
the loss; of plain text all tokens are both.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flux_attention.tasks.encoding import encode_answer, encode_prompt, joined, without_middle
from flux_attention.tasks.records import is_plain, problem_with, read_records

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


def _problem(record: Any, targets: dict[str, float]) -> str | None:
    """Say what is wrong with a record."""
    if (problem := problem_with(record)) is not None:
        return problem
    if is_plain(record):
        task = PLAIN
    else:
        metadata = record.get("metadata")
        if not isinstance(metadata, dict):
            return "no metadata with task and is_prefix"
        task = metadata.get("task")
    if not isinstance(task, str) or task not in targets:
        return f"task {task!r} has no target in the recipe, which knows {list(targets)}"
    return None


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
    if is_plain(record):
        whole = tokenizer(record["text"])["input_ids"]
        ids = whole[:max_length]
        return Example(np.asarray(ids, np.int32), 1, len(ids), PLAIN), len(ids) < len(whole)
    metadata = record["metadata"]
    text = joined(record["context"], record["question"], bool(metadata.get("is_prefix")))
    prompt = encode_prompt(text if chat_template else f"{text}\n", tokenizer, chat_template, chat_template_kwargs)
    whole = encode_answer(record["answer"], tokenizer)
    answer = whole[: max(1, max_length // 2)]
    room = max_length - len(answer)
    shortened = len(prompt) > room or len(answer) < len(whole)
    prompt = without_middle(prompt, room)
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
