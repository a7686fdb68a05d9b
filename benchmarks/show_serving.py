"""Makes the tables of docs/serving.md, from serving.json."""

from show_tables import load, table

#: What a row of the table shows: the phase, its unit, and what its numbers are divided by for it.
PHASES = {"prefill": ("s", 1000), "decode": ("ms", 1)}


def _cell(row, scale):
    if row is None:
        return "–"
    found = f"{row['ms'] / scale:.3g}"
    return f"{found} (× {row['speedup']:.2f})" if "speedup" in row else found


def speed_table():
    """Return single prompts and their decode steps, with routes and without, beside stock vLLM."""
    rows = [row for row in load("serving")["rows"] if row["phase"] in PHASES]
    lines = []
    for phase, (unit, scale) in PHASES.items():
        for length in sorted({row["seq_len"] for row in rows if row["phase"] == phase}):
            found = {
                (row["engine"], row["method"]): row for row in rows if (row["phase"], row["seq_len"]) == (phase, length)
            }
            engines = [("vllm", "dense"), ("flux-vllm", "routed-ends"), ("flux-vllm", "dense")]
            name = {"prefill": "prompt", "decode": "decode step behind"}[phase]
            lines.append([f"{name} {length:,}, {unit}", *(_cell(found.get(engine), scale) for engine in engines)])
    return table(["tokens", "stock vLLM", "routed, Ω_MSR 0.75", "all layers forced full"], lines)


def many_table():
    """Return what many requests that are asked for at once get, with routes and without."""
    rows = [row for row in load("serving")["rows"] if row.get("measure") == "throughput"]
    lines = []
    for prompt, answer in sorted({(row["prompt_tokens"], row["output_tokens"]) for row in rows}):
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
