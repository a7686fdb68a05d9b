"""Makes result rows of served requests, and sets those of routed engines beside the stock engine's of the same run."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

#: What makes two rows the same measurement, by two engines.
SAME = ("measure", "shape", "seq_len", "batch", "phase", "output_tokens", "rate")
#: The numbers that a routed row repeats from the stock engine's.
COMPARED = (
    "ms", "ms_min", "ms_max", "requests_per_s", "tokens_per_s", "concurrency", "concurrency_mean",
    "ttft_ms", "ttft_ms_p95", "tpot_ms", "tpot_ms_p95",
)  # fmt: skip
#: One step of an engine as its scheduler told it: seconds, requests running, waiting, made to wait again.
Step = tuple[float, int, int, int]


def spread(times: Sequence[float]) -> dict[str, float]:
    """Summarise times in ms as result rows hold them."""
    numbers = {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times)}
    return {**{name: round(value, 4) for name, value in numbers.items()}, "repeats": len(times)}


def latencies(name: str, times: Sequence[float]) -> dict[str, float]:
    """Return median and 95th percentile of times in ms, under ``name`` and ``name_p95``; nothing of no times."""
    if not times:
        return {}
    return {name: round(statistics.median(times), 3), f"{name}_p95": round(float(np.percentile(times, 95)), 3)}


def arrivals(requests: int, rate: float, seed: int = 0) -> list[float]:
    """Draw the seconds at which requests arrive: a Poisson process of ``rate`` a second, the same for a seed."""
    draw, now, found = random.Random(seed), 0.0, []
    for _ in range(requests):
        now += draw.expovariate(rate)
        found.append(now)
    return found


def concurrency(steps: Sequence[Step], end: float) -> dict[str, float]:
    """Return how many requests ran at once: at most, on average over the time up to ``end``; and how often one left."""
    if not steps:
        return {}
    times = [time for time, *_ in steps] + [end]
    lasted = [max(0.0, later - time) for time, later in itertools.pairwise(times)]
    running = [count for _, count, *_ in steps]
    mean = sum(count * seconds for count, seconds in zip(running, lasted, strict=True)) / (sum(lasted) or 1.0)
    return {
        "concurrency": max(running),
        "concurrency_mean": round(mean, 2),
        "preemptions": sum(step[3] for step in steps),
    }


def joined(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Set rows of routed engines beside the stock engine's.

    Parameters
    ----------
    rows : sequence of dict
        As engines told them, the stock engine's with ``engine`` = ``vllm``.

    Returns
    -------
    list of dict
        The same rows. Those with a stock row of the same measurement get its numbers as ``baseline_…``, and
        ``speedup``: of times, or of requests a second where all came at once.
    """

    def what(row):
        return tuple(row.get(fact) for fact in SAME)

    stock = {what(row): row for row in rows if row["engine"] == "vllm"}
    found = []
    for row in rows:
        base = None if row["engine"] == "vllm" else stock.get(what(row))
        if base is None:
            found.append(row)
            continue
        numbers = {f"baseline_{name}": base[name] for name in COMPARED if name in base and name in row}
        found.append({**row, "baseline": "vllm-dense", **numbers, **_speedup(row, base)})
    return found


def _speedup(row: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    if "ms" in row:
        return {"speedup": round(base["ms"] / row["ms"], 3)}
    if row.get("measure") == "throughput":
        return {"speedup": round(row["requests_per_s"] / base["requests_per_s"], 3)}
    return {}
