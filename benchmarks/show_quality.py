"""Tables and plots of benchmarks/results/quality.json, the study's result.

Run: ``python benchmarks/show_quality.py``. Prints the tables of docs/quality.md and writes its images.
"""

import json
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from flux_attention.evaluation.report import heat_map, label, short_names, trade_off
from flux_attention.training import Recipe

HERE = Path(__file__).parent
STUDY = HERE.parent / "recipes/study"


def save(figure, name):
    figure.savefig(HERE.parent / f"docs/images/{name}.svg", facecolor="white", metadata={"Date": None})
    plt.close(figure)


def table(rows, length):
    """One line a method and adapter: Ω_MSR by task class, mean accuracy, and what they are beside dense."""
    tasks = {family: kind for s in Recipe.from_yaml(STUDY / "routers.yaml").data for family, kind in s["tasks"].items()}
    kinds = list(dict.fromkeys(tasks.values()))
    names = short_names(rows)
    groups = {}
    for row in rows:
        if row["seq_len"] == length:
            groups.setdefault(label(row, names), {})[row["task"]] = row
    dense = groups["dense"]
    columns = [f"{length:,} tokens", "mean Ω_MSR", *kinds, "mean accuracy", "− dense, points", "perplexity ÷ dense"]
    print(f"\n| {' | '.join(columns)} |\n|" + " --- |" * len(columns))

    def accuracy(group):
        return fmean(row["accuracy"] for row in group.values() if "accuracy" in row)

    for name, group in sorted(groups.items(), key=lambda item: item[0].split("-")[0] not in ("dense", "sparse")):
        by_kind = [fmean(row["sparsity"] for task, row in group.items() if tasks[task] == kind) for kind in kinds]
        cells = [f"{value:.3f}" for value in (fmean(row["sparsity"] for row in group.values()), *by_kind)]
        change = f"{100 * (accuracy(group) - accuracy(dense)):+.1f}"
        perplexity = group["plain"]["perplexity"] / dense["plain"]["perplexity"]
        print(f"| {name} | {' | '.join(cells)} | {accuracy(group):.3f} | {change} | {perplexity:.3f} |")


def families(rows, length, columns):
    """One line a family: accuracy of each method."""
    names = short_names(rows)
    by = {(row["task"], label(row, names)): row for row in rows if row["seq_len"] == length}
    print(f"\n| {length:,} tokens | {' | '.join(columns)} |\n| --- |" + " --- |" * len(columns))
    for task in dict.fromkeys(task for task, _ in by):
        cells = [by[task, column] for column in columns]
        shown = [f"{cell.get('accuracy', cell.get('perplexity')):.3f}, {cell['sparsity']:.2f}" for cell in cells]
        print(f"| {task.replace('_', ' ')} | {' | '.join(shown)} |")


def main():
    rows = json.loads((HERE / "results/quality.json").read_text())["rows"]
    plt.rcParams.update({"svg.fonttype": "none", "font.size": 10, "svg.hashsalt": "flux"})
    for length in dict.fromkeys(row["seq_len"] for row in rows):
        save(trade_off(rows, length), f"quality_{length}")
        table(rows, length)
    families(rows, 4096, ["dense", "routed (layer-0.5-0)", "routed (layer-0.65-0)", "static (layer-0.65-0)"])
    for target in (0.5, 0.65):
        routers = next(row["routers"] for row in rows if (row["routers"] or "").endswith(f"layer-{target}-0"))
        save(heat_map(rows, 4096, routers), f"quality_routes_{round(100 * target)}")


if __name__ == "__main__":
    main()
