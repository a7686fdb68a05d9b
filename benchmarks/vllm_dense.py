"""Times prefill and decode of vLLM's dense engine on the same sizes, as a baseline for our own rows.

Run: ``python benchmarks/vllm_dense.py --results DIR`` on a GPU with vLLM, right after ``flux-attention bench prefill``
and ``bench decode`` with ``--output DIR``. Every row there of the same shape, batch and length gets a twin whose
baseline is ``vllm-dense``; vLLM's own times stay in ``vllm_dense.json``.

Prefill is the time to the first token; decode is what each of 64 more tokens takes, both by the engine's own clock, and
of several sequences that of the one whose prompt was read last. Those before it end some steps earlier, which is in
vLLM's favour. No prefix is cached.
"""

import argparse
import json
import os
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path

from flux_attention.sizes import SHAPES

# One process, no look-ups on the network, and a sampler that needs no compiler.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

MORE = 64


def spread(times):
    return {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times), "repeats": len(times)}


def measured(shape, lengths, batches, repeats):
    """Measure vLLM with random weights: (phase, batch, length, times in ms)."""
    from speed.model import fitting
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import LLM, SamplingParams

    longest = max(lengths) + 2 * MORE
    config = AutoConfig.for_model(**SHAPES[shape], max_position_embeddings=longest)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=longest,
            max_num_seqs=max(batches),
            enable_prefix_caching=False,
            gpu_memory_utilization=0.9,
            disable_log_stats=False,
        )

    def times(batch, length):
        prompts = [{"prompt_token_ids": [(7 * i + row) % 100_000 + 10 for i in range(length)]} for row in range(batch)]
        params = SamplingParams(max_tokens=1 + MORE, ignore_eos=True, temperature=0.0, detokenize=False)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        found = max((output.metrics for output in outputs), key=lambda each: each.first_token_ts)
        return 1000 * found.first_token_latency, 1000 * (found.last_token_ts - found.first_token_ts) / MORE

    for batch in batches:
        times(batch, 512)
    for batch, length in fitting(batches, lengths):
        prefill, decode = zip(*(times(batch, length) for _ in range(repeats)), strict=True)
        yield "prefill", batch, length, spread(prefill)
        yield "decode", batch, length, spread(decode)


def main():
    from speed.timing import row

    from flux_attention.results import earlier_rows, environment, merged, write_results

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--shape", default="qwen3-8b", choices=SHAPES)
    parser.add_argument("--lengths", default="1,2,4,8,16,32,64,128,256", help="thousands (1,024) of tokens")
    parser.add_argument("--batches", default="1,8", help="sequences together")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    lengths, batches = [1024 * int(length) for length in args.lengths.split(",")], [*map(int, args.batches.split(","))]
    path, device = args.results / "vllm_dense.json", environment()["device"]
    dense, rows, before = {}, [], earlier_rows(path)
    for phase, batch, length, times in measured(args.shape, lengths, batches, args.repeats):
        dense[phase, batch, length] = times
        facts = dict(shape=args.shape, seq_len=length, batch=batch, phase=phase, engine="vllm", method="dense")
        rows.append(row(times, "", None, **facts, sparsity=0.0))
        print(rows[-1], flush=True)
        write_results(path, merged(before, rows), vllm=version("vllm"))
    for name in ("e2e_prefill", "e2e_decode"):
        path = args.results / f"{name}.json"
        if not path.exists():
            print(f"no {path}: nothing to compare with")
            continue
        results = json.loads(path.read_text())
        if results["meta"]["device"] != device:
            raise SystemExit(f"{path} was measured on {results['meta']['device']}, vLLM on {device}: run both on one")
        own, twins = [], []
        for found in results["rows"]:
            compared = found["shape"] == args.shape and "ms" in found
            base = dense.get((found["phase"], found["batch"], found["seq_len"])) if compared else None
            if base is not None and found.get("baseline") == "vllm-dense":  # of an earlier call
                continue
            own.append(found)
            if base is not None:
                times = {key: found[key] for key in ("ms", "ms_min", "ms_max", "repeats")}
                facts = {key: found[key] for key in found if not key.startswith("baseline") and key not in times}
                twins.append(row(times, "vllm-dense", base, **facts))
        write_results(path, own + twins, **results["meta"])


if __name__ == "__main__":
    main()
