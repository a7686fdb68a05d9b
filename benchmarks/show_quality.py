"""Tables and plots of benchmarks/results/quality.json, the study's result.

Run: ``python benchmarks/show_quality.py``. Prints the tables of docs/quality.md and writes its images.
"""

import json
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from flux_attention.evaluation.quality import METHODS
from flux_attention.evaluation.report import heat_map, trade_off
from flux_attention.training import Recipe

HERE = Path(__file__).parent
STUDY = HERE.parent / "recipes/study"


def save(figure, name):
    figure.savefig(HERE.parent / f"docs/images/{name}.svg", facecolor="white", metadata={"Date": None})
    plt.close(figure)


def target(routers):
    """0.5 of ``runs/study/routers/layer-0.5-0``."""
    return routers.split("-")[-2]


def grouped(rows, length):
    """{method and target: {family: row}}, in the order of METHODS and of targets."""
    found = {}
    for row in sorted(rows, key=lambda row: (METHODS.index(row["method"]), row["routers"] or "")):
        name = row["method"] + (f" ({target(row['routers'])})" if row["routers"] else "")
        if row["seq_len"] == length:
            found.setdefault(name, {})[row["task"]] = row
    return found


def table(columns, lines):
    print("\n| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for line in lines:
        print("| " + " | ".join(line) + " |")


def by_class(rows, length):
    """One line a method and target: Ω_MSR by task class, mean accuracy, and what they are beside dense."""
    tasks = {family: kind for s in Recipe.from_yaml(STUDY / "routers.yaml").data for family, kind in s["tasks"].items()}
    kinds = list(dict.fromkeys(tasks.values()))
    groups, lines = grouped(rows, length), []

    def accuracy(group):
        return fmean(row["accuracy"] for row in group.values() if "accuracy" in row)

    for name, group in groups.items():
        sparsity = [fmean(row["sparsity"] for row in group.values())]
        sparsity += [fmean(row["sparsity"] for task, row in group.items() if tasks[task] == kind) for kind in kinds]
        change = 100 * (accuracy(group) - accuracy(groups["dense"]))
        perplexity = group["plain"]["perplexity"] / groups["dense"]["plain"]["perplexity"]
        cells = [f"{value:.3f}" for value in (*sparsity, accuracy(group))]
        lines.append([name, *cells, f"{change:+.1f}", f"{perplexity:.3f}"])
    table([f"{length:,} tokens", "Ω_MSR", *kinds, "accuracy", "− dense, points", "perplexity ÷ dense"], lines)


def by_family(rows, length, methods):
    """One line a family: accuracy and Ω_MSR of each method."""
    groups = grouped(rows, length)
    lines = []
    for task in groups["dense"]:
        some = [groups[method][task] for method in methods]
        cells = [f"{row.get('accuracy', row.get('perplexity')):.3f}, {row['sparsity']:.2f}" for row in some]
        lines.append([task.replace("_", " "), *cells])
    table([f"{length:,} tokens", *methods], lines)


def main():
    rows = json.loads((HERE / "results/quality.json").read_text())["rows"]
    plt.rcParams.update({"svg.fonttype": "none", "font.size": 10, "svg.hashsalt": "flux"})
    for length in dict.fromkeys(row["seq_len"] for row in rows):
        save(trade_off(rows, length), f"quality_{length}")
        by_class(rows, length)
    by_family(rows, 4096, ["dense", "routed (0.5)", "routed (0.65)", "static (0.65)"])
    for routers in dict.fromkeys(row["routers"] for row in rows if row["method"] == "routed"):
        if target(routers) in ("0.5", "0.65"):
            figure = heat_map(rows, 4096, routers)
            title = f"Share of inputs with full attention, target {target(routers)}, 4,096 tokens"
            figure.axes[0].set_title(title, size=11)
            save(figure, f"quality_routes_{target(routers)}")


if __name__ == "__main__":
    main()
