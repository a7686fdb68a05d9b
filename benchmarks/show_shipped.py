"""Makes pages and plot of what the shipped model's routers do, and of those that the quick start trains.

Run by ``python benchmarks/show_pages.py``.
"""

from statistics import fmean

from show_tables import ROOT, load, page, save, table

from flux_attention.evaluation.figures import GROUND, INK, shades
from flux_attention.shipped import ROUTERS

#: Routers of the recipe's other runs, beside which the shipped ones stand in the result file.
ANEW = "runs/shipped/routers"
COLUMNS = {"dense": "dense", "routed": "routed", "sparse": "all sparse", "best-static": "static"}


def by_task(name, routers):
    """Return {(task, method): row} of these routers, and of what needs none."""
    own = (None, str(ROUTERS.relative_to(ROOT)) if routers == "shipped" else routers)
    return {(row["task"], row["method"]): row for row in load(name)["rows"] if row["routers"] in own}


def value(row, form=".3f"):
    return format(row.get("accuracy", row.get("perplexity")), form)


def families(by):
    return list(dict.fromkeys(task for task, _ in by))


def means(by):
    """Return the mean accuracy over the questions by method, and the routers' mean Ω_MSR over them."""
    questions = [family for family in families(by) if family != "plain"]
    accuracy = {method: fmean(by[family, method]["accuracy"] for family in questions) for method in COLUMNS}
    return accuracy, fmean(by[family, "routed"]["sparsity"] for family in questions)


def quality_table(by):
    lines = []
    for family in families(by):
        name = "plain text (perplexity)" if family == "plain" else family.replace("_", " ")
        sparsity = f"{by[family, 'routed']['sparsity']:.2f}"
        lines.append([name, *(value(by[family, method]) for method in COLUMNS), sparsity])
    accuracy, sparsity = means(by)
    lines.insert(-1, ["**mean of questions**", *(f"{accuracy[method]:.3f}" for method in COLUMNS), f"{sparsity:.2f}"])
    return table(["input", *COLUMNS.values(), "Ω_MSR routed"], lines)


def quickstart_table():
    """Make training.md's table: what the quick start's routers reach."""
    by = by_task("quickstart", "runs/quickstart")
    targets = {"plain": "0.95", "two_hop": "0.60"}
    lines = []
    for family in families(by):
        name = "plain text, perplexity" if family == "plain" else family.replace("_", " ")
        cells = [value(by[family, method], ".2f") for method in ("dense", "sparse", "routed")]
        ratio = f"{by[family, 'routed']['sparsity']:.3f}"
        lines.append([name, *cells, ratio, targets.get(family, "0.80")])
    return table(["input", "dense", "all sparse", "routed", "Ω_MSR routed", "its target"], lines)


def ends_table():
    """Compare routes by the prompt's ends with those of the prefill, family by family."""
    rows = load("ends_quality")["rows"]
    ends = sorted({row["end_tokens"] for row in rows if "end_tokens" in row})
    lines = []
    for family in dict.fromkeys(row["task"] for row in rows):
        own = {(row["method"], row.get("end_tokens")): row for row in rows if row["task"] == family}
        routed = own["routed", None]
        cells = [value(own["dense", None]), value(routed), f"{routed['sparsity']:.2f}"]
        for count in ends:
            found = own["routed-ends", count]
            cells += [f"{found['agreement']:.3f}", value(found), f"{found['sparsity']:.2f}"]
        lines.append(["plain text (perplexity)" if family == "plain" else family.replace("_", " "), *cells])
    columns = ["input", "dense", "routed in the prefill", "Ω_MSR"]
    for count in ends:
        columns += [f"{count} tokens at each end: decisions that agree", "answers", "Ω_MSR"]
    return table(columns, lines)


def pages():
    """Return {name of the result file: text} of both pages."""
    shipped, anew = by_task("demo_quality", "shipped"), by_task("demo_quality", ANEW)
    static, length = shipped["plain", "best-static"]["full_layers"], shipped["plain", "dense"]["seq_len"]
    count = shipped["plain", "dense"]["n"]
    about = f"""
        {count} samples of {length:,} tokens of each kind, on text, keys and values that were held out from
        training; sparse attention sees 768 tokens. "Static" runs layers {static} in full for every input:
        of all sets of that size the one with the best answers on other samples. The error of one number is
        about 0.02; differences between methods, which see the same samples, are surer. The command is in
        the [recipe](../../recipes/shipped/README.md).
        """
    ends = """
        The shipped model, whose routers were trained to decide in the prefill, reading the prompt's two ends beforehand
        instead: 40 samples of 4,096 tokens of each kind, held out from training. What it means is in the
        [guide](../../docs/guide.md#when-routes-are-decided).
        """
    quickstart = """
        Routers of [recipes/quickstart.yaml](../../recipes/quickstart.yaml), 20 samples of 512 tokens of
        each kind; [training.md](../../docs/training.md) has the commands.
        """
    demo = page(
        "demo_quality",
        "What the shipped model answers",
        about,
        quality_table(shipped),
        "![Share of inputs for which each layer ran full attention](../../docs/images/demo_routes.svg)",
        "## Trained anew in one stage",
        "Other routers for the same model, on the same samples; the recipe tells why they were trained:",
        quality_table(anew),
    )
    return {
        "demo_quality": demo,
        "ends_quality": page("ends_quality", "Routes by the prompt's two ends", ends, ends_table()),
        "quickstart": page("quickstart", "Quick start", quickstart, quickstart_table()),
    }


def key_figure():
    """Return README's answers: headline and explanation."""
    by = by_task("demo_quality", "shipped")
    accuracy, sparsity = means(by)
    return (
        f"{accuracy['routed']:.3f} answered, dense {accuracy['dense']:.3f}",
        f"right answers to {len(families(by)) - 1} kinds of questions with {100 * sparsity:.0f} % of the layers sparse;"
        f" all sparse {accuracy['sparse']:.3f}, the best fixed layers {accuracy['best-static']:.3f}"
        " ([file](benchmarks/results/demo_quality.md))",
    )


def images():
    """Draw how often each layer ran full attention, by kind of input."""
    import matplotlib.pyplot as plt

    by = by_task("demo_quality", "shipped")
    names = families(by)
    rates = [list(by[family, "routed"]["fa_rate"].values()) for family in names]
    figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    image = axes.imshow(rates, cmap=shades(), vmin=0, vmax=1, aspect="auto")
    for row, values in enumerate(rates):
        for column, rate in enumerate(values):
            colour = GROUND if rate > 0.6 else INK
            axes.text(column, row, f"{rate:.0%}", ha="center", va="center", size=8, color=colour)
    axes.set_xticks(range(len(rates[0])), [str(layer) for layer in by["plain", "routed"]["fa_rate"]])
    axes.set_yticks(range(len(names)), [family.replace("_", " ") for family in names])
    axes.set_xlabel("layer")
    axes.set_title("Share of inputs for which a layer ran full attention", size=11)
    figure.colorbar(image, ax=axes, format=lambda value, _: f"{value:.0%}")
    save(figure, "demo_routes")
