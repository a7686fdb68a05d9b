"""Says what records of question and answer, or of plain text, hold, and what can be wrong with them.

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

from flux_attention.tasks.records import is_plain, problem_with

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
    shortened : bool
        Whether a record lost something to fit.
    """

    input_ids: np.ndarray
    labels_from: int
    prompt_length: int
    task: str
    shortened: bool = False


@dataclass
class Report:
    """
    Counts what reading a source found.

    Attributes
    ----------
    used, shortened : int
        Records that became sequences, and those of them that were shortened to fit (``Encoder``).
    malformed, left_out : list of (str, str)
        Where each record stands that is unusable, or too long to keep what its answer stands on, and why.
    tasks : Counter
        Sequences of each task class.
    """

    used: int = 0
    shortened: int = 0
    malformed: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    tasks: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{self.used:,} sequences: " + ", ".join(f"{n:,} {task}" for task, n in sorted(self.tasks.items()))]
        if self.shortened:
            lines.append(f"{self.shortened:,} of them were shortened to fit into max_length")
        for name, kind in (("malformed", "malformed"), ("left_out", "too long")):
            if some := getattr(self, name):
                lines.append(f"{len(some):,} {kind} records were left out:")
                lines += [f"  {where}: {reason}" for where, reason in some[:10]]
                lines += [f"  … and {len(some) - 10:,} more"] * (len(some) > 10)
        return "\n".join(lines)


def problem_of(record: Any, targets: dict[str, float]) -> str | None:
    """Say what is wrong with a record, or with a line that is not JSON (the error that it raised); None if nothing."""
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
