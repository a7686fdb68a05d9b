"""What is measured of one engine: single prompts and their decode steps, many requests at once, and a load."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from served.engine import Answer, Engine, together
from served.models import BLOCKS_OF_ALL
from served.rows import arrivals, concurrency, latencies, spread

#: Steps that one time of a decode step is the mean of, and how many such times a prompt gives.
STEPS, BLOCKS = 64, 3
#: After so many seconds a prompt is not repeated more than once.
LONG = 20.0

Rows = list[dict[str, Any]]
Measure = tuple[str, Callable[[], Awaitable[Rows]]]


def plan(engine: Engine, name: str, args: Any) -> list[Measure]:
    """List what to measure of an engine, each with its name, in the order in which it is measured."""
    asked = {"fixed": args.measure_fixed, "blocks": ["prefill"]}.get(name, args.measure)
    facts = dict(shape=args.shape, engine="vllm" if name == "stock" else "flux-vllm", block_size=engine.page)
    method = {"stock": "dense", "fixed": "static"}.get(name, "routed-ends")
    own = dict(facts, method=method, sparsity=engine.omega or 0.0)
    if name == "blocks":
        own |= {"full": "block_sparse", "select": BLOCKS_OF_ALL.select, "threshold": BLOCKS_OF_ALL.threshold}
    kinds = [("", None, own)]
    if name == "routed" and "full" in args.engines:
        kinds.append((", all layers full", "full", dict(facts, method="dense", sparsity=0.0)))
    lengths = {"prefill": args.prefill_lengths, "decode": args.decode_lengths}
    lengths = {phase: some if phase in asked else [] for phase, some in lengths.items()}
    found: list[Measure] = []
    for length in sorted({*lengths["prefill"], *lengths["decode"]}):
        phases = [phase for phase in lengths if length in lengths[phase]]
        for suffix, routes, row in kinds:
            run = partial(one_prompt, engine, length, phases, args.repeats, routes, row)
            found.append((f"{' and '.join(phases)} of {length}{suffix}", run))
    if found and len(kinds) > 1:
        found.append(("short prompts, so that forced routes are forgotten", partial(_settle, engine)))
    ran: dict[int, dict[str, Any]] = {}
    if "throughput" in asked:
        for new in args.outputs:
            run = partial(throughput, engine, args.prompt, new, args, own, ran)
            found.append((f"throughput of {args.prompt} + {new}", run))
    if "concurrency" in asked:
        found.append((f"concurrency of {args.prompt}", partial(held, engine, args, own, ran)))
    if "load" in asked:
        if name == "stock" and args.rate is None:
            run = partial(capacity, engine, args, own)
            found.append((f"throughput of {args.load_prompt} + {args.load_output}, for the load's rate", run))
        found.append((f"load of {args.load_prompt} + {args.load_output}", partial(load, engine, args, own)))
    return found


async def _settle(engine: Engine) -> Rows:
    await engine.settle()
    return []


async def one_prompt(
    engine: Engine, length: int, phases: list[str], repeats: int, routes: str | None, facts: dict[str, Any]
) -> Rows:
    """Measure the time to the first token of a prompt alone, and of the first one's decode steps."""
    prefill, steps, began = [], [], time.perf_counter()
    for repeat in range(repeats if "prefill" in phases else 1):
        if repeat > 1 and time.perf_counter() - began > LONG:
            break
        new = 1 + (STEPS * BLOCKS if "decode" in phases and not steps else 0)
        answer = await engine.ask(engine.prompt(length, repeat), new, routes)
        prefill.append(answer.ttft_ms)
        for first in range(0, new - 1, STEPS):
            steps.append(1000 * (answer.times[first + STEPS] - answer.times[first]) / STEPS)
    times = {"prefill": prefill, "decode": steps}
    if "full" in facts:
        facts = dict(facts, density=await engine.density(length))
    return [dict(facts, seq_len=length, batch=1, phase=phase, **spread(times[phase])) for phase in phases]


async def _together(engine: Engine, length: int, new: int, count: int) -> tuple[list[Answer], dict[str, Any]]:
    """Ask all at once; return the answers, and what a row says of them."""
    engine.recorder.steps.clear()
    began = time.perf_counter()
    answers = await together(engine.ask(engine.prompt(length, row), new) for row in range(count))
    ended = time.perf_counter()
    return answers, _served(engine, answers, length, new, began, ended)


def _served(engine: Engine, answers: list[Answer], length: int, new: int, began: float, ended: float) -> dict[str, Any]:
    seconds = ended - began
    return dict(
        phase="serve", seq_len=length, requests=len(answers), prompt_tokens=length, output_tokens=new,
        seconds=round(seconds, 2), requests_per_s=round(len(answers) / seconds, 5),
        tokens_per_s=round(len(answers) * new / seconds, 3),
        **latencies("ttft_ms", [answer.ttft_ms for answer in answers]),
        **latencies("tpot_ms", [answer.tpot_ms for answer in answers if len(answer.times) > 1]),
        **concurrency(engine.recorder.steps, ended),
    )  # fmt: skip


def _count(engine: Engine, tokens: int, times: float) -> int:
    """Count the requests that fill the KV cache so many times."""
    return max(2, math.ceil(times * min(engine.fits(tokens), engine.args.max_seqs)))


async def throughput(
    engine: Engine, length: int, new: int, args: Any, facts: dict[str, Any], ran: dict[int, dict[str, Any]]
) -> Rows:
    """Measure as many requests as fill the card ``args.fill`` times, all asked for at once."""
    count = args.requests or _count(engine, length + new, args.fill)
    _, served = await _together(engine, length, new, count)
    ran[new] = served
    return [dict(facts, measure="throughput", **served)]


async def held(engine: Engine, args: Any, facts: dict[str, Any], ran: dict[int, dict[str, Any]]) -> Rows:
    """Count the requests that run at once: from the longest answers' throughput, or until no more are let in."""
    fits = round(engine.fits(args.prompt + max(args.outputs)), 2)
    row = dict(facts, measure="concurrency", phase="serve", seq_len=args.prompt, prompt_tokens=args.prompt, fits=fits)
    if served := ran.get(max(args.outputs)):
        return [{**row, **{name: served[name] for name in ("requests", "concurrency", "preemptions")}}]
    count = args.requests or _count(engine, args.prompt, 1.3) + 2
    engine.recorder.steps.clear()
    asked = [
        asyncio.create_task(engine.ask(engine.prompt(args.prompt, row), max(args.outputs))) for row in range(count)
    ]
    try:
        while not _full(engine, args) and not any(task.done() for task in asked):
            await asyncio.sleep(0.2)
    finally:
        for task in asked:
            task.cancel()
        done = await asyncio.gather(*asked, return_exceptions=True)
    if errors := [error for error in done if isinstance(error, Exception)]:  # a cancelled one is none
        raise errors[0]
    await asyncio.sleep(1)  # until the engine has let go of them
    counted = concurrency(engine.recorder.steps, time.perf_counter())
    return [{**row, "requests": count, **{name: counted[name] for name in ("concurrency", "preemptions")}}]


def _full(engine: Engine, args: Any) -> bool:
    """Whether some wait, and for longer than a prompt takes none was let in."""
    steps = engine.recorder.steps
    last = steps[-(2 * math.ceil(args.prompt / args.chunk) + 5) :]
    return len(steps) > len(last) and last[-1][2] > 0 and len({running for _, running, *_ in last}) == 1


async def capacity(engine: Engine, args: Any, facts: dict[str, Any]) -> Rows:
    """Measure the requests a second of the load's prompts, and set the load's rate to a share of it."""
    count = min(_count(engine, args.load_prompt + args.load_output, 2.0), args.load_requests, 64)
    _, served = await _together(engine, args.load_prompt, args.load_output, count)
    args.rate = round(args.load_share * served["requests_per_s"], 5)
    return [dict(facts, measure="throughput", **served)]


async def load(engine: Engine, args: Any, facts: dict[str, Any]) -> Rows:
    """Measure requests that arrive at random, at ``args.rate`` a second."""
    if args.rate is None:
        raise RuntimeError("the load's rate is not known: the stock engine's throughput was not measured; see --rate")
    when = arrivals(args.load_requests, args.rate)
    prompts = [engine.prompt(args.load_prompt, row) for row in range(len(when))]
    engine.recorder.steps.clear()
    began = time.perf_counter()

    async def one(prompt: list[int], at: float) -> Answer:
        await asyncio.sleep(began + at - time.perf_counter())
        answer = await engine.ask(prompt, args.load_output)
        answer.asked = began + at
        return answer

    answers = await together(map(one, prompts, when))
    served = _served(engine, answers, args.load_prompt, args.load_output, began, time.perf_counter())
    return [dict(facts, measure="load", rate=args.rate, **served)]
