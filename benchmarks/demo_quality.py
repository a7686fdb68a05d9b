"""Quality of the shipped model: dense, routed, all-SA and the best static layers, on held-out text and vocabularies.

Run: ``python benchmarks/demo_quality.py`` (about two minutes on a GPU). Writes benchmarks/results/demo_quality.json.

The static baseline has as many FA layers as the routed model uses on average, rounded up, the same ones for every
input: the best of all such sets by mean retrieval accuracy on calibration samples that are not in the report.
"""

import argparse
import hashlib
import math
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flux_attention import attach
from flux_attention.evaluation.harness import evaluate
from flux_attention.evaluation.quality import best_layers
from flux_attention.evaluation.results import write_results
from flux_attention.evaluation.tasks import FAMILIES, RETRIEVAL, Haystack, make_sample
from flux_attention.evaluation.text import local_texts

CALIBRATION_SEED = 10_000_000


def hashes(*folders):
    """SHA-256 of the weight files: which weights a report is about."""
    files = sorted(file for folder in folders for file in folder.glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main():
    shipped = Path(__file__).parents[1] / "src/flux_attention/shipped"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, default=shipped / "backbone")
    parser.add_argument("--routers", type=Path, default=shipped / "routers")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/demo_quality.json")
    parser.add_argument("--count", type=int, default=200, help="samples a family")
    parser.add_argument("--calibration", type=int, default=32, help="samples a family to choose static layers on")
    parser.add_argument("--static", type=int, nargs="+", help="the static layers, if an earlier search found them")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--max-chars", type=int, default=5_000_000)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.backbone)
    model = AutoModelForCausalLM.from_pretrained(args.backbone, dtype=dtype).to(device).eval()
    haystack = Haystack(local_texts(True, site_packages=True, max_chars=args.max_chars), tokenizer)
    print(f"{len(haystack.tokens):,} held-out tokens")

    def samples(family, count, seed=0):
        return [make_sample(family, haystack, tokenizer, args.length, seed + index) for index in range(count)]

    report = {family: samples(family, args.count) for family in FAMILIES}
    routing = attach(model, args.routers)
    layers = routing.layers
    rows = []

    def record(method, family, scores, **more):
        row = {"task": family, "method": method, "n": len(scores.right), "sparsity": round(scores.msr, 4)}
        if family == "plain":
            row["perplexity"] = round(scores.perplexity, 4)
        else:
            row["accuracy"] = round(scores.accuracy, 4)
        rows.append({**row, **more})
        print(rows[-1], flush=True)

    fa_counts = []
    for family in FAMILIES:
        scores = evaluate(model, report[family], routing, args.batch_size)
        rates = torch.tensor(scores.full, dtype=torch.float32).mean(0)
        fa_counts.append(rates.sum().item())
        record(
            "routed",
            family,
            scores,
            fa_rate={layer: round(rate, 4) for layer, rate in zip(layers, rates.tolist(), strict=True)},
        )
        for method, spec in (("dense", "full"), ("sparse", "sparse")):
            with routing.force(spec):
                record(method, family, evaluate(model, report[family], routing, args.batch_size))

    count = math.ceil(fmean(fa_counts) - 1e-6)
    calibration = {family: samples(family, args.calibration, CALIBRATION_SEED) for family in FAMILIES}

    def value(chosen, families, first):
        """Mean retrieval accuracy, then perplexity of plain text, on the first calibration samples."""
        with routing.force(list(chosen)):
            scores = {
                family: evaluate(model, calibration[family][:first], routing, args.batch_size) for family in families
            }
        plain = -scores["plain"].perplexity if "plain" in scores else 0.0
        return fmean(scores[family].accuracy for family in RETRIEVAL), plain

    best = args.static
    if best is None:
        few = (RETRIEVAL, max(1, args.calibration // 4))
        everything = (FAMILIES, args.calibration)
        best = best_layers(lambda chosen, first: value(chosen, *(few if first else everything)), layers, count)
    elif len(best) != count:
        parser.error(f"--static names {len(best)} layers, but the routed model uses {count} on average, rounded up")
    print(f"best static layers: {best}")
    with routing.force(list(best)):
        for family in FAMILIES:
            record("static", family, evaluate(model, report[family], routing, args.batch_size), full_layers=list(best))
    write_results(
        args.output,
        rows,
        shape="shipped",
        seq_len=args.length,
        sink=routing.config.sink,
        window=routing.config.window,
        static_choices=math.comb(len(layers), count) if args.static is None else None,  # that were searched
        sha256=hashes(args.backbone, args.routers),
        dtype=args.dtype,
    )


if __name__ == "__main__":
    main()
