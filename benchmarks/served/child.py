"""Runs one engine in a process of its own: measures what there is time for, and tells the parent line by line."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from served.engine import Engine
from served.measures import plan

#: Seconds between two lines while something is measured.
BEAT = 10

Tell = Callable[..., None]


def run(args: Any) -> None:
    """Measure the engine ``args.child`` until ``args.until``, and write JSON lines to the file ``args.pipe``."""
    with os.fdopen(int(args.pipe), "w", buffering=1) as pipe:
        os.set_inheritable(pipe.fileno(), False)

        def tell(kind: str, **what: Any) -> None:
            pipe.write(json.dumps({"kind": kind, **what}) + "\n")

        asyncio.run(_run(args, tell))


async def _run(args: Any, tell: Tell) -> None:
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(args.child, args, Path(folder))
        beat = asyncio.create_task(_tell_now_and_then(engine, tell))
        try:
            measures = plan(engine, args.child, args)
            fits = {length: round(engine.fits(length), 2) for length in (args.prompt, args.longest)}
            facts = {"pages": engine.pages, "page": engine.page, "requests_that_fit": fits}
            tell("started", facts=facts, plan=[what for what, _ in measures])
            forced = ["full"] if args.child == "routed" and "full" in args.engines else []
            await _measure("warm-up", lambda: engine.warm([None, *forced]), args, tell)
            for what, measure in measures:
                await _measure(what, measure, args, tell)
                if engine.llm.errored:
                    raise engine.llm.dead_error
        finally:
            beat.cancel()
            engine.llm.shutdown()


async def _measure(what: str, measure: Callable[[], Awaitable[list | None]], args: Any, tell: Tell) -> None:
    began, left = time.time(), float(args.until) - time.time()
    if left <= 0:
        return
    tell("begin", what=what)
    try:
        rows = await asyncio.wait_for(measure(), left)
    except asyncio.TimeoutError:
        return
    except Exception as error:
        traceback.print_exc()
        tell("failed", what=what, error=f"{type(error).__name__}: {error}")
    else:
        tell("done", what=what, seconds=time.time() - began, rows=rows or [], rate=args.rate)


async def _tell_now_and_then(engine: Engine, tell: Tell) -> None:
    while True:
        await asyncio.sleep(BEAT)
        if engine.recorder.steps:
            _, running, waiting, _ = engine.recorder.steps[-1]
            tell("beat", running=running, waiting=waiting)
