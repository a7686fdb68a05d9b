"""Table and plot of benchmarks/results/demo_quality.json.

Run: ``python benchmarks/show_demo_quality.py``. Prints README's table and writes docs/images/demo_routes.svg: how often
each layer ran full attention, by kind of input.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from flux_attention.shipped import ROUTERS
from flux_attention.tasks.families import FAMILIES

HERE = Path(__file__).parent


def main():
    rows = json.loads((HERE / "results/demo_quality.json").read_text())["rows"]
    own = (None, str(ROUTERS.relative_to(HERE.parent)))  # the file has others of the recipe, too
    by = {(row["task"], row["method"]): row for row in rows if row["routers"] in own}
    static = by["plain", "best-static"]["full_layers"]
    print(f"| input | dense | routed | all sparse | static, layers {static} full | Ω_MSR routed |")
    print("| --- | --- | --- | --- | --- | --- |")
    for family in FAMILIES:
        cells = []
        for method in ("dense", "routed", "sparse", "best-static"):
            row = by[family, method]
            cells.append(f"{row['perplexity']:.3f}" if family == "plain" else f"{row['accuracy']:.3f}")
        name = "plain text (perplexity)" if family == "plain" else family.replace("_", " ")
        print(f"| {name} | " + " | ".join(cells) + f" | {by[family, 'routed']['sparsity']:.2f} |")

    rates = [list(by[family, "routed"]["fa_rate"].values()) for family in FAMILIES]
    # Mid-grey text and a white-to-red scale in a white frame: readable on light and dark pages.
    plt.rcParams.update({"svg.fonttype": "none", "font.size": 11, "svg.hashsalt": "flux"})
    figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    image = axes.imshow(rates, cmap="Reds", vmin=0, vmax=1, aspect="auto")
    for row, values in enumerate(rates):
        for column, rate in enumerate(values):
            axes.text(
                column, row, f"{rate:.0%}", ha="center", va="center", size=8, color="white" if rate > 0.6 else "#444"
            )
    axes.set_xticks(range(len(rates[0])), [str(layer) for layer in by["plain", "routed"]["fa_rate"]])
    axes.set_yticks(range(len(FAMILIES)), [family.replace("_", " ") for family in FAMILIES])
    axes.set_xlabel("layer")
    axes.set_title("Share of inputs for which a layer ran full attention", size=11)
    figure.colorbar(image, ax=axes, format=lambda value, _: f"{value:.0%}")
    output = HERE.parent / "docs/images/demo_routes.svg"
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
