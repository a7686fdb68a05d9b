"""Profiles one prefill and one decode step: GPU milliseconds by kind of kernel.

Run: ``python benchmarks/profile_speed.py`` on a GPU. Writes benchmarks/results/profile.json.
"""

import argparse
import re
from collections import defaultdict
from pathlib import Path

import torch
from speed.model import ENGINES, random_cache, random_model
from speed.timing import measure
from torch.profiler import ProfilerActivity, profile

from flux_attention.hf.generation.step import decode_step
from flux_attention.results import write_results
from flux_attention.sizes import SHAPES

#: Kinds of kernels, by the first pattern that their name contains.
KINDS = {
    # In a decode step they are the layers' matrix products, with the norms and whatever else is fused to them.
    "reductions by torch.compile": "^triton_red",
    "other kernels by torch.compile": "^triton_",
    "dense attention": "cudnn_generated|fmha|flash_fwd|sdpa",
    "sparse attention": "^_forward",
    "decode attention": "^_decode",
    "matrix products": "gemm|nvjet|cutlass|gemv|splitK|matmul|cublas",
    "copies": "memcpy|memset|copy_|CatArray",
}


def kind(name):
    return next((label for label, pattern in KINDS.items() if re.search(pattern, name, re.I)), "other small operations")


def kernels(run):
    """Measure GPU time by kernel in ms, and from the first kernel's start to the last one's end."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    times = defaultdict(float)
    for event in events:
        times[event.name] += event.time_range.elapsed_us() / 1000
    first = min(event.time_range.start for event in events)
    last = max(event.time_range.end for event in events)
    return dict(times), (last - first) / 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/profile.json")
    parser.add_argument("--shape", default="qwen3-8b", choices=SHAPES)
    parser.add_argument("--length", type=int, default=2**17)
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()

    routing = random_model(args.shape, args.compile)
    ids = torch.randint(3, routing.model.config.vocab_size, (1, args.length), device="cuda")
    rows = []

    def record(phase, run):
        alone = measure(run, seconds=0.2, min_repeats=1, warm=1)["ms"]
        times, span = kernels(run)
        kinds = defaultdict(float)
        for name, ms in times.items():
            kinds[kind(name)] += ms
        largest = sorted(times.items(), key=lambda item: -item[1])[:15]
        rows.append(
            dict(
                shape=args.shape,
                seq_len=args.length,
                batch=1,
                sparsity=args.sparsity,
                phase=phase,
                engine=ENGINES[args.compile],
                ms=round(span, 4),
                unprofiled_ms=round(alone, 4),
                kinds={name: round(ms, 4) for name, ms in sorted(kinds.items(), key=lambda item: -item[1])},
                idle_ms=round(span - sum(times.values()), 4),
                largest={name[:100]: round(ms, 4) for name, ms in largest},
            )
        )
        print(rows[-1], flush=True)
        write_results(args.output, rows)

    step = decode_step(routing, 1)
    step.load(random_cache(routing, 1, args.length, args.sparsity), 60)
    record("decode", step.run)
    with torch.no_grad(), routing.force(args.sparsity):
        record("prefill", lambda: routing.model(ids, use_cache=True, logits_to_keep=1))


if __name__ == "__main__":
    main()
