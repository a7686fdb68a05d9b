"""Asks a server of the shipped model hundreds of things at once, and looks for what is lost, mixed up or left behind.

Run: ``python benchmarks/serving_soak.py --serve`` starts ``vllm serve`` with routes and so few pages that requests make
way for others, and stops it at the end; ``--url URL --pid PID`` asks a server that runs already, under the name
``shipped``. Requests are of random lengths and routes, whole or streamed; some clients leave in the middle, some send
nonsense. ``--restart-every N`` kills the server after each N requests and starts it again.

It fails if a request is lost, if nonsense is not refused (by 4xx; for bodies that are no object vLLM itself says 500),
if an answer holds another request's code, or is wrong with all layers full, and is not so alone, if one differs from
what was answered alone before (in float32; in other dtypes rounding depends on what else runs: if one that was right is
not), if pages are still in use at the end, if the processes of the server still grow (of the last one, if some were
killed), and, with ``--serve``, if no request made way for another. What follows ``--`` goes to ``vllm serve``, on a CPU
``--dtype float32 -- --enforce-eager``.
"""

import argparse
import asyncio
import copy
import random
import signal
import sys
import time
from pathlib import Path

import aiohttp
from served.server import Served, Server
from served.soak import (
    ANSWERED,
    FAILED,
    LEAVE_STREAM,
    LEAVE_WHOLE,
    Ask,
    Client,
    accuracy,
    crowd,
    fates,
    make_asks,
    suspicious,
)
from transformers import AutoTokenizer

from flux_attention.names import BACKBONE
from flux_attention.results import write_results
from flux_attention.tasks.samples import Haystack
from flux_attention.tasks.text import local_texts

LAYERS = 10


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", help="of a server that runs already")
    add("--pid", type=int, help="its process, whose memory is looked at")
    add("--serve", action="store_true", help="start one")
    add("--requests", type=int, default=300)
    add("--clients", type=int, default=16)
    add("--alone", type=int, default=20, help="requests that are asked alone first")
    add("--restart-every", type=int, metavar="N", help="kill the server after each N requests")
    add("--limit", type=float, default=3600, help="seconds after which no more is asked")
    add("--patience", type=float, default=600, help="seconds that one answer may take")
    add("--growth", type=float, default=0.02, help="share by which the server's memory may grow in the second half")
    add("--seed", type=int, default=0)
    add("--context", type=int, default=2048, help="tokens of the longest request")
    add("--room", type=float, default=2.5, help="the KV cache, in longest requests that run full")
    add("--page", type=int, default=32)
    add("--chunk", type=int, default=512, help="tokens of a step")
    add("--dtype", default="auto", help="with --url: what the server was started with")
    add("--no-debug", action="store_true", help="do not spoil pages that are given back")
    add("--folder", type=Path, default=Path("runs/soak"), help="for the server's log, and soak.json, which says it all")
    add("options", nargs="*", help="of vllm serve, after --")
    args = parser.parse_args()
    if (args.url is None) != args.serve:
        parser.error("expected one of --url and --serve")
    if args.restart_every and not args.serve:
        parser.error("--restart-every kills a server that --serve started")
    return args


def make_server(args):
    if args.url:
        return Server(args.url, args.pid)
    pages = round(args.room * LAYERS * -(-args.context // args.page)) + 1
    options = ["--max-model-len", args.context, "--block-size", args.page, "--num-gpu-blocks-override", pages]
    options += ["--max-num-batched-tokens", args.chunk, "--max-num-seqs", 4 * args.clients, "--dtype", args.dtype]
    return Served(args.folder, {"routers": "shipped", "debug": not args.no_debug}, [*map(str, options), *args.options])


class Soak:
    """
    Runs the soak.

    Attributes
    ----------
    faults : list of str
        What is wrong.
    """

    def __init__(self, args, server):
        self.args, self.server, self.began = args, server, time.monotonic()
        self.faults, self.preemptions, self.restarts, self.told, self.dead = [], 0, 0, 0.0, False
        self.client, self.memory, self.half_way = None, [], args.requests // 2

    def say(self, text):
        print(f"[{time.monotonic() - self.began:5.0f} s] {text}", flush=True)

    def fault(self, text):
        self.faults.append(text)
        self.say(f"FAULT: {text}")

    async def run(self):
        """Ask all, and return whether nothing is wrong."""
        args = self.args
        tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
        haystack = Haystack(local_texts(False, max_chars=300_000), tokenizer)
        warm = max(2 * args.clients, args.requests // 4)
        asks = make_asks(warm + args.requests, args.context, tokenizer, haystack, random.Random(args.seed))
        warming, asks = asks[:warm], asks[warm:]
        if args.serve:
            self.say(f"starting a server; its log is {self.server.log}")
            self.say(f"started in {self.server.start():.0f} s")
        timeout = aiohttp.ClientTimeout(total=args.patience)
        # No connection is used twice: one of a server that was killed would break the next request.
        async with aiohttp.ClientSession(
            timeout=timeout, connector=aiohttp.TCPConnector(limit=0, force_close=True)
        ) as session:
            self.client = Client(self.server.url, session)
            self.client.up.set()
            await self.ask_alone(asks)
            self.say(f"{len(warming)} requests to warm up")
            await crowd(self.client, warming, args.clients, self.tell, self.began + args.limit)
            await self.quiet()
            self.memory = [self.server.memory()]
            self.say(f"{len(asks)} requests by {args.clients} clients" + _megabytes(self.memory[0]))
            await crowd(self.client, asks, args.clients, self.progress, self.began + args.limit)
            await self.quiet()
            self.judge_memory()
            await self.judge([*warming, *asks])
        return not self.faults

    async def ask_alone(self, asks):
        """Ask some requests while nobody else does."""
        some = [ask for ask in asks if ask.code and ask.manner not in (LEAVE_WHOLE, LEAVE_STREAM)][: self.args.alone]
        for ask in some:
            ask.alone = (await self.once(ask)).text
        self.say(f"asked {len(some)} alone")

    async def once(self, ask):
        alone = Ask(ask.body, ask.code, ask.manner, omega=ask.omega)
        await self.client.ask(alone)
        if alone.fate != ANSWERED:
            self.fault(f"a request alone: {alone.fate}, {alone.reason}")
        return alone

    async def tell(self, done):
        """Tell how far it is now and then, and return whether the server is still there."""
        if self.dead or time.monotonic() < self.told + 10 or not self.client.up.is_set():
            return not self.dead
        self.told, epoch = time.monotonic(), self.client.epoch
        try:
            if not await asyncio.to_thread(self.server.alive):
                raise OSError("it says that it is not well")
            found = await asyncio.to_thread(self.server.metrics)
        except OSError as error:
            if epoch == self.client.epoch:
                self.dead = True
                self.fault(f"the server died by itself ({error}); what it said is in its log")
            return not self.dead
        self.say(
            f"{done} done; {found['vllm:num_requests_running']:.0f} running, "
            f"{found['vllm:num_requests_waiting']:.0f} waiting, {found['vllm:kv_cache_usage_perc']:.0%} of the "
            f"pages in use, {found['vllm:num_preemptions_total']:.0f} made way" + _megabytes(self.server.memory())
        )
        return True

    async def progress(self, done):
        """Do as ``tell``, and kill the server now and then."""
        every, client = self.args.restart_every, self.client
        if done == self.half_way:
            self.memory.append(await asyncio.to_thread(self.server.memory))
        if not every or done % every or done >= self.args.requests:
            return await self.tell(done)
        self.preemptions += self.server.metrics()["vllm:num_preemptions_total"]
        client.up.clear()
        client.epoch += 1
        self.server.kill()
        self.restarts += 1
        seconds = await asyncio.to_thread(self.server.start)
        self.say(f"killed the server after {done} were done, started it again in {seconds:.0f} s")
        self.memory, self.half_way = [self.server.memory()], (done + self.args.requests) // 2
        client.up.set()
        return True

    async def quiet(self):
        """Wait until nothing runs and no page is in use: vLLM tells how many are when it runs a step."""
        names, left = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"), None
        for _ in range(0 if self.dead else 30):
            await self.once(Ask({"model": "shipped", "prompt": [5, 6, 7], "max_tokens": 2}, ""))
            await asyncio.sleep(1)
            found = await asyncio.to_thread(self.server.metrics)
            if not any(left := [found[name] for name in names]):
                return
        self.fault(f"after all is answered, requests running, waiting and share of pages in use are {left}")

    def judge_memory(self):
        """Compare the memory of the server's processes with what it was half-way: until then they fill buffers."""
        self.memory.append(self.server.memory())
        if len(self.memory) < 3 or None in self.memory or self.dead:
            self.say("memory is not judged: there is no --pid, or too little was asked")
            return
        self.say("memory of the server's processes at the start, half-way and in the end"
                 + "".join(map(_megabytes, self.memory)))  # fmt: skip
        _, before, after = self.memory
        if after > before * (1 + self.args.growth):
            self.fault(f"the server's processes grew by {after / before - 1:.1%}")

    async def judge(self, asks):
        """Look at what became of all, and say it."""
        for ask in suspicious(asks, 4 * self.args.clients):  # what is wrong by chance is so alone, too
            again = None if self.dead else (await self.once(ask)).first_line
            if again != ask.first_line:
                self.fault(f"asked for {ask.code}, answered {ask.first_line!r}, alone {again!r}")
        both = [ask for ask in asks if ask.alone is not None and ask.fate == ANSWERED]
        differ = [ask for ask in both if (ask.text != ask.alone if self.args.dtype == "float32" else ask.lost_alone)]
        for ask in differ:
            self.say(f"differs from alone: code {ask.code}, {ask.text[:40]!r}, alone {ask.alone[:40]!r}")
        if differ:
            self.fault(f"{len(differ)} answers differ from what they were alone")
        for ask in asks:
            if ask.asked and ask.fate in (None, FAILED):
                self.fault(f"{ask.manner}: {ask.fate or 'LOST'}, {ask.reason}; {_short(ask.body)}")
        if not self.dead:
            self.preemptions += (await asyncio.to_thread(self.server.metrics))["vllm:num_preemptions_total"]
        if self.args.serve and not self.preemptions:
            self.fault("no request made way for another: give it fewer pages (--room)")
        self.say(f"what became of them: {fates(asks)}; {sum(not ask.asked for ask in asks)} were not asked")
        self.say(f"right by routes: {accuracy(asks)}")
        self.say(
            f"{len(both)} compared with alone, {len(differ)} differ; {self.preemptions:.0f} made way; "
            f"{self.restarts} restarts; {len(self.faults)} faults"
        )
        self.write(asks, len(both), len(differ))

    def write(self, asks, compared, differ):
        """Write what was said as a result file."""
        args = self.args
        row = dict(
            requests=sum(ask.asked for ask in asks), clients=args.clients, fates=fates(asks), right=accuracy(asks),
            compared=compared, differ=differ, preemptions=int(self.preemptions), restarts=self.restarts,
            memory_mib=[None if size is None else size >> 20 for size in self.memory],
            seconds=round(time.monotonic() - self.began), faults=self.faults,
        )  # fmt: skip
        named = "requests", "alone", "restart_every", "dtype", "context", "room", "page", "chunk", "seed", "options"
        settings = {name: getattr(args, name) for name in named}
        write_results(args.folder / "soak.json", [row], vllm=self.server.version(), settings=settings)


def _megabytes(count):
    return "" if count is None else f", {count / 2**20:.0f} MiB"


def _short(body):
    if isinstance(body, bytes):
        return repr(body)
    body = copy.copy(body)
    if len(body.get("prompt", "")) > 20:
        body["prompt"] = f"{len(body['prompt'])} {'characters' if isinstance(body['prompt'], str) else 'tokens'}"
    return str(body)


def main():
    args = arguments()
    server = make_server(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what stops the server
    try:
        right = asyncio.run(Soak(args, server).run())
    finally:
        if args.serve:
            print(f"the server ended with {server.stop()}", flush=True)
    print("all is well" if right else "there are faults", flush=True)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
