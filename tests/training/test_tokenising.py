"""Records are tokenised once, by several processes where there is much to do, to what one record at a time gives."""

import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from multiprocessing import get_context

import numpy as np
import pytest
from helpers.training import record

from flux_attention.errors import DataError
from flux_attention.training import load_data
from flux_attention.training import tokenising as module
from flux_attention.training.records import PLAIN

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache in which nothing is kept yet."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "flux_attention"


def some_records(count=60):
    some = [record(("Single QA", "Code")[i % 2], i, answer=f"It adds {i}, 北京, \u0091.") for i in range(count)]
    return [*some, *[{"text": f"import os{i}\n" * 20} for i in range(9)], record(context=" "), record(question="")]


def write(path, records):
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return [{"path": str(path)}]


def workers(monkeypatch, count):
    """Have so many processes at work, also on little."""
    monkeypatch.setattr(module, "PER_PROCESS", 5_000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)), raising=False)


def one_at_a_time(one, tokenizer):
    """What a record is as tokens, if there is room for it."""
    if "text" in one:
        ids = tokenizer(one["text"])["input_ids"]
        return ids, 1, len(ids), PLAIN
    parts = [part for part in (one["context"], one["question"]) if part.strip()]
    text = "\n\n".join(parts[::-1] if one["metadata"]["is_prefix"] else parts)
    prompt = tokenizer(text + "\n")["input_ids"]
    answer = tokenizer(one["answer"], add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return prompt + answer + end, len(prompt), len(prompt), one["metadata"]["task"]


def examples(data):
    return [(e.input_ids.tolist(), e.labels_from, e.prompt_length, e.task) for some in data.sources for e in some]


@pytest.mark.parametrize("processes", [1, 2])
def test_records_are_what_one_at_a_time_gives(recipe, tokenizer, tmp_path, monkeypatch, cache, processes):
    workers(monkeypatch, processes)
    records = some_records()
    recipe.max_length = recipe.pack_length = 4096
    recipe.data = write(tmp_path / "data.jsonl", records)
    data, report = load_data(recipe, tokenizer)
    assert examples(data) == [one_at_a_time(one, tokenizer) for one in records]
    assert report.used == len(records) and not report.shortened and not report.malformed and not report.left_out
    assert all(example.input_ids.dtype == np.int32 for example in data.sources[0])
    assert len(list(cache.glob("*/*.arrow"))) == processes and len(list(cache.iterdir())) == 1


def test_a_second_run_reads_what_the_first_kept(recipe, tokenizer, tmp_path, monkeypatch, cache):
    lines = [record(index=i) for i in range(4)] + [{"text": " "}, record(context="x = 1\n" * 400, answer="y")]
    recipe.data = write(tmp_path / "data.jsonl", lines)
    first, found = load_data(recipe, tokenizer)
    kept = set(cache.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(module, "_map", None)
        again, report = load_data(recipe, tokenizer)
        assert examples(again) == examples(first) and again.hash() == first.hash() and report == found
        assert report.shortened == 1 and len(report.malformed) == 1
        moved = tmp_path / "moved.jsonl"
        (tmp_path / "data.jsonl").rename(moved)  # whose name is not what is in it
        recipe.data = [{"path": str(moved)}]
        assert load_data(recipe, tokenizer)[1].malformed == [(f"{moved}, line 5", "text is empty")]
    # Whatever tokens depend on makes others.
    recipe.max_length = recipe.pack_length = 200
    load_data(recipe, tokenizer)
    recipe.targets = {**recipe.targets, "Poetry": 0.5}
    load_data(recipe, tokenizer)
    recipe.data = [{"path": str(moved), "limit": 2}]
    assert load_data(recipe, tokenizer)[1].used == 2
    moved.write_text(moved.read_text().replace("It adds 2.", "It adds two."))
    load_data(recipe, tokenizer)
    other = type(tokenizer).from_pretrained(recipe.model)
    other.add_tokens(["return"])
    load_data(recipe, other)
    assert len(set(cache.iterdir()) - kept) == 5


@pytest.mark.parametrize("limit", [1, 3, 6, 20])
def test_a_limit_counts_what_is_usable(recipe, tokenizer, tmp_path, limit):
    lines = [record(index=i) if i % 3 == 2 else {"text": " "} for i in range(20)]
    recipe.data = [{**write(tmp_path / "data.jsonl", lines)[0], "limit": limit}]
    data, report = load_data(recipe, tokenizer)
    used = min(limit, 6)
    assert report.used == len(data.sources[0]) == used
    assert len(report.malformed) == (2 * used if limit <= 6 else 14)  # those before the last one that is used


def test_records_too_long_for_their_answers_are_counted_with_their_lines(recipe, tokenizer, tmp_path):
    long = record(context="x = 1\n" * 400 + "the code is 48213\n" + "y = 1\n" * 400, answer="48213")
    recipe.data = write(tmp_path / "data.jsonl", [record(), {**long, "question": "Which? " * 200}])
    _, report = load_data(recipe, tokenizer)
    assert report.used == 1 and [where for where, _ in report.left_out] == [f"{tmp_path / 'data.jsonl'}, line 2"]
    assert "1 too long records were left out" in str(report) and "line 2: the question and where" in str(report)
    recipe.data = write(tmp_path / "other.jsonl", [{**long, "question": "Which? " * 200}])
    with pytest.raises(DataError, match=r"no usable record is left(.|\n)*line 1: the question"):
        load_data(recipe, tokenizer)


def test_others_wait_until_one_process_has_tokenised(recipe, tokenizer):
    turns = []

    @contextmanager
    def turn():
        turns.append("begun")
        yield
        turns.append("done")

    load_data(recipe, tokenizer, turn)
    assert turns == ["begun", "done"]


def test_a_cache_that_cannot_be_written_is_named(recipe, tokenizer, cache):
    cache.parent.write_text("a file")
    with pytest.raises(DataError, match=r"cannot keep the tokens of .*or name another folder by HF_DATASETS_CACHE"):
        load_data(recipe, tokenizer)


def tokenise(recipe, tokenizer, errors):
    """Load data in a process of its own, as the command line would when it is interrupted."""
    os.setsid()
    datasets.disable_progress_bars()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(errors, "w", buffering=1) as sys.stderr:
        os.dup2(sys.stderr.fileno(), 2)
        try:
            load_data(recipe, tokenizer)
        except KeyboardInterrupt:
            os._exit(130)


def test_ctrl_c_ends_all_processes_without_a_word_and_leaves_nothing(recipe, tokenizer, tmp_path, monkeypatch, cache):
    workers(monkeypatch, 2)
    recipe.data = write(tmp_path / "data.jsonl", [record(index=i, context=f"x{i} = 1\n" * 2000) for i in range(600)])
    process = get_context("fork").Process(target=tokenise, args=(recipe, tokenizer, tmp_path / "errors"))
    process.start()
    for _ in range(600):  # as soon as both are at work
        if len(list(cache.glob(".tokenising-*/*/*"))) == 2:
            break
        assert process.is_alive(), (tmp_path / "errors").read_text()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    process.join(60)
    assert (process.exitcode, (tmp_path / "errors").read_text()) == (130, "")
    assert list(cache.iterdir()) == []
