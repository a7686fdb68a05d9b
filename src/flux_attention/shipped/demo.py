"""The demo: the shipped model on text of the local Python installation, three ways."""

from __future__ import annotations

import random
import time
from statistics import fmean
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from flux_attention.hf.cache.size import kv_bytes
from flux_attention.shipped import load_shipped
from flux_attention.tasks.families import FAMILIES
from flux_attention.tasks.samples import Haystack, Sample, make_sample
from flux_attention.tasks.scoring import answer_losses
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
def _answer(model, tokenizer, sample: Sample, method: str) -> dict[str, Any]:
    """Generate a sample's answer greedily; for plain text, its perplexity."""
    ids = torch.from_numpy(sample.prompt_ids.astype(np.int64))[None]
    began = time.perf_counter()
    if sample.family == "plain":
        losses, _ = answer_losses(model, [sample], prompt_lengths=[ids.shape[1]])
        cache = model.get_decoder()(ids, use_cache=True).past_key_values
        result = {"nats": losses[0].mean().item()}
    else:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(sample.answer_ids),
            do_sample=False,
            return_dict_in_generate=True,
        )
        new, cache = out.sequences[0, ids.shape[1] :], out.past_key_values
        result = {
            "answer": tokenizer.decode(new).split("\n")[0].strip(),
            "right": new.tolist() == sample.answer_ids.tolist(),
        }
    return {"method": method, **result, "kv_bytes": kv_bytes(cache), "seconds": time.perf_counter() - began}


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


def run_demo(count: int, length: int, seed: int | None, console: Console) -> list[dict[str, Any]]:
    """
    Answer ``count`` samples of every family with the shipped model: dense, routed and all-SA.

    Parameters
    ----------
    count, length : int
        Samples a family, and tokens of each.
    seed : int, optional
        Default: fresh samples.
    console : rich.console.Console
        Where panels, progress and the table go.

    Returns
    -------
    list of dict
        One row a family and method: task, method, accuracy or perplexity, sparsity, kv_bytes, seconds, n.
    """
    began = time.perf_counter()
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    model, tokenizer, routing = load_shipped()
    haystack = Haystack(local_texts(held_out=True, max_chars=400_000), tokenizer)
    console.print(
        f"A {model.num_parameters() / 1e6:.0f} M-parameter model with {len(routing.layers)} routed layers reads source "
        f"code that it was not trained on.\nFull attention sees all {length} tokens, sparse attention "
        f"{routing.sparse.kept(length)}. Layers: [bold red]█[/] full, [cyan]░[/] sparse. Seed {seed}.",
        highlight=False,
    )
    table: dict[str, dict[str, list[dict[str, Any]]]] = {family: {m: [] for m in METHODS} for family in FAMILIES}
    sparsity: dict[str, list[float]] = {family: [] for family in FAMILIES}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("answering", total=len(FAMILIES) * count * len(METHODS))
        for family in FAMILIES:
            for index in range(count):
                sample = make_sample(family, haystack, tokenizer, length, seed + index)
                for method, spec in METHODS.items():
                    with routing.force(spec):
                        table[family][method].append(_answer(model, tokenizer, sample, method))
                    if spec is None:
                        routes = routing.routes
                    progress.advance(bar)
                sparsity[family] += routes.msr
                if index == 0:
                    _panel(console, tokenizer, sample, [results[0] for results in table[family].values()], routes)

    rows = []
    for family, methods in table.items():
        for method, results in methods.items():
            row = {"task": family, "method": method, "n": count}
            row["sparsity"] = {"dense": 0.0, "sparse": 1.0}.get(method, fmean(sparsity[family]))
            if family == "plain":
                row["perplexity"] = float(np.exp(fmean(r["nats"] for r in results)))
            else:
                row["accuracy"] = fmean(r["right"] for r in results)
            row["kv_bytes"] = round(fmean(r["kv_bytes"] for r in results))
            row["seconds"] = fmean(r["seconds"] for r in results)
            rows.append(row)
    _print_table(console, rows, count, time.perf_counter() - began)
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
