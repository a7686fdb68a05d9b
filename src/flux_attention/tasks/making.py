"""Makes many samples of questions in words at once, by as many processes as there is work for."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from flux_attention.tasks.corpus import local_corpus
from flux_attention.tasks.questions import as_sample, make_question
from flux_attention.tasks.samples import Sample

#: Tokens that a process makes in the time in which another one starts.
TOKENS_A_PROCESS = 500_000


@dataclass(frozen=True)
class Wanted:
    """Names one sample: a family of ``questions.NATURAL``, tokens of the prompt, and a seed."""

    family: str
    length: int
    seed: int


def make_samples(wanted: Sequence[Wanted], split: str, tokenizer, chat: bool | None = None) -> list[Sample]:
    """
    Make samples, the same whatever the number of processes.

    Parameters
    ----------
    wanted : sequence of Wanted
    split : str
        One of ``text.SPLITS``.
    tokenizer
        The model's.
    chat : bool, optional
        Whether prompts go through the chat template; default: where there is one.
    """
    processes = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
                    sum(each.length for each in wanted) // TOKENS_A_PROCESS)  # fmt: skip
    if processes < 2:
        return [_make(each, split, tokenizer, chat) for each in wanted]
    chunks = [wanted[start::processes] for start in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        found = list(pool.map(lambda chunk: _elsewhere(chunk, split, tokenizer, chat), chunks))
    return [found[place % processes][place // processes] for place in range(len(wanted))]


def _make(wanted: Wanted, split: str, tokenizer, chat: bool | None) -> Sample:
    question = make_question(wanted.family, local_corpus(split), tokenizer, wanted.length, wanted.seed, chat)
    return as_sample(question, tokenizer, chat)


def _elsewhere(wanted: Sequence[Wanted], split: str, tokenizer, chat: bool | None) -> list[Sample]:
    """Make samples in a process of its own: no copy of this one, which may hold a GPU, nor of a user's script."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    work = pickle.dumps((list(wanted), split, tokenizer, chat))
    command = [sys.executable, "-m", "flux_attention.tasks.making"]
    return pickle.loads(subprocess.run(command, input=work, stdout=subprocess.PIPE, env=environment, check=True).stdout)


def main() -> None:
    """Make what standard input asks for, and write it to standard output, both pickled by ``_elsewhere``."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print does not get between
    wanted, *settings = pickle.load(sys.stdin.buffer)
    with output:
        pickle.dump([_make(each, *settings) for each in wanted], output)


if __name__ == "__main__":
    main()
