"""Makes the tables of docs/serving.md, from serving.json."""

from show_blocks import digits
from show_tables import load, table

#: What a row of the table shows: the phase, its unit, and what its numbers are divided by for it.
PHASES = {"prefill": ("s", 1000), "decode": ("ms", 1)}


def _cell(row, scale):
    if row is None:
        return "–"
    found = f"{row['ms'] / scale:.3g}"
    return f"{found} (× {row['baseline_ms'] / row['ms']:.2f})" if "baseline_ms" in row else found


def speed_table():
    """Return single prompts and their decode steps, with routes and without, beside stock vLLM."""
    rows = [row for row in load("serving")["rows"] if row["phase"] in PHASES]
    lines = []
    for phase, (unit, scale) in PHASES.items():
        for length in sorted({row["seq_len"] for row in rows if row["phase"] == phase}):
            mine = [row for row in rows if (row["phase"], row["seq_len"]) == (phase, length)]
            found = {(row["engine"], row["method"], "full" in row): row for row in mine}
            engines = [
                ("vllm", "dense", False), ("flux-vllm", "routed-ends", False), ("flux-vllm", "routed-ends", True),
                ("flux-vllm", "dense", False),
            ]  # fmt: skip
            name = {"prefill": "prompt", "decode": "decode step behind"}[phase]
            lines.append([f"{name} {length:,}, {unit}", *(_cell(found.get(engine), scale) for engine in engines)])
    columns = ["stock vLLM", "routed, Ω_MSR 0.75", "so, full layers block-sparse", "all layers forced full"]
    return table(["tokens", *columns], lines)


def load_table():
    """Return what requests that arrive at random wait, with routes and without."""
    rows = [row for row in load("serving")["rows"] if row.get("measure") == "load"]
    lines = []
    for row in sorted(rows, key=lambda row: row["engine"] != "vllm"):
        waits = [_wait(row, f"{what}{tail}") for what in ("ttft_ms", "tpot_ms") for tail in ("", "_p95")]
        name = "stock vLLM" if row["engine"] == "vllm" else "routed, Ω_MSR 0.75"
        lines.append([name, f"{row['rate']:.2f}", *waits, row["concurrency"]])
    columns = [
        "engine", "asked for, requests/s", "first token, ms", "95th percentile", "then a token, ms", "95th percentile",
        "most at once",
    ]  # fmt: skip
    return table(columns, lines)


def _wait(row, name):
    base = row.get(f"baseline_{name}")
    return f"{digits(row[name])}" + (f" (× {row[name] / base:.2f})" if base else "")


def many_table():
    """Return what many requests that are asked for at once get, with routes and without."""
    rows = [row for row in load("serving")["rows"] if row.get("measure") == "throughput"]
    # One that only sets a load's rate has nothing beside it.
    beside = {(row["prompt_tokens"], row["output_tokens"]) for row in rows if row["engine"] != "vllm"}
    lines = []
    for prompt, answer in sorted(beside):
        mine = [row for row in rows if (row["prompt_tokens"], row["output_tokens"]) == (prompt, answer)]
        found = {row["engine"]: row for row in mine}
        for engine, name in (("vllm", "stock vLLM"), ("flux-vllm", "routed, Ω_MSR 0.75")):
            lines.append([f"{prompt:,} + {answer:,}", name, *_many(found.get(engine))])
    columns = [
        "prompt + answer",
        "engine",
        "requests",
        "requests/s",
        "most at once",
        "first token, s",
        "then a token, ms",
    ]
    return table(columns, lines)


def _many(row):
    if row is None:
        return ["not measured", "–", "–", "–", "–"]
    rate = f"{row['requests_per_s']:.3f}" + (f" (× {row['speedup']:.2f})" if "speedup" in row else "")
    waits = f"{row['ttft_ms'] / 1000:.0f}", f"{row['tpot_ms']:.0f}"
    return [row["requests"], rate, row["concurrency"], *waits]
