"""Measures what vLLM's scheduler takes of a decode step, stock and routed, in the same run.

Run: ``python benchmarks/serving_scheduler.py``, in vLLM's environment. Scheduling is the host's work, so a CPU will do,
and a model of tiny layers. Engines run one after the other, each in a process of its own, and then once more; the time
is that of planning a step and of reading what came of it, where all requests decode. Prompts are of different lengths,
so that at each step of routed layers about one request enters new pages, and gives others back. Writes
``benchmarks/results/serving_scheduler.json``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from served.rows import joined, latencies, spread
from serving import environment

from flux_attention.results import write_results

ENGINES = "stock", "routed"
SHAPE = "deep"
PAGE, SINK, WINDOW = 64, 64, 256
#: Tokens of the shortest prompt; others are up to a page longer.
LENGTH = 8 * PAGE


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/serving_scheduler.json")
    parser.add_argument("--child", choices=ENGINES, help=argparse.SUPPRESS)
    return parser.parse_args()


def timed(scheduler, requests):
    """Note the milliseconds of each step in which so many requests decode, and nothing else is computed."""
    found, spent = [], {}
    plan, read = scheduler.schedule, scheduler.update_from_output

    def schedule(*args, **kwargs):
        began = time.perf_counter()
        output = plan(*args, **kwargs)
        spent[id(output)] = time.perf_counter() - began
        return output

    def update_from_output(output, *args, **kwargs):
        began = time.perf_counter()
        result = read(output, *args, **kwargs)
        seconds = spent.pop(id(output)) + time.perf_counter() - began
        if list(output.num_scheduled_tokens.values()) == [1] * requests:
            found.append(1000 * seconds)
        return result

    scheduler.schedule, scheduler.update_from_output = schedule, update_from_output
    return found


def child(args):
    """Run one engine, and print its times as JSON in the last line."""
    from served.models import make_model, make_ranking
    from vllm import LLM, SamplingParams, __version__

    from flux_attention.serving import plugin
    from flux_attention.serving.settings import KEY

    lengths = [LENGTH + row % PAGE for row in range(args.requests)]
    longest = max(lengths) + args.steps + 32
    with tempfile.TemporaryDirectory() as folder:
        base = make_model(Path(folder) / "model", SHAPE, longest, "float32")
        routed = {}
        if args.child == "routed":
            plugin.register()  # also in a checkout that is not installed
            make_ranking(Path(folder) / "adapter", base, args.sparsity, SINK, WINDOW)
            routed = {"additional_config": {KEY: {"routers": f"{folder}/adapter"}}}
        model = LLM(
            f"{folder}/model", load_format="dummy", skip_tokenizer_init=True, dtype="float32", block_size=PAGE,
            max_model_len=longest, max_num_seqs=args.requests, max_num_batched_tokens=8192, enforce_eager=True,
            enable_prefix_caching=False, **routed,
        )  # fmt: skip
        found = timed(model.llm_engine.engine_core.engine_core.scheduler, args.requests)
        prompts = [{"prompt_token_ids": [10 + place % 900 for place in range(length)]} for length in lengths]
        model.generate(prompts, SamplingParams(max_tokens=args.steps, ignore_eos=True, detokenize=False))
    print(json.dumps({"vllm": __version__, "layers": base.num_layers, "steps": [round(ms, 4) for ms in found]}))


def main():
    args = arguments()
    if args.child:
        return child(args)
    known = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    found = {name: [] for name in ENGINES}
    for repeat in range(args.repeats):
        for name in ENGINES:
            print(f"{name}, {repeat + 1} of {args.repeats} …", flush=True)
            command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
            done = subprocess.run(command, env=environment() | known, stdout=subprocess.PIPE, check=True, text=True)
            told = json.loads(done.stdout.splitlines()[-1])
            found[name].append(told["steps"])
    rows = []
    for name, runs in found.items():
        every = [ms for run in runs for ms in run]
        own = dict(engine="vllm", method="dense", sparsity=0.0)
        if name != "stock":
            own = dict(engine="flux-vllm", method="static", sparsity=args.sparsity)
        own |= dict(shape=SHAPE, seq_len=LENGTH, batch=args.requests, phase="decode", measure="scheduler")
        own |= dict(layers=told["layers"], steps=len(every), **spread([median(run) for run in runs]))
        rows.append(own | latencies("ms", every))
    rows = joined(rows)
    print(*rows, sep="\n")
    settings = dict(page=PAGE, sink=SINK, window=WINDOW, repeats=args.repeats)
    write_results(args.output, rows, vllm=told["vllm"], settings=settings)


if __name__ == "__main__":
    main()
