"""Compares routes that routers decide by a prompt's two ends with those that they decide in the prefill.

Run: ``python benchmarks/ends_quality.py`` (the shipped model; a quarter of an hour on two cores), or with ``--model``
and ``--routers``. Writes benchmarks/results/ends_quality.json: of each family and number of end tokens how many
decisions agree, and what is answered, beside dense. Of questions in words answers are what ``generate`` gives.
"""

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from flux_attention import FluxConfig, attach
from flux_attention.adapters import CONFIG_FILE
from flux_attention.evaluation.material import Material
from flux_attention.hf.loading import load_model, load_tokenizer
from flux_attention.names import adapter_path, model_name
from flux_attention.results import write_results
from flux_attention.tasks.families import FAMILIES
from flux_attention.tasks.generation import score_answers
from flux_attention.tasks.samples import Haystack
from flux_attention.tasks.scoring import evaluate
from flux_attention.tasks.text import local_texts

MAX_CHARS = 5_000_000


def measure(model, tokenizer, routing, samples, batch_size, routes=None):
    """Return the score of samples, by name and value, and their routes (N, L)."""
    question = samples[0].question
    if question is not None and question.metric != "perplexity":
        scores, full = score_answers(model, tokenizer, samples, batch_size, routes, routing)
        return {"accuracy": round(fmean(scores), 4)}, torch.tensor(full)
    scores = evaluate(model, samples, routing, batch_size, routes)
    is_text = question is not None or samples[0].family == "plain"
    value = {"perplexity": round(scores.perplexity, 4)} if is_text else {"accuracy": round(scores.accuracy, 4)}
    return value, torch.tensor(scores.full)


def with_ends(routers, end_tokens, folder):
    """Copy an adapter, and let it read so many tokens at each end."""
    config = FluxConfig.from_json(Path(routers) / CONFIG_FILE)
    shutil.copytree(routers, folder, dirs_exist_ok=True)
    replace(config, decide="ends", end_tokens=max(end_tokens, config.pool_size)).to_json(Path(folder) / CONFIG_FILE)
    return folder


def rows_of(model, tokenizer, routers, material, args):
    """Yield rows, family by family: dense, routed, and routed by the ends of each length."""
    for family in material.families:
        samples = material.make(family, args.length, args.samples)
        facts = dict(task=family, seq_len=args.length, n=len(samples), model=model_name(args.model))
        routing = attach(model, routers, decide="prefill")
        dense, _ = measure(model, tokenizer, routing, samples, args.batch_size, "full")
        yield dict(facts, method="dense", sparsity=0.0, **dense)
        value, expected = measure(model, tokenizer, routing, samples, args.batch_size)
        routing.detach()
        yield dict(facts, method="routed", sparsity=round(1 - expected.float().mean().item(), 4), **value)
        for end_tokens in args.end_tokens:
            with tempfile.TemporaryDirectory() as folder:
                routing = attach(model, with_ends(routers, end_tokens, folder))
            value, routes = measure(model, tokenizer, routing, samples, args.batch_size)
            routing.detach()
            agreement = (routes == expected).float().mean().item()
            facts_of_ends = dict(
                method="routed-ends", end_tokens=routing.config.end_tokens, agreement=round(agreement, 4)
            )
            yield dict(facts, **facts_of_ends, sparsity=round(1 - routes.float().mean().item(), 4), **value)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shipped")
    parser.add_argument("--routers", default="shipped")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--end-tokens", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/ends_quality.json")
    args = parser.parse_args()
    model = load_model(args.model, "auto", args.device).to(args.device).eval()
    tokenizer = load_tokenizer(args.model)
    haystack = Haystack(local_texts(True, site_packages=True, max_chars=MAX_CHARS), tokenizer)
    material, rows = Material(tokenizer, args.families, haystack), []
    for row in rows_of(model, tokenizer, adapter_path(args.routers), material, args):
        rows.append(row)
        print(row, flush=True)
        write_results(args.output, rows)


if __name__ == "__main__":
    main()
