"""Tables and plots of the speed and memory results.

Run: ``python benchmarks/show_speed.py``. Reads benchmarks/results/, which ``flux-attention bench`` writes; prints the
tables of docs/performance.md and writes its images. What has not been measured is left out.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
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
    axes.legend(fontsize=9)
    figure.savefig(HERE.parent / f"docs/images/{name}.svg", facecolor="white", metadata={"Date": None})
    plt.close(figure)


def prefill():
    results = load("e2e_prefill")
    rows = [row for row in results["rows"] if row["shape"] == "qwen3-8b" and "ms" in row]
    forced = [row for row in rows if row["method"] != "routed"]
    if not rows:
        return
    print(f"\nPrefill, {results['meta']['device']}\n\n| tokens | Ω_MSR | ms | speed-up | floor, ms | peak memory, GB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in forced:
        print(
            f"| {label(row['seq_len'])} | {row['sparsity']} | {row['ms']:.0f} | {row['speedup']:.2f} | "
            f"{row['floor_ms']:.0f} | {row['peak_bytes'] / 1e9:.1f} |"
        )
    print("\n| tokens | routers run, ms | routes forced, ms |\n| --- | --- | --- |")
    for row in rows:
        if row["method"] == "routed":
            print(f"| {label(row['seq_len'])} | {row['ms']:.0f} | {row['baseline_ms']:.0f} |")
    ratios = sorted({row["sparsity"] for row in forced} - {0.0})
    series = {
        f"Ω {ratio}": (
            COLOURS[ratio],
            "-",
            {row["seq_len"]: row["speedup"] for row in forced if row["sparsity"] == ratio},
        )
        for ratio in ratios
    }
    title = f"Prefill against every layer full, Qwen3-8B's shape, {results['meta']['device']}"
    draw("prefill_speedup", title, "speed-up", series, reference=1.0)


def decode():
    results = load("e2e_decode")
    rows = [row for row in results["rows"] if row["shape"] == "qwen3-8b" and row["batch"] == 1 and "ms" in row]
    if not rows:
        return
    print(f"\nDecode, {results['meta']['device']}\n\n| tokens | Ω_MSR | ms | floor, ms | over floor | speed-up |")
    print("| --- | --- | --- | --- | --- | --- |")
    series = {}
    for row in rows:
        print(
            f"| {label(row['seq_len'])} | {row['sparsity']} | {row['ms']:.2f} | {row['floor_ms']:.2f} | "
            f"{row['over_floor']:.2f} | {row['speedup']:.2f} |"
        )
        for name, style, value in (("", "-", row["ms"]), (", floor", ":", row["floor_ms"])):
            colour = COLOURS[row["sparsity"]]
            series.setdefault(f"Ω {row['sparsity']}{name}", (colour, style, {}))[2][row["seq_len"]] = value
    title = f"One decode step, Qwen3-8B's shape, {results['meta']['device']}"
    draw("decode_floor", title, "ms", series)


def attention_decode():
    results = load("attention_decode")
    if not results["rows"]:
        return
    print(f"\nAttention of a decode step, {results['meta']['device']}")
    print("\n| tokens | batch | method | µs | TB/s | baseline | its µs | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in results["rows"]:
        print(
            f"| {label(row['seq_len'])} | {row['batch']} | {row['method']} | {1000 * row['ms']:.1f} | "
            f"{row.get('tbps', '')} | {row['baseline']} | {1000 * row['baseline_ms']:.1f} | {row['speedup']:.2f} |"
        )


def memory():
    rows = [row for row in load("memory")["rows"] if row["shape"] == "qwen3-8b"]
    print("\n| Ω_MSR | KV cache at 128 K, GB | longest context beside the weights in 141 GB |\n| --- | --- | --- |")
    series = {}
    for row in rows:
        colour = COLOURS[row["sparsity"]]
        series.setdefault(f"Ω {row['sparsity']}", (colour, "-", {}))[2][row["seq_len"]] = row["kv_bytes"] / 1e9
        if row["seq_len"] == 2**17:
            print(f"| {row['sparsity']} | {row['kv_bytes'] / 1e9:.2f} | {row['longest_context'] / 1e6:.2f} M |")
    draw("kv_bytes", "KV cache of one sequence, Qwen3-8B's shape, bf16", "GB", series, log_y=True)


def main():
    plt.rcParams.update({"svg.fonttype": "none", "font.size": 10, "svg.hashsalt": "flux"})
    (HERE.parent / "docs/images").mkdir(parents=True, exist_ok=True)
    prefill()
    decode()
    attention_decode()
    memory()


if __name__ == "__main__":
    main()
