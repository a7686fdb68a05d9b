"""Training data: records and generated questions as token sequences, packed to a budget of tokens.

A record holds ``context``, ``question``, ``answer`` and ``metadata`` with ``task``, its task class, and ``is_prefix``,
whether the question stands before the context (the format of the method's public data). A record with ``text`` alone is
plain text, of the class "language modeling". A sequence is a prompt, which routers read, and an answer, which carries
the loss; of plain text all tokens are both.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from flux_attention.training.recipe import Recipe, RecipeError

PLAIN = "language modeling"
#: The families of ``evaluation.tasks`` as task classes, where a recipe does not say otherwise.
GENERATED_TASKS = {
    "single_needle": "look-up",
    "multi_key": "look-up",
    "copy": "copy",
    "multi_value": "multi-step",
    "two_hop": "multi-step",
    "count": "multi-step",
    "plain": PLAIN,
}
#: Keys of a source in a recipe, by its kind.
SOURCES = {
    "path": {"path", "name", "split", "limit", "chat_template", "chat_template_kwargs"},
    "generated": {"generated", "lengths", "tasks", "held_out", "max_chars"},
}


class DataError(ValueError):
    """Data that cannot be trained on; the message says where it is and what was expected."""


@dataclass(frozen=True)
class Example:
    """
    One sequence.

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
    What reading a source found.

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


# --- Records ------------------------------------------------------------------------------------------------------


def read_records(source: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """
    The records of a source, with where each stands; a line that is not JSON comes as the error that it raised.

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
    """What is wrong with a record."""
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
    A well-formed record as a sequence, and whether it was shortened to fit.

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
    """All usable records of a source as sequences; ``report`` counts the others."""
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


# --- Generated questions --------------------------------------------------------------------------------------------


class Generated(Sequence):
    """
    Questions of ``evaluation.tasks`` hidden in the source text of the local Python installation: no download.

    The sequence of one index is always the same; families take turns.

    Parameters
    ----------
    count : int
        Sequences.
    lengths : sequence of int
        Tokens; drawn from for each sequence.
    tasks : dict of str to str
        The task class of each family that takes part.
    max_chars, held_out
        See ``local_texts``; held-out names, values and text are those of evaluation.
    seed : int
        Sources of different seeds have no sequence in common: a recipe's sources, and runs of different seeds.
    """

    def __init__(
        self,
        tokenizer,
        count: int,
        lengths: Sequence[int],
        tasks: dict[str, str],
        max_chars: int,
        held_out: bool,
        seed: int,
    ):
        from flux_attention.tasks.samples import Haystack
        from flux_attention.tasks.text import local_texts

        self.tokenizer, self.tasks, self.held_out = tokenizer, tasks, held_out
        self.haystack = Haystack(local_texts(held_out, site_packages=True, max_chars=max_chars), tokenizer)
        self.families, self.first = list(tasks), seed * 10_000_000
        self.lengths = [random.Random(f"length-{self.first + index}").choice(list(lengths)) for index in range(count)]

    def __len__(self) -> int:
        return len(self.lengths)

    def task(self, index: int) -> str:
        """The task class of a sequence."""
        return self.tasks[self.families[index % len(self.families)]]

    def __getitem__(self, index: int) -> Example:
        from flux_attention.tasks.samples import make_sample

        family = self.families[index % len(self.families)]
        sample = make_sample(
            family, self.haystack, self.tokenizer, self.lengths[index], self.first + index, self.held_out
        )
        prompt = len(sample.prompt_ids)
        return Example(sample.input_ids, prompt, prompt, self.task(index))


# --- Packs ----------------------------------------------------------------------------------------------------------


def pack(lengths: Sequence[int], budget: int, seed: int = 0) -> list[list[int]]:
    """
    Which sequences go together: each pack has at most ``budget`` tokens (or one longer sequence).

    Sequences are shuffled, then each goes into the first of the latest packs that has room.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    packs: list[list[int]] = []
    room: list[int] = []
    for index in order:
        recent = range(max(0, len(packs) - 32), len(packs))
        place = next((place for place in recent if room[place] >= lengths[index]), None)
        if place is None:
            place = len(packs)
            packs.append([])
            room.append(budget)
        packs[place].append(index)
        room[place] -= lengths[index]
    return packs


class PackedExamples(Dataset):
    """Packs of sequences: each item is a list of (number of the sequence, Example)."""

    def __init__(self, sources: list[Sequence[Example]], budget: int, seed: int = 0):
        self.sources = sources
        self.places = [(source, index) for source, some in enumerate(sources) for index in range(len(some))]
        lengths = []
        for some in sources:
            lengths += some.lengths if isinstance(some, Generated) else [len(example.input_ids) for example in some]
        self.packs = pack(lengths, budget, seed)
        self.tokens = sum(lengths)

    def __len__(self) -> int:
        return len(self.packs)

    def hash(self) -> str:
        """SHA-256 of what the packs hold: of generated sources, of their text and sizes."""
        digest = hashlib.sha256(json.dumps(self.packs).encode())
        for some in self.sources:
            if isinstance(some, Generated):
                digest.update(json.dumps([some.lengths, some.tasks, some.held_out, some.first]).encode())
                digest.update(some.haystack.tokens.tobytes())
            else:
                for example in some:
                    digest.update(f"{example.task} {example.labels_from} {example.prompt_length}".encode())
                    digest.update(example.input_ids.tobytes())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> list[tuple[int, Example]]:
        found = []
        for number in self.packs[index]:
            source, place = self.places[number]
            found.append((number, self.sources[source][place]))
        return found


def collate(packs: list[list[tuple[int, Example]]], classes: dict[str, int]) -> dict[str, torch.Tensor]:
    """
    One row of sequences behind one another.

    Returns
    -------
    dict
        ``input_ids``, ``position_ids``, ``labels`` (1, S), with -100 where there is no loss; and of each of the N
        sequences its ``sequence_lengths``, ``prompt_lengths``, ``classes`` and ``numbers`` (N,).
    """
    numbers, examples = zip(*[item for items in packs for item in items], strict=True)
    labels = [np.where(np.arange(len(e.input_ids)) < e.labels_from, -100, e.input_ids) for e in examples]
    lengths = [len(example.input_ids) for example in examples]

    def tensor(values) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, np.int64))

    return {
        "input_ids": tensor(np.concatenate([example.input_ids for example in examples]))[None],
        "position_ids": tensor(np.concatenate([np.arange(length) for length in lengths]))[None],
        "labels": tensor(np.concatenate(labels))[None],
        "sequence_lengths": tensor(lengths),
        "prompt_lengths": tensor([example.prompt_length for example in examples]),
        "classes": tensor([classes[example.task] for example in examples]),
        "numbers": tensor(numbers),
    }


def check_sources(recipe: Recipe) -> None:
    """
    Check the keys of a recipe's sources; nothing is read.

    Raises
    ------
    RecipeError
        For unknown keys, or values of other types.
    """
    for source in recipe.data:
        kind = next((kind for kind in SOURCES if kind in source), None)
        for key, types in (("path", str), ("name", str), ("split", str), ("limit", int), ("chat_template", bool),
                           ("chat_template_kwargs", dict), ("lengths", list), ("tasks", dict), ("max_chars", int),
                           ("held_out", bool)):  # fmt: skip
            if key in source and (not isinstance(source[key], types) or (types is int and source[key] is True)):
                raise RecipeError(f"data: {key} is {source[key]!r}, expected {types.__name__}")
        if not all(isinstance(length, int) for length in source.get("lengths", [])):
            raise RecipeError(f"data: lengths is {source['lengths']!r}, expected a list of whole numbers")
        if source.get("limit", 1) < 1:
            raise RecipeError(f"data: limit is {source['limit']}, expected at least 1")
        if kind is None or (unknown := sorted(set(source) - SOURCES[kind])):
            what = f"unknown keys {unknown}" if kind else f"neither of {list(SOURCES)}"
            raise RecipeError(f"data: the source {source} has {what}; known are {sorted(SOURCES[kind or 'path'])}")


def load_data(recipe: Recipe, tokenizer) -> tuple[PackedExamples, Report]:
    """
    All sources of a recipe.

    Raises
    ------
    RecipeError
        For a source with unknown keys.
    DataError
        If a source cannot be read, or no usable sequence is left.
    """
    report = Report()
    sources: list[Sequence[Example]] = []
    check_sources(recipe)
    for source in recipe.data:
        if "path" in source:
            examples: Sequence[Example] = load_records(source, tokenizer, recipe.max_length, recipe.targets, report)
            report.tasks.update(example.task for example in examples)
        else:
            seed = len(sources) + 1000 * recipe.training_arguments["seed"]
            examples = _generated(source, recipe, tokenizer, seed)
            report.tasks.update(examples.task(index) for index in range(len(examples)))
        sources.append(examples)
    report.used = sum(map(len, sources))
    if not report.used:
        raise DataError(f"no usable record is left to train on\n{report}" if report.malformed else "there is no data")
    return PackedExamples(sources, recipe.pack_length, recipe.training_arguments["seed"]), report


def _generated(source: dict[str, Any], recipe: Recipe, tokenizer, seed: int) -> Generated:
    from flux_attention.tasks.families import EVERY_FAMILY
    from flux_attention.tasks.samples import make_sample

    tasks = source.get("tasks", GENERATED_TASKS)
    lengths = source.get("lengths", [min(4096, recipe.max_length)])
    if missing := sorted(set(tasks.values()) - set(recipe.targets)):
        raise RecipeError(
            f"data: task classes {missing} have no target in the recipe: add them, or name others in tasks"
        )
    if unknown := sorted(set(tasks) - set(EVERY_FAMILY)):
        raise RecipeError(f"data: unknown families {unknown}; known are {list(EVERY_FAMILY)}")
    if not lengths or min(lengths) < 256 or max(lengths) > recipe.max_length:
        raise RecipeError(f"data: lengths are {lengths}, expected 256 to max_length ({recipe.max_length}) tokens")
    count = source["generated"]
    if not isinstance(count, int) or count < 1 or not tasks:
        raise RecipeError(f"data: generated is {count!r} of {len(tasks)} families, expected how many sequences")
    made = Generated(
        tokenizer, count, lengths, tasks, source.get("max_chars", 20_000_000), source.get("held_out", False), seed
    )
    for family in tasks:  # fails now, not in the middle of the run
        for length in (min(lengths), max(lengths)):
            make_sample(family, made.haystack, tokenizer, length, 0, made.held_out)
    return made
