"""Tables and plots of the speed and memory results.

Run: ``python benchmarks/show_speed.py``. Reads benchmarks/results/, which ``flux-attention bench`` writes; prints
tables, writes those that docs/performance.md and docs/training.md have into them, and the images. What has not been
measured is left out.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
SHAPES = {"qwen3-8b": "Qwen3-8B", "llama-3.1-8b": "Llama-3.1-8B"}
#: Lengths of single layers that the page shows.
SHOWN = tuple(2**10 * thousands for thousands in (4, 32, 128, 256))
COLOURS = {0.0: "#777777", 0.25: "#56b4e9", 0.5: "#0072b2", 0.75: "#d55e00", 0.9: "#cc79a7"}


def load(name):
    path = HERE / f"results/{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"meta": {}, "rows": []}


def label(tokens):
    return f"{tokens // 1024} K"


def draw(name, title, y_label, series, log_y=False, reference=None):
    """Lines over length: {legend: (colour, style, {tokens: value})}."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for legend, (colour, style, points) in series.items():
        axes.plot(list(points), list(points.values()), style, color=colour, label=legend, marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    lengths = sorted({tokens for _, _, points in series.values() for tokens in points})
    axes.set_xticks(lengths, map(label, lengths))
    axes.minorticks_off()
    if log_y:
        axes.set_yscale("log")
    if reference is not None:
        axes.axhline(reference, color="#bbbbbb", linewidth=1)
    axes.set(xlabel="tokens", ylabel=y_label)
    axes.set_title(title, size=11)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9 if len(series) < 8 else 7)
    figure.savefig(HERE.parent / f"docs/images/{name}.svg", facecolor="white", metadata={"Date": None})
    plt.close(figure)


#: What was printed, by its heading.
TABLES = defaultdict(list)


def table(columns, lines):
    heading = "| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns) + "\n"
    TABLES[heading].append("".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines))
    print("\n" + heading + TABLES[heading][-1], end="")


def write_pages():
    """Fill in the pages' tables: the first of a heading by the first that was printed, and so on."""
    for name in ("performance", "training"):
        page = HERE.parent / f"docs/{name}.md"
        text = page.read_text()
        for heading, bodies in TABLES.items():
            before, *rest = re.split(re.escape(heading) + r"(?:\|.*\n)*", text)
            bodies = [*bodies[: len(rest)], *[""] * (len(rest) - len(bodies))]
            text = before + "".join(heading + body + after for body, after in zip(bodies, rest, strict=True))
        page.write_text(text)


def of_shape(name, shape):
    """A result file's rows of one shape, and their baselines: {facts of a row: {baseline: speed-up}}."""
    results = load(name)
    rows, speedups = {}, {}
    for row in results["rows"]:
        if row["shape"] == shape and "ms" in row:
            key = (row["seq_len"], row["batch"], row["sparsity"], row["method"])
            rows.setdefault(key, row)
            speedups.setdefault(key, {})[row.get("baseline")] = speedup(row)
    return results["meta"], rows, speedups


def speedup(row):
    """Over its baseline; the file's own is rounded."""
    return row["baseline_ms"] / row["ms"] if "baseline_ms" in row else None


def times(value):
    return "" if value is None else f"{value:.2f}"


def both(values, form=".2f"):
    texts = ["–" if value is None else f"{value:{form}}" for value in values]
    return "" if set(texts) == {"–"} else ", ".join(texts)


def prefill(shape):
    meta, rows, speedups = of_shape("e2e_prefill", shape)
    if not rows:
        return
    for batch in sorted({key[1] for key in rows}):
        own = {key: row for key, row in rows.items() if key[1] == batch}
        print(f"\nPrefill, {SHAPES[shape]}, {meta['device']}, batch {batch}")
        prefill_of(shape, meta, own, speedups)


def prefill_of(shape, meta, rows, speedups):
    """Of one batch size."""
    forced = {(key[0], key[2]): row for key, row in rows.items() if row["method"] != "routed"}
    faster = {(key[0], key[2]): speedups[key] for key, row in rows.items() if row["method"] != "routed"}
    lengths, ratios = (sorted({key[place] for key in forced}) for place in (0, 1))
    table(
        ["tokens", *(f"Ω {ratio}, ms" for ratio in ratios)],
        [[label(n), *(f"{forced[n, r]['ms']:.0f}" if (n, r) in forced else "" for r in ratios)] for n in lengths],
    )
    table(
        [
            "tokens",
            *(f"× at Ω {ratio}" for ratio in ratios[1:]),
            "× vLLM at Ω 0, 0.75",
            "floor at Ω 0.75, ms",
            "peak at Ω 0, 0.75, GB",
        ],
        [
            [
                label(n),
                *(times(faster.get((n, r), {}).get("own-dense")) for r in ratios[1:]),
                both(faster.get((n, r), {}).get("vllm-dense") for r in (0.0, 0.75)),
                f"{forced[n, 0.75]['floor_ms']:.0f}" if (n, 0.75) in forced else "",
                both((forced[n, r]["peak_bytes"] / 1e9 if (n, r) in forced else None for r in (0.0, 0.75)), ".1f"),
            ]
            for n in lengths
        ],
    )
    routed = {(key[0], key[2]): row for key, row in rows.items() if row["method"] == "routed"}
    table(
        ["tokens", *(f"routers cost at Ω {r}" for r in (0.0, 0.75)), *(f"× at Ω {r}, with routers" for r in ratios)],
        [
            [
                label(n),
                *(f"{100 * (routed[n, r]['ms'] / forced[n, r]['ms'] - 1):.1f} %" for r in (0.0, 0.75)),
                *(times(speedup(routed[n, r])) for r in ratios),
            ]
            for n in sorted({n for n, _ in routed})
            if {(n, 0.0), (n, 0.75)} <= set(routed)
        ],
    )
    if shape != "qwen3-8b" or next(iter(rows))[1] != 1:
        return
    series = {}
    for ratio in ratios[1:]:
        for base, name, style in (("own-dense", "own dense", "-"), ("vllm-dense", "vLLM dense", ":")):
            points = {n: faster[n, ratio][base] for n in lengths if faster.get((n, ratio), {}).get(base)}
            if points:
                series[f"Ω {ratio} against {name}"] = (COLOURS[ratio], style, points)
    draw("prefill_speedup", f"Prefill, {SHAPES[shape]}'s shape, {meta['device']}", "speed-up", series, reference=1.0)


def decode(shape):
    meta, rows, speedups = of_shape("e2e_decode", shape)
    if not rows:
        return
    print(f"\nDecode, {SHAPES[shape]}, {meta['device']}; floors at {meta['copy_tbps']:.2f} TB/s; ms (× floor)")
    found = {(key[1], key[0], key[2]): (row, speedups[key]) for key, row in rows.items()}
    batches, lengths, ratios = (sorted({key[place] for key in found}) for place in range(3))
    for batch in batches:
        print(f"\nBatch {batch}")
        lines = []
        for n in lengths:
            cells = [found.get((batch, n, ratio)) for ratio in ratios]
            if any(cells):
                texts = [f"{c[0]['ms']:.2f} ({c[0]['over_floor']:.2f})" if c else "" for c in cells]
                faster = found.get((batch, n, 0.75), ({}, {}))[1]
                tokens = [found.get((batch, n, ratio), ({}, {}))[0].get("generate_ms") for ratio in (0.0, 0.75)]
                lines.append(
                    [label(n), *texts, *(times(faster.get(f"{base}-dense")) for base in ("own", "vllm")), both(tokens)]
                )
        more = ["× dense at Ω 0.75", "× vLLM at Ω 0.75", "`generate` at Ω 0, 0.75, ms"]
        table(["tokens", *(f"Ω {ratio}" for ratio in ratios), *more], lines)
    if shape != "qwen3-8b":
        return
    series = {}
    for ratio in (0.0, 0.5, 0.75):  # more would be hard to read
        own = {n: found[1, n, ratio][0] for n in lengths if (1, n, ratio) in found}
        series[f"Ω {ratio}"] = (COLOURS[ratio], "-", {n: row["ms"] for n, row in own.items()})
        series[f"Ω {ratio}, floor"] = (COLOURS[ratio], ":", {n: row["floor_ms"] for n, row in own.items()})
    wanted = {"phase": "decode", "shape": shape, "batch": 1}
    vllm = {row["seq_len"]: row["ms"] for row in load("vllm_dense")["rows"] if wanted.items() <= row.items()}
    if vllm:
        series["vLLM, dense"] = ("#009e73", "--", vllm)
    draw("decode_floor", f"One decode step, batch 1, {SHAPES[shape]}'s shape, {meta['device']}", "ms", series)


def training():
    results = load("training")
    print(f"\nTraining, {results['meta'].get('device')}")
    table(
        [
            "tokens",
            "gradients",
            "tokens/s",
            "peak, GB",
            "of a matrix product's rate",
            "the paper's run on 8 such GPUs, hours",
        ],
        [
            [
                label(row["seq_len"]),
                {"flux": "one backward", "plain": "plain formula"}[row["engine"]],
                f"{row['tokens_per_s']:,}",
                f"{row['peak_bytes'] / 1e9:.1f}",
                f"{row['of_matmul']:.3f}",
                f"{row['paper_hours']:.1f}",
            ]
            for row in results["rows"]
            if "ms" in row
        ],
    )


def attention(name, title, rate):
    results = load(name)
    if not results["rows"]:
        return
    print(f"\n{title}, {results['meta']['device']}")
    table(
        ["tokens", "batch", "engine, method", "ms", rate[1], "baseline", "its ms", "ratio"],
        [
            [
                label(row["seq_len"]),
                row["batch"],
                f"{row['engine']}, {row['method']}" + (f", last {row['queries']}" if "queries" in row else ""),
                f"{row['ms']:.4f}",
                row.get(rate[0], ""),
                row.get("baseline", ""),
                f"{row['baseline_ms']:.4f}" if "baseline" in row else "",
                times(speedup(row)),
            ]
            for row in results["rows"]
            # Some lengths, heads at a share of a half, and cuDNN's of SDPA's backends: the file has all.
            if row["seq_len"] in SHOWN
            and row.get("baseline") != "sdpa-flash"
            and (row["method"] != "head" or row["sparsity"] == 0.5)
        ],
    )


def profile():
    results = load("profile")
    for row in results["rows"]:
        alone = f", {row['unprofiled_ms']:.2f} without the profiler" if "unprofiled_ms" in row else ""
        print(f"\nA {row['phase']} at {label(row['seq_len'])}, Ω {row['sparsity']}: {row['ms']:.2f} ms{alone}")
        kinds = {**row["kinds"], "idle": row["idle_ms"]}
        table(
            ["kind", "ms", "share"],
            [[kind, f"{ms:.2f}", f"{100 * ms / row['ms']:.1f} %"] for kind, ms in kinds.items()],
        )


def memory():
    rows = [row for row in load("memory")["rows"] if row["shape"] == "qwen3-8b"]
    table(
        ["Ω_MSR", "KV cache at 128 K, GB", "longest context beside the weights in 141 GB"],
        [
            [row["sparsity"], f"{row['kv_bytes'] / 1e9:.2f}", f"{row['longest_context'] / 1e6:.2f} M"]
            for row in rows
            if row["seq_len"] == 2**17
        ],
    )
    series = {}
    for row in rows:
        colour = COLOURS[row["sparsity"]]
        series.setdefault(f"Ω {row['sparsity']}", (colour, "-", {}))[2][row["seq_len"]] = row["kv_bytes"] / 1e9
    draw("kv_bytes", "KV cache of one sequence, Qwen3-8B's shape, bf16", "GB", series, log_y=True)


def main():
    plt.rcParams.update({"svg.fonttype": "none", "font.size": 10, "svg.hashsalt": "flux"})
    (HERE.parent / "docs/images").mkdir(parents=True, exist_ok=True)
    for shape in SHAPES:
        prefill(shape)
        decode(shape)
    training()
    attention("attention_prefill", "One layer's prefill", ("tflops", "TFLOP/s"))
    attention("attention_decode", "One layer's decode step", ("tbps", "TB/s"))
    profile()
    memory()
    write_pages()


if __name__ == "__main__":
    main()
