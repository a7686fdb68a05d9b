"""Tokenises the records of a source over all cores, and keeps the result for the next run."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from flux_attention.errors import DataError
from flux_attention.tasks import encoding as texts
from flux_attention.tasks.encoding import has_chat
from flux_attention.training import encoding, records, shortening
from flux_attention.training.encoding import Encoder
from flux_attention.training.interrupt import workers_end_quietly
from flux_attention.training.records import Example, Report, problem_of
from flux_attention.training.sources import Source, open_source

#: Bytes of records that are worth a process's start.
PER_PROCESS = 4_000_000
#: Records that are tokenised in one call.
BATCH = 16


@dataclass(frozen=True)
class _Tokenise:
    """Makes columns of a batch of rows, in any process."""

    read: Callable[[dict[str, list]], list]
    encode: Encoder
    targets: dict[str, float]

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        found = self.read(batch)
        problems = [problem_of(record, self.targets) for record in found]
        good = [record for record, problem in zip(found, problems, strict=True) if problem is None]
        encoded = iter(self.encode(good))
        rows = [self._row(next(encoded) if problem is None else None, problem) for problem in problems]
        return {name: [row.get(name) for row in rows] for name in _features()}

    def _row(self, example: Example | str | None, problem: str | None) -> dict[str, Any]:
        if isinstance(example, str):
            return {"left_out": example}
        if example is not None and not len(example.input_ids) > example.labels_from > 0:
            example, problem = None, f"{len(example.input_ids)} tokens, which leave none to learn"
        return {"malformed": problem} if example is None else vars(example)


def _features():
    """Say what is kept of a record: an ``Example``, or why there is none."""
    from datasets import Features, Sequence, Value

    kinds = dict(labels_from="int32", prompt_length="int32", task="string", shortened="bool", malformed="string")
    columns = {name: Value(kind) for name, kind in {**kinds, "left_out": "string"}.items()}
    return Features({"input_ids": Sequence(Value("int32")), **columns})


def load_records(
    source: dict[str, Any],
    tokenizer,
    max_length: int,
    targets: dict[str, float],
    report: Report,
    turn: Callable[[], AbstractContextManager] = nullcontext,
) -> list[Example]:
    """
    Load all usable records of a source as sequences; ``report`` counts the others.

    Parameters
    ----------
    turn : callable
        Gives a context in which one process of several tokenises before the others read what it has kept:
        ``TrainingArguments.main_process_first``.

    Raises
    ------
    DataError
        If the source cannot be read, or nothing can be written to the cache of ``datasets``.
    """
    opened = open_source(source)
    chat = has_chat(tokenizer, source.get("chat_template"))
    encode = Encoder(tokenizer, max_length, chat, source.get("chat_template_kwargs") or {})
    work = _Tokenise(opened.read, encode, targets)
    examples: list[Example] = []
    first, limit, total = 0, source.get("limit"), len(opened.rows)
    with turn():
        while first < total and (limit is None or len(examples) < limit):
            # Not many more than are asked for; again as many as were read already if those were not enough.
            last = total if limit is None else min(total, max(2 * first, first + limit - len(examples)))
            for index, row in enumerate(_tokenised(opened, work, first, last, source["path"]), first):
                if len(examples) == limit:
                    break
                _take(row, opened.where(index), examples, report)
            first = last
    return examples


def _take(row: Example | dict[str, str], where: str, examples: list[Example], report: Report) -> None:
    if isinstance(row, Example):
        examples.append(row)
        report.shortened += row.shortened
    else:
        for name in ("malformed", "left_out"):
            if row[name] is not None:
                getattr(report, name).append((where, row[name]))


def _tokenised(opened: Source, work: _Tokenise, first: int, last: int, path: str) -> Iterator[Example | dict[str, str]]:
    """Yield the sequences of rows, or why there is none: mapped from the cache, which gets them if it has them not."""
    from datasets import Dataset, config

    root = Path(config.HF_DATASETS_CACHE) / "flux_attention"
    folder = root / _fingerprint(opened, work, first, last)
    if not folder.is_dir():
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root, prefix=".tokenising-") as scratch:
                _map(opened, work, first, last, path, Path(scratch) / folder.name)
                if not folder.is_dir():  # another run may have been faster
                    os.rename(Path(scratch) / folder.name, folder)
        except OSError as error:
            raise DataError(
                f"cannot keep the tokens of {path} in {root}: {error.strerror or error}; "
                "make room, or name another folder by HF_DATASETS_CACHE"
            ) from None
    for file in sorted(folder.glob("*.arrow")):
        for batch in Dataset.from_file(str(file)).data.to_batches():
            tokens = batch.column("input_ids")
            values, offsets = tokens.values.to_numpy(), tokens.offsets.to_numpy()
            for index, row in enumerate(batch.drop_columns(["input_ids"]).to_pylist()):
                reasons = {name: row.pop(name) for name in ("malformed", "left_out")}
                yield Example(values[offsets[index] : offsets[index + 1]], **row) if row["task"] else reasons


def _map(opened: Source, work: _Tokenise, first: int, last: int, path: str, folder: Path) -> None:
    """Tokenise rows into a folder, by as many processes as there are cores and enough to do."""
    import datasets

    folder.mkdir()
    rows = opened.rows.select(range(first, last))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    worth = opened.size * (last - first) // len(opened.rows) // PER_PROCESS
    processes = min(cores, worth, (last - first) // BATCH)
    quick = worth < 2 and not datasets.are_progress_bars_disabled()
    if quick:  # it would come and go
        datasets.disable_progress_bars()
    several = processes > 1
    try:
        with workers_end_quietly(), _for_processes(work) if several else nullcontext(work) as call:
            rows.map(
                call,
                batched=True,
                batch_size=BATCH,
                num_proc=processes if several else None,
                remove_columns=rows.column_names,
                features=_features(),
                cache_file_name=str(folder / "tokens.arrow"),
                new_fingerprint=folder.name,
                desc=f"tokenising {path}",
            )
    finally:
        if quick:
            datasets.enable_progress_bars()


#: What a forked process finds here, and need not be sent.
_INHERITED: list[_Tokenise] = []


def _inherited(batch: dict[str, list]) -> dict[str, list]:
    return _INHERITED[-1](batch)


@contextmanager
def _for_processes(work: _Tokenise) -> Iterator[Callable[[dict[str, list]], dict[str, list]]]:
    """
    Give what several processes call.

    Forked ones inherit it: to send a large tokenizer takes seconds for each. In a process a tokenizer has one thread,
    as each would start as many as there are cores.
    """
    import multiprocess  # which datasets forks by

    threads = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _INHERITED.append(work)
    try:
        method = multiprocess.get_start_method()  # ty: ignore[missing-attribute]  # made as it is imported
        yield _inherited if method == "fork" else work
    finally:
        _INHERITED.pop()
        if threads is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = threads


def _fingerprint(opened: Source, work: _Tokenise, first: int, last: int) -> str:
    """Hash all that the tokens of rows depend on: contents, tokenizer, options, and the code that makes them."""
    encode = work.encode
    options = [first, last, encode.max_length, encode.chat_template, encode.chat_template_kwargs, list(work.targets)]
    versions = [tokenizers.__version__, transformers.__version__]
    parts = [opened.contents, options, versions, _state(encode.tokenizer)]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for module in (texts.__file__, encoding.__file__, records.__file__, shortening.__file__, __file__):
        digest.update(Path(module).read_bytes())
    return digest.hexdigest()[:32]


def _state(tokenizer) -> list[Any]:
    """Return what a tokenizer's tokens depend on."""
    named = [type(tokenizer).__name__, tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None)]
    if getattr(tokenizer, "is_fast", False):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        return [*named, {**state, "truncation": None, "padding": None}]  # which every call sets anew
    from datasets.fingerprint import Hasher

    return [*named, Hasher.hash(tokenizer)]
