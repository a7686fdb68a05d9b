"""Measures routed vLLM beside stock vLLM, with random weights, on the same card in the same run.

Run: ``python benchmarks/serving.py`` on a GPU with vLLM. Engines are started one after the other, each in a process of
its own: ``stock``; ``routed``, whose routers read each prompt's ends and decide the same for all, and which with
``full`` also runs prompts with all layers forced full; ``blocks``, the same routers where full layers read prompts
block-sparse (measured by prompts alone); ``fixed``, with a fixed set of layers. Each measurement is written to
``benchmarks/results/serving.json`` as soon as it is there.

decode       milliseconds of a decode step of one sequence: means of 64 steps
prefill      milliseconds to the first token of one prompt
throughput   requests and output tokens a second of many requests asked for at once
concurrency  requests that run at once: at most in the throughput's longest answers, or until no more are let in
load         requests that arrive at random, at a share of what the stock engine can do: time to the first token and
             per further token, median and 95th percentile

``--limit`` is for the whole; what it leaves no time for is named at the end. On a CPU:
``--shape tiny --eager --dtype float32 --chunk 256 --prompt 512 …``.
"""

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from served.rows import joined

from flux_attention.results import earlier_rows, merged, write_results
from flux_attention.serving.settings import VARIABLE

ENGINES = "stock", "routed", "full", "blocks", "fixed"
MEASURES = "decode", "prefill", "throughput", "concurrency", "load"
#: No look-ups on the network, and a sampler that needs no compiler.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", "PYTHONUNBUFFERED": "1",
}  # fmt: skip
#: Arguments that say nothing of what was measured.
NO_FACTS = ("child", "until", "pipe", "results", "logs")
#: Seconds that an engine may take beyond the limit to stop, and be silent before it is given up.
GRACE, SILENCE = 20, 300


def environment():
    """Return an engine's environment: this process's, but for an adapter that it may name."""
    return {**ENVIRONMENT, **{key: value for key, value in os.environ.items() if key != VARIABLE}}


def tokens(text):
    """Read ``64K`` as 65,536."""
    return 1024 * int(text[:-1]) if text[-1] in "kK" else int(text)


def many(kind, known=None):
    def read(text):
        found = [kind(one) for one in text.split(",") if one]
        if known and (unknown := sorted(set(found) - set(known))):
            raise argparse.ArgumentTypeError(f"unknown {unknown}, expected some of {list(known)}")
        return found

    return read


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--engines", type=many(str, ENGINES), default=list(ENGINES))
    add("--measure", type=many(str, MEASURES), default=list(MEASURES))
    add("--measure-fixed", type=many(str, MEASURES), default=["decode", "prefill"], help="of the fixed engine")
    add("--results", type=Path, default=Path(__file__).parent / "results")
    add("--logs", type=Path, default=Path("runs/serving"), help="folder for what the engines say")
    add("--limit", type=float, default=3600, help="seconds for all of it")
    add("--earlier-stock", action="store_true", help="compare with stock rows of an earlier call, too")

    add("--shape", default="qwen3-8b")
    add("--sparsity", type=float, default=0.75)
    add("--sink", type=int, default=128)
    add("--window", type=int, default=1024)
    add("--dtype", default="bfloat16")
    add("--eager", action="store_true", help="no compiled layers and no CUDA graphs")
    add("--memory", type=float, default=0.9, help="share of the card's memory")
    add("--chunk", type=tokens, default=8192, help="tokens of a step (max_num_batched_tokens)")
    add("--max-seqs", type=int, default=128)
    add("--page", type=int, help="tokens of a page; default: vLLM's own")
    add("--routed-page", type=int, default=64, help="the same for routed engines; 0: as --page")
    add("--pages", type=int, help="pages of the stock engine's KV cache; routed: the same room")

    add("--prefill-lengths", type=many(tokens), default="8K,32K,128K,256K")
    add("--decode-lengths", type=many(tokens), default="128K,256K")
    add("--repeats", type=int, default=3)
    add("--prompt", type=tokens, default="64K", help="tokens of throughput's and concurrency's prompts")
    add("--outputs", type=many(tokens), default="256,2048", help="tokens of throughput's answers")
    add("--fill", type=float, default=2.0, help="throughput: requests, in fillings of the engine's own KV cache")
    add("--requests", type=int, help="throughput and concurrency: so many requests instead")
    add("--load-prompt", type=tokens, default="16K")
    add("--load-output", type=tokens, default="256")
    add("--load-requests", type=int, default=200)
    add("--load-share", type=float, default=0.7, help="of what the stock engine can do")
    add("--rate", type=float, help="requests a second, instead of a share")
    for hidden in ("--child", "--until", "--pipe"):
        add(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "full" in args.engines and "routed" not in args.engines:
        parser.error("full is measured by the routed engine: add routed to --engines")
    if "load" in args.measure and args.rate is None and "stock" not in args.engines:
        parser.error("the load's rate is a share of what the stock engine can do: add stock to --engines, or --rate")
    args.longest = longest(args)
    return args


def longest(args):
    """Find the longest context that any engine needs; all get the same."""
    asked, more = {*args.measure, *(args.measure_fixed if "fixed" in args.engines else ())}, 256
    found = [2 * args.chunk]
    found += [length + more for length in args.prefill_lengths if "prefill" in asked]
    found += [length + more for length in args.decode_lengths if "decode" in asked]
    if asked & {"throughput", "concurrency"}:
        found.append(args.prompt + max(args.outputs))
    if "load" in asked:
        found.append(args.load_prompt + args.load_output)
    return max(found) + 16


# --- The engines, one after the other ---------------------------------------------------------------------------------


class Run:
    """
    Runs engines, and gathers what they measure.

    Attributes
    ----------
    rows : list of dict
        As engines told them.
    seconds : dict of str to float
        What each measurement took.
    left, failed : list of str
        What there was no time for, and what went wrong.
    """

    def __init__(self, args):
        self.args, self.began = args, time.time()
        self.until, self.path = self.began + args.limit, args.results / "serving.json"
        self.before = earlier_rows(self.path)
        self.stock = [row for row in self.before if row["engine"] == "vllm"] if args.earlier_stock else []
        self.rows, self.seconds, self.left, self.failed, self.facts = [], {}, [], [], {}

    def engine(self, name):
        """Run one engine to its end, or to the time limit."""
        if time.time() > self.until:
            self.left.append(f"{name}: everything")
            return
        self.args.logs.mkdir(parents=True, exist_ok=True)
        log, pending = self.args.logs / f"{name}.log", None
        self.say(name, f"starting, {self.until - time.time():.0f} s left; its log is {log}")
        began = time.time()
        with log.open("w") as file, self.started(name, file) as (process, pipe):
            for message in self.messages(process, pipe, log):
                if message["kind"] == "started":
                    pending, message["seconds"] = list(message["plan"]), time.time() - began
                self.hear(name, message)
                if message["kind"] in ("done", "failed") and message["what"] in pending:
                    pending.remove(message["what"])
        late = time.time() > self.until
        if process.returncode != 0 and not late:
            self.failed.append(f"{name}: the engine ended with {process.returncode}")
            lines = log.read_text(errors="replace").splitlines()
            errors = [text for text in lines if "Error" in text and "Traceback" not in text]
            self.say(name, "\n".join([self.failed[-1] + "; of its log:", *errors[:12], "…", *lines[-12:]]))
        self.left += [f"{name}: {what}" for what in (["everything"] if pending is None else pending)]
        self.write()

    @contextlib.contextmanager
    def started(self, name, log):
        """Start an engine's process; it and all its own are gone in the end."""
        reader, writer = os.pipe()
        told = ["--child", name, "--until", str(self.until), "--pipe", str(writer)]
        told += [] if self.args.rate is None else ["--rate", str(self.args.rate)]
        process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], *told],
            stdout=log, stderr=log, env=environment(), pass_fds=[writer], start_new_session=True,
        )  # fmt: skip
        os.close(writer)
        try:
            with os.fdopen(reader, "rb", buffering=0) as pipe:
                yield process, pipe
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def messages(self, process, pipe, log):
        """Yield what an engine tells, until it ends, is late, or says nothing any more."""
        rest, heard = b"", time.time()
        while True:
            ready, _, _ = select.select([pipe], [], [], 1)
            some = os.read(pipe.fileno(), 1 << 20) if ready else b""
            *lines, rest = (rest + some).split(b"\n")
            yield from map(json.loads, lines)
            if some:
                heard = time.time()
            elif process.poll() is not None:
                return
            elif time.time() > self.until + GRACE:
                self.say("", "stopping it: the time is over")
                return
            elif time.time() > max(heard, log.stat().st_mtime) + SILENCE:
                self.say("", f"stopping it: it said nothing for {SILENCE} s")
                return

    def hear(self, name, message):
        """Take one message of an engine."""
        what = message.get("what", "start")
        if message["kind"] in ("started", "done"):
            self.seconds[f"{name}: {what}"] = round(message["seconds"], 1)
        if message["kind"] == "started":
            self.facts[name] = message["facts"]
            self.say(name, f"started in {message['seconds']:.0f} s: {message['facts']}")
        elif message["kind"] == "begin":
            self.say(name, f"{what} …")
        elif message["kind"] == "beat":
            self.say(name, f"  {message['running']} running, {message['waiting']} waiting")
        elif message["kind"] == "failed":
            self.failed.append(f"{name}: {what}: {message['error']}")
            self.say(name, f"{what} failed: {message['error']}")
        else:
            self.rows += message["rows"]
            self.args.rate = message["rate"]
            for row in joined(self.stock + self.rows)[len(self.stock + self.rows) - len(message["rows"]) :]:
                self.say(name, line(row))
            self.say(name, f"{what}: {message['seconds']:.1f} s")
            if message["rows"]:
                self.write()

    def say(self, name, text):
        print(f"[{time.time() - self.began:5.0f} s] {name + ': ' if name else ''}{text}", flush=True)

    def write(self):
        """Write what there is."""
        rows = joined(self.stock + self.rows)[len(self.stock) :]
        self.args.results.mkdir(parents=True, exist_ok=True)
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.args).items()}
        settings = {key: value for key, value in settings.items() if key not in NO_FACTS}
        write_results(
            self.path, merged(self.before, rows), vllm=version("vllm"), settings=settings, engines=self.facts,
            seconds=self.seconds, left_out=self.left, failed=self.failed,
        )  # fmt: skip


def line(row):
    """Say a row in words."""
    head = f"{row['method']} {row['phase']} {row.get('measure', '')}".strip() + f" {row['seq_len']}"
    if "output_tokens" in row:
        head += f" + {row['output_tokens']}"
    words = []
    for name, unit in (
        ("ms", "ms"), ("requests_per_s", "requests/s"), ("tokens_per_s", "tokens/s"), ("ttft_ms", "ms TTFT"),
        ("ttft_ms_p95", "ms at the 95th"), ("tpot_ms", "ms a token"), ("tpot_ms_p95", "ms at the 95th"),
        ("concurrency", "at once"), ("concurrency_mean", "on average"), ("preemptions", "made to wait again"),
    ):  # fmt: skip
        if name in row:
            base = f" (stock {row[f'baseline_{name}']:.5g})" if f"baseline_{name}" in row else ""
            words.append(f"{row[name]:.5g} {unit}{base}")
    return f"{head}: " + ", ".join(words) + (f": × {row['speedup']}" if "speedup" in row else "")


def main():
    args = arguments()
    if args.child:
        from served.child import run  # which needs vLLM

        run(args)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what stops the engine
    run = Run(args)
    for name in ENGINES:
        if name in args.engines and name != "full":
            run.engine(name)
    print("\n".join(line(row) for row in joined(run.stock + run.rows)[len(run.stock) :]))
    for title, some in (("no time for", run.left), ("failed", run.failed)):
        if some:
            print(f"{title}:", *some, sep="\n  ")
    sys.exit(1 if run.failed else 0)


if __name__ == "__main__":
    main()
