"""Measures prefill time and KV bytes of the shipped model on a CPU, by prompt length and forced sparsity.

Run: ``python benchmarks/cpu_prefill.py`` (seven minutes on two cores). Writes benchmarks/results/cpu_prefill.json.
Random tokens, as speed does not depend on them; forced routes; the baseline is the same code with every layer full.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from flux_attention import kv_bytes
from flux_attention.results import write_results
from flux_attention.shipped import load_shipped


@torch.no_grad()
def measure(model, routing, ids, sparsity, repeats):
    """Measure the milliseconds of ``repeats`` prefills after a short warm-up, and the bytes of the KV cache."""
    times = []
    with routing.force(float(sparsity)):
        model.get_decoder()(ids[:, :2048], use_cache=True)
        for _ in range(repeats):
            began = time.perf_counter()
            cache = model.get_decoder()(ids, use_cache=True).past_key_values
            times.append(1000 * (time.perf_counter() - began))
    return times, kv_bytes(cache)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 1.0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/cpu_prefill.json")
    args = parser.parse_args()
    model, _, routing = load_shipped()
    rows = []
    for length in args.lengths:
        ids = torch.randint(3, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        dense, dense_bytes = measure(model, routing, ids, 0.0, args.repeats)
        for sparsity in args.sparsities:
            times, held = measure(model, routing, ids, sparsity, args.repeats)
            rows.append(
                {
                    "shape": "shipped",
                    "seq_len": length,
                    "batch": 1,
                    "sparsity": sparsity,
                    "phase": "prefill",
                    "engine": "reference",
                    "ms": round(statistics.median(times), 1),
                    "ms_min": round(min(times), 1),
                    "ms_max": round(max(times), 1),
                    "baseline": "own-dense",
                    "baseline_ms": round(statistics.median(dense), 1),
                    "baseline_ms_min": round(min(dense), 1),
                    "baseline_ms_max": round(max(dense), 1),
                    "speedup": round(statistics.median(dense) / statistics.median(times), 2),
                    "kv_bytes": held,
                    "baseline_kv_bytes": dense_bytes,
                }
            )
            print(rows[-1], flush=True)
    write_results(args.output, rows, threads=torch.get_num_threads(), dtype="float32", repeats=args.repeats)


if __name__ == "__main__":
    main()
