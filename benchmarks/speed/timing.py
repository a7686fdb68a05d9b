"""Times runs in turn on a GPU, by device events or in CUDA graphs; knows the hardware's ceilings; makes result rows."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch

from flux_attention import kernels
from flux_attention.hf.capture import without_collection
from flux_attention.patterns import Streaming

#: What is measured: sparse layers' pattern, and the precision of weights and states.
PATTERN = Streaming(128, 1024)
DTYPE = torch.bfloat16


def require_gpu() -> None:
    """Raise RuntimeError unless there is a GPU to measure on."""
    if not kernels.has_triton(torch.device("cuda")):
        raise RuntimeError(
            "speed is measured on an NVIDIA GPU of compute capability 8.0 or newer, with Triton, and there is none here"
        )


def measure(
    run: Callable[[], Any], seconds: float = 0.4, min_repeats: int = 3, max_repeats: int = 50, warm: int = 2
) -> dict[str, float]:
    """Time ``run`` by device events, ``min_repeats`` times or for about ``seconds``: median, least and most ms."""
    return measure_in_turn([run], seconds, min_repeats, max_repeats, warm)[0]


def measure_in_turn(
    runs: Sequence[Callable[[], Any]],
    seconds: float = 0.4,
    min_repeats: int = 3,
    max_repeats: int = 50,
    warm: int = 2,
    before: Sequence[Callable[[], Any]] | None = None,
) -> list[dict[str, float]]:
    """
    Time several runs in turn, as ``measure`` does one: what changes meanwhile, as the clock does, changes for all.

    Each of ``before`` prepares its run, untimed.
    """
    before = before or [lambda: None] * len(runs)
    for prepare, run in [*zip(before, runs, strict=True)] * warm:
        prepare()
        run()
    torch.cuda.synchronize()
    times: list[list[float]] = [[] for _ in runs]
    order, shuffle = list(zip(before, runs, times, strict=True)), random.Random(0).shuffle
    with without_collection():  # which takes hundreds of milliseconds of the host's time
        while len(times[0]) < max_repeats and (len(times[0]) < min_repeats or sum(map(sum, times)) < 1000 * seconds):
            shuffle(order)  # what ran before has a part in how long a run takes
            for prepare, run, found in order:
                prepare()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                end.synchronize()
                found.append(begin.elapsed_time(end))
    return [
        {"ms": statistics.median(found), "ms_min": min(found), "ms_max": max(found), "repeats": len(found)}
        for found in times
    ]


def measure_graph(run: Callable[[], Any], launches: int = 20) -> dict[str, float]:
    """Time ``run`` without the host's share: milliseconds of one of ``launches`` launches in a CUDA graph."""
    return measure_graphs([run], launches)[0]


def measure_graphs(runs: Sequence[Callable[[], Any]], launches: int) -> list[dict[str, float]]:
    """Time several runs in turn, as ``measure_graph`` does one."""
    replays, stream = [], torch.cuda.Stream()
    for run in runs:
        with torch.cuda.stream(stream):
            run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(launches):
                run()
        replays.append(graph.replay)
    return [
        {name: value if name == "repeats" else value / launches for name, value in times.items()}
        for times in measure_in_turn(replays, seconds=0.2)
    ]


@lru_cache
def ceilings() -> dict[str, float]:
    """Measure what this device reaches: copy bandwidth in TB/s (read and written), bf16 matrix products in TFLOP/s."""
    size = 2**31
    source, target = (torch.zeros(size // 4, device="cuda") for _ in range(2))
    # By a kernel that reads and writes: a captured memcpy reached two thirds of that rate on an H200.
    copy = measure_graph(partial(torch.neg, source, out=target), launches=5)["ms"]
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    product = measure_graph(partial(torch.matmul, left, right), launches=5)["ms"]
    return {"copy_tbps": 2 * size / copy / 1e9, "matmul_tflops": 2 * 8192**3 / product / 1e9}


def floor_ms(work: float, ceiling: str) -> float:
    """Return the milliseconds of FLOPs or bytes at one of the ``ceilings``."""
    return work / ceilings()[ceiling] / 1e9


def row(times: dict[str, float], baseline: str, base: dict[str, float] | None, **facts: Any) -> dict[str, Any]:
    """Make a result row: ``facts``, ``times``, and the baseline of the same run."""
    numbers = {name: round(value, 5) if isinstance(value, float) else value for name, value in times.items()}
    result = {**facts, **numbers}
    if base is not None:
        result |= {
            "baseline": baseline,
            "baseline_ms": round(base["ms"], 5),
            "baseline_ms_min": round(base["ms_min"], 5),
            "baseline_ms_max": round(base["ms_max"], 5),
            "speedup": round(base["ms"] / times["ms"], 3),
        }
    return result
