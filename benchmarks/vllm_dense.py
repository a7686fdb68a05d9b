"""Prefill and decode of vLLM's dense engine on the same sizes, as a baseline for our own rows.

Run: ``python benchmarks/vllm_dense.py --results DIR`` on a GPU with vLLM, right after ``flux-attention bench prefill``
and ``bench decode`` with ``--output DIR``. Every row there of the same shape, batch 1 and length gets a twin whose
baseline is ``vllm-dense``; vLLM's own times stay in ``vllm_dense.json``.

Prefill is the time to the first token; decode is what each of 64 more tokens takes. No prefix is cached.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

# One process, no look-ups on the network, and a sampler that needs no compiler.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ARCHITECTURES = {"qwen3-8b": "Qwen3ForCausalLM", "llama-3.1-8b": "LlamaForCausalLM"}
MORE = 64


def spread(times):
    return {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times), "repeats": len(times)}


def measured(shape, lengths, repeats):
    """(phase, length, times in ms) of vLLM with random weights."""
    from transformers import AutoConfig
    from vllm import LLM, SamplingParams

    from flux_attention.evaluation.speed import SHAPES

    longest = max(lengths) + 2 * MORE
    config = AutoConfig.for_model(**SHAPES[shape], max_position_embeddings=longest)
    config.architectures, config.dtype = [ARCHITECTURES[shape]], "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=longest,
            max_num_seqs=1,
            enable_prefix_caching=False,
            gpu_memory_utilization=0.9,
        )

    def seconds(length, tokens):
        prompt = {"prompt_token_ids": [(7 * i) % 100_000 + 10 for i in range(length)]}
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0, detokenize=False)
        began = time.perf_counter()
        llm.generate([prompt], params, use_tqdm=False)
        return time.perf_counter() - began

    seconds(512, 4)
    for length in lengths:
        few = 1 if length >= 2**17 else repeats
        first = [1000 * seconds(length, 1) for _ in range(few)]
        yield "prefill", length, spread(first)
        whole = [1000 * seconds(length, 1 + MORE) for _ in range(few)]
        yield "decode", length, spread([(time - statistics.median(first)) / MORE for time in whole])


def main():
    from flux_attention.evaluation.results import write_results
    from flux_attention.evaluation.speed import row

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--shape", default="qwen3-8b", choices=ARCHITECTURES)
    parser.add_argument("--lengths", default="1,2,4,8,16,32,64,128,256", help="thousands (1,024) of tokens")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    lengths = [1024 * int(length) for length in args.lengths.split(",")]
    dense, rows = {}, []
    for phase, length, times in measured(args.shape, lengths, args.repeats):
        dense[phase, length] = times
        facts = dict(shape=args.shape, seq_len=length, batch=1, phase=phase, engine="vllm", method="dense")
        rows.append(row(times, "", None, **facts, sparsity=0.0))
        print(rows[-1], flush=True)
        write_results(args.results / "vllm_dense.json", rows, vllm=version("vllm"))
    device = json.loads((args.results / "vllm_dense.json").read_text())["meta"]["device"]
    for name in ("e2e_prefill", "e2e_decode"):
        path = args.results / f"{name}.json"
        if not path.exists():
            print(f"no {path}: nothing to compare with")
            continue
        results = json.loads(path.read_text())
        if results["meta"]["device"] != device:
            raise SystemExit(f"{path} was measured on {results['meta']['device']}, vLLM on {device}: run both on one")
        own = [found for found in results["rows"] if found.get("baseline") != "vllm-dense"]
        twins = []
        for found in own:
            base = dense.get((found["phase"], found["seq_len"]))
            other = "commit" in found or (found["shape"], found["batch"]) != (args.shape, 1)  # kept from another run
            if base is None or "ms" not in found or other:
                continue
            times = {key: found[key] for key in ("ms", "ms_min", "ms_max", "repeats")}
            facts = {key: value for key, value in found.items() if not key.startswith("baseline") and key not in times}
            twins.append(row(times, "vllm-dense", base, **facts))
        results["rows"] = own + twins
        path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
