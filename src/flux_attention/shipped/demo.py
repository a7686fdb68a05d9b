"""The demo runs the shipped model on text of the local Python installation, three ways."""

from __future__ import annotations

import itertools
import os
import queue
import random
import time
from concurrent.futures import Future, ThreadPoolExecutor
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flux_attention.hf.cache.size import kv_bytes
from flux_attention.progress import Progress, silent
from flux_attention.shipped import load_shipped
from flux_attention.tasks.families import FAMILIES
from flux_attention.tasks.samples import Haystack, Sample, make_sample
from flux_attention.tasks.text import local_texts

METHODS = {"dense": "full", "routed": None, "sparse": "sparse"}
TITLES = {
    "single_needle": "one fact in the text",
    "multi_key": "one of sixteen facts",
    "multi_value": "three values of one key",
    "two_hop": "two look-ups in one answer",
    "count": "how often a line occurs",
    "copy": "repeat a long passage",
    "plain": "no question: continue source code",
}


@torch.no_grad()
def _answer(model, tokenizer, sample: Sample) -> dict[str, Any]:
    """Generate a sample's answer greedily; for plain text, its perplexity."""
    ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
    ids, wanted = ids[:, : len(sample.prompt_ids)], ids[:, len(sample.prompt_ids) :]
    began = time.perf_counter()
    if sample.family == "plain":
        prompt = model.get_decoder()(ids, use_cache=True)
        held = kv_bytes(prompt.past_key_values)
        text = model.get_decoder()(wanted[:, :-1], past_key_values=prompt.past_key_values, use_cache=True)
        hidden = torch.cat([prompt.last_hidden_state[0, -1:], text.last_hidden_state[0]])
        result = {"nats": F.cross_entropy(model.get_output_embeddings()(hidden).float(), wanted[0]).item()}
    else:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=wanted.shape[1],
            do_sample=False,
            return_dict_in_generate=True,
        )
        new, held = out.sequences[0, ids.shape[1] :], kv_bytes(out.past_key_values)
        result = {"answer": tokenizer.decode(new).split("\n")[0].strip(), "right": new.tolist() == wanted[0].tolist()}
    return {**result, "kv_bytes": held, "seconds": time.perf_counter() - began}


class Workers:
    """
    Answers samples at the same time, by threads with a model each.

    A model as small as this one gains little from several cores in one call, and in decode nothing: a sample a core is
    about twice as fast on two cores, and much faster where others are at work on them.

    Parameters
    ----------
    count : int, optional
        Default: one a core, four at most.
    """

    def __init__(self, count: int | None = None):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = min(4, cores) if count is None else count
        self.loaded = [load_shipped() for _ in range(count)]
        self._free: queue.SimpleQueue = queue.SimpleQueue()
        for one in self.loaded:
            self._free.put(one)
        self._threads, self._pool = torch.get_num_threads(), ThreadPoolExecutor(count)
        torch.set_num_threads(max(1, cores // count))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C nobody waits for the rest
        torch.set_num_threads(self._threads)

    def submit(self, sample: Sample, method: str) -> Future:
        """Have a sample answered by one of ``METHODS``; gives ``_answer``'s result, and the routes."""
        return self._pool.submit(self._run, sample, method)

    def _run(self, sample: Sample, method: str):
        model, tokenizer, routing = one = self._free.get()
        try:
            with routing.force(METHODS[method]):
                result = {"method": method, **_answer(model, tokenizer, sample)}
            return result, routing.routes
        finally:
            self._free.put(one)


def _short(text: str, width: int = 64) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _panel(console: Console, tokenizer, sample: Sample, results: list[dict[str, Any]], routes) -> None:
    lines = tokenizer.decode(sample.prompt_ids[-80:]).split("\n")
    gist = lines[-2].removeprefix("# Question: ") if sample.family != "plain" else "…" + _short(lines[-1] or lines[-2])
    console.print(
        Text(f"\n{TITLES[sample.family]}", style="bold"), f"({len(sample.prompt_ids)} tokens)", highlight=False
    )
    console.print(Text(f"  {_short(gist, 90)}", style="italic"))
    for result in results:
        line = Text(f"  {result['method']:7s}")
        if "nats" in result:
            line.append(f"perplexity {np.exp(result['nats']):.2f}")
        else:
            line.append("✓ " if result["right"] else "✗ ", style="green" if result["right"] else "red")
            line.append(_short(result["answer"], 44))
        line.append(f"  KV {result['kv_bytes'] / 2**20:.1f} MiB", style="dim")
        console.print(line)
        if result["method"] == "routed":
            console.print(Text("          ").append(routes.__rich__()))


def run_demo(
    count: int, length: int, seed: int | None, console: Console, progress: Progress = silent
) -> list[dict[str, Any]]:
    """
    Answer ``count`` samples of every family with the shipped model: dense, routed and all-SA.

    Parameters
    ----------
    count, length : int
        Samples a family, and tokens of each.
    seed : int, optional
        Default: fresh samples.
    console : rich.console.Console
        Where panels and the table go.
    progress : Progress
        Told how far it is; by threads, too.

    Returns
    -------
    list of dict
        One row a family and method: task, method, accuracy or perplexity, sparsity, kv_bytes, seconds, n.
    """
    began = time.perf_counter()
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    with Workers() as workers:
        model, tokenizer, routing = workers.loaded[0]
        haystack = Haystack(local_texts(held_out=True, max_chars=400_000), tokenizer)
        console.print(
            f"A model of {model.num_parameters() / 1e6:.0f} M parameters with {len(routing.layers)} routed layers "
            f"reads source code that it was not trained on.\nFull attention sees all {length} tokens, sparse attention "
            f"{routing.sparse.kept(length)}. Layers: [bold red]█[/] full, [cyan]░[/] sparse. Seed {seed}.",
            highlight=False,
        )
        samples = [
            make_sample(family, haystack, tokenizer, length, seed + index)
            for family in FAMILIES
            for index in range(count)
        ]
        answers = _answer_all(workers, samples, console, progress)
    rows = _rows(samples, answers)
    _print_table(console, rows, count, time.perf_counter() - began)
    return rows


def _answer_all(
    workers: Workers, samples: list[Sample], console: Console, progress: Progress
) -> list[tuple[dict[str, Any], Any]]:
    """Return each sample's results by method, and its routes; show the first sample of each family when answered."""
    answers: list[tuple[dict[str, Any], Any]] = []
    total, done = len(samples) * len(METHODS), itertools.count(1)
    progress("answering", 0, total)
    futures = [[workers.submit(sample, method) for method in METHODS] for sample in samples]
    for each in itertools.chain.from_iterable(futures):
        each.add_done_callback(lambda _: progress("answering", next(done), total))
    shown = set()
    for sample, of_sample in zip(samples, futures, strict=True):
        found = dict(zip(METHODS, [future.result() for future in of_sample], strict=True))
        results, routes = {method: result for method, (result, _) in found.items()}, found["routed"][1]
        answers.append((results, routes))
        if sample.family not in shown:
            shown.add(sample.family)
            _panel(console, workers.loaded[0][1], sample, list(results.values()), routes)
    return answers


def _rows(samples: list[Sample], answers: list[tuple[dict[str, Any], Any]]) -> list[dict[str, Any]]:
    """Make a row for each family and method: means over its samples."""
    rows = []
    for family, method in itertools.product(FAMILIES, METHODS):
        of_family = [answer for sample, answer in zip(samples, answers, strict=True) if sample.family == family]
        results = [results[method] for results, _ in of_family]
        routed = fmean(routes.msr[0] for _, routes in of_family)
        row = {"task": family, "method": method, "n": len(results)}
        row["sparsity"] = {"dense": 0.0, "sparse": 1.0}.get(method, routed)
        if family == "plain":
            row["perplexity"] = float(np.exp(fmean(result["nats"] for result in results)))
        else:
            row["accuracy"] = fmean(result["right"] for result in results)
        row["kv_bytes"] = round(fmean(result["kv_bytes"] for result in results))
        row["seconds"] = fmean(result["seconds"] for result in results)
        rows.append(row)
    return rows


def _print_table(console: Console, rows: list[dict[str, Any]], count: int, elapsed: float) -> None:
    table = Table(title=f"\nexact answers, {count} of each kind (source code: perplexity)", title_justify="left")
    for name in ("", "dense", "routed", "sparse", "Ω_MSR", "KV ÷ dense"):
        table.add_column(name, justify="left" if not name else "right")
    by = {(row["task"], row["method"]): row for row in rows}
    for family in FAMILIES:
        dense, routed, sparse = (by[family, method] for method in METHODS)

        def shown(row):
            return f"{row['perplexity']:.2f}" if "perplexity" in row else f"{row['accuracy']:.0%}"

        table.add_row(
            TITLES[family],
            *map(shown, (dense, routed, sparse)),
            f"{routed['sparsity']:.2f}",
            f"{routed['kv_bytes'] / dense['kv_bytes']:.0%}",
        )
    console.print(table)
    accuracy = {
        method: fmean(row["accuracy"] for row in rows if row["method"] == method and "accuracy" in row)
        for method in METHODS
    }
    routed = [row for row in rows if row["method"] == "routed"]
    asked = fmean(row["sparsity"] for row in routed if row["task"] != "plain")
    console.print(
        f"In {elapsed:.0f} s: routed answered {accuracy['routed']:.0%} of the questions with {asked:.0%} of its layers "
        f"sparse (dense {accuracy['dense']:.0%}, all sparse {accuracy['sparse']:.0%}), and read plain code with "
        f"{by['plain', 'routed']['sparsity']:.0%} of them sparse.",
        highlight=False,
        soft_wrap=True,
    )
