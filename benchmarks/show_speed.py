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


def of_shape(name, shape="qwen3-8b"):
    """A result file's rows of one shape, and their baselines: {facts of a row: {baseline: speed-up}}."""
    results = load(name)
    rows, speedups = {}, {}
    for row in results["rows"]:
        if row["shape"] == shape and "ms" in row:
            key = (row["seq_len"], row["batch"], row["sparsity"], row["method"])
            rows.setdefault(key, row)
            speedups.setdefault(key, {})[row.get("baseline")] = row.get("speedup")
    return results["meta"], rows, speedups


def times(value):
    return "" if value is None else f"{value:.2f}"


def prefill():
    meta, rows, speedups = of_shape("e2e_prefill")
    if not rows:
        return
    print(f"\nPrefill, {meta['device']}\n\n| tokens | Ω_MSR | ms | × own dense | × vLLM dense | floor, ms | peak, GB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    series = {}
    for key, row in rows.items():
        if row["method"] == "routed":
            continue
        own, vllm = speedups[key].get("own-dense"), speedups[key].get("vllm-dense")
        print(
            f"| {label(row['seq_len'])} | {row['sparsity']} | {row['ms']:.0f} | {times(own)} | {times(vllm)} | "
            f"{row['floor_ms']:.0f} | {row['peak_bytes'] / 1e9:.1f} |"
        )
        colour = COLOURS[row["sparsity"]]
        for name, style, value in (("own dense", "-", own), ("vLLM dense", ":", vllm)):
            if value is not None and row["sparsity"]:
                points = series.setdefault(f"Ω {row['sparsity']} against {name}", (colour, style, {}))[2]
                points[row["seq_len"]] = value
    print("\n| tokens | routers run, ms | routes forced, ms | routers cost |\n| --- | --- | --- | --- |")
    for row in rows.values():
        if row["method"] == "routed":
            cost = row["ms"] / row["baseline_ms"] - 1
            print(f"| {label(row['seq_len'])} | {row['ms']:.1f} | {row['baseline_ms']:.1f} | {100 * cost:.1f} % |")
    draw("prefill_speedup", f"Prefill, Qwen3-8B's shape, {meta['device']}", "speed-up", series, reference=1.0)


def decode():
    meta, rows, speedups = of_shape("e2e_decode")
    if not rows:
        return
    print(f"\nDecode, {meta['device']}; floors at {meta['copy_tbps']:.2f} TB/s")
    print("\n| tokens | batch | Ω_MSR | ms | floor, ms | ms / floor | × own dense | × vLLM dense |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    series = {}
    for key, row in rows.items():
        floor = row["floor_ms"]
        own, vllm = speedups[key].get("own-dense"), speedups[key].get("vllm-dense")
        print(
            f"| {label(row['seq_len'])} | {row['batch']} | {row['sparsity']} | {row['ms']:.2f} | {floor:.2f} | "
            f"{row['ms'] / floor:.2f} | {times(own)} | {times(vllm)} |"
        )
        if row["batch"] == 1:
            for name, style, value in (("", "-", row["ms"]), (", floor", ":", floor)):
                colour = COLOURS[row["sparsity"]]
                series.setdefault(f"Ω {row['sparsity']}{name}", (colour, style, {}))[2][row["seq_len"]] = value
    vllm = {row["seq_len"]: row["ms"] for row in load("vllm_dense")["rows"] if row["phase"] == "decode"}
    if vllm:
        series["vLLM, dense"] = ("#009e73", "--", vllm)
    draw("decode_floor", f"One decode step, batch 1, Qwen3-8B's shape, {meta['device']}", "ms", series)


def attention(name, heading, rate):
    results = load(name)
    if not results["rows"]:
        return
    print(f"\n{heading}, {results['meta']['device']}")
    print(f"\n| tokens | batch | engine, method | ms | {rate[1]} | baseline | its ms | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in results["rows"]:
        base = "" if "baseline" not in row else f"{row['baseline_ms']:.4f}"
        print(
            f"| {label(row['seq_len'])} | {row['batch']} | {row['engine']}, {row['method']} | {row['ms']:.4f} | "
            f"{row.get(rate[0], '')} | {row.get('baseline', '')} | {base} | {times(row.get('speedup'))} |"
        )


def profile():
    results = load("profile")
    for row in results["rows"]:
        print(f"\nA {row['phase']} at {label(row['seq_len'])}, Ω {row['sparsity']}: {row['ms']:.2f} ms")
        print("\n| kind | ms | share |\n| --- | --- | --- |")
        for kind, ms in {**row["kinds"], "idle": row["idle_ms"]}.items():
            print(f"| {kind} | {ms:.2f} | {100 * ms / row['ms']:.1f} % |")


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
    attention("attention_prefill", "One layer's prefill", ("tflops", "TFLOP/s"))
    attention("attention_decode", "One layer's decode step", ("tbps", "TB/s"))
    profile()
    memory()


if __name__ == "__main__":
    main()
