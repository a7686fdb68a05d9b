"""Makes page, tables and plots of benchmarks/results/quality.json, the study's result.

Run by ``python benchmarks/show_pages.py``.
"""

from statistics import fmean, variance

from show_tables import ROOT, load, page, save, table

from flux_attention.evaluation.compare import difference, summary
from flux_attention.evaluation.figures import COLOURS, heat_map, trade_off
from flux_attention.evaluation.methods import EXHAUSTIVE, METHODS
from flux_attention.training import Recipe

STUDY = ROOT / "recipes/study"


def target(routers):
    """Read the target out of an adapter's name: 0.5 of ``runs/study/routers/layer-0.5-0``."""
    return routers.split("-")[-2]


def grouped(rows, length):
    """Group rows: {method and target: [{family: row} of each seed]}, in the order of METHODS, targets and seeds."""
    found = {}
    for row in sorted(rows, key=lambda row: (METHODS.index(row["method"]), row["routers"] or "")):
        name = row["method"] + (f" ({target(row['routers'])})" if row["routers"] else "")
        if row["seq_len"] == length:
            found.setdefault(name, {}).setdefault(row["routers"], {})[row["task"]] = row
    return {name: list(seeds.values()) for name, seeds in found.items()}


def routers_of(seed):
    return next(iter(seed.values()))["routers"]


def over_seeds(values, form):
    """Write the mean, and least and most of several seeds."""
    values = list(values)
    spread = f" ({format(min(values), form)} to {format(max(values), form)})" if len(values) > 1 else ""
    return format(fmean(values), form) + spread


def by_class(rows, length):
    """Make a line for each method and target: Ω_MSR by task class, mean accuracy, and what they are beside dense."""
    tasks = {family: kind for s in Recipe.from_yaml(STUDY / "routers.yaml").data for family, kind in s["tasks"].items()}
    kinds = list(dict.fromkeys(tasks.values()))
    groups, lines = grouped(rows, length), []
    means = {name: [summary(list(seed.values()))[0] for seed in seeds] for name, seeds in groups.items()}
    (dense,) = means["dense"]
    for name, seeds in groups.items():
        cells = [over_seeds((mean["sparsity"] for mean in means[name]), ".3f")]
        for kind in kinds:
            ratios = (fmean(row["sparsity"] for task, row in seed.items() if tasks[task] == kind) for seed in seeds)
            cells.append(over_seeds(ratios, ".3f"))
        cells.append(over_seeds((mean["accuracy"] for mean in means[name]), ".3f"))
        cells.append(over_seeds((100 * (mean["accuracy"] - dense["accuracy"]) for mean in means[name]), "+.1f"))
        cells.append(over_seeds((mean["perplexity"] / dense["perplexity"] for mean in means[name]), ".3f"))
        lines.append([name, *cells])
    return table([f"{length:,} tokens", "Ω_MSR", *kinds, "accuracy", "− dense, points", "perplexity ÷ dense"], lines)


def differences(rows, length):
    """Make a line for each target and what routers are set beside: mean over seeds, and least and most of them."""
    groups, lines = grouped(rows, length), []
    for name, seeds in groups.items():
        method, _, goal = name.partition(" ")
        rivals = {
            "routed": [f"{rival} {goal}" for rival in ("static", *EXHAUSTIVE, "head", "head-static")],
            "head": [f"head-static {goal}"],
        }.get(method, [])
        for rival in ["dense", *rivals] if method in ("routed", "head") else []:
            if rival not in groups:
                continue
            # What was chosen for some routers is set beside those, what was not beside all.
            own = {routers_of(other): [other] for other in groups[rival]}
            pairs = [(seed, other) for seed in seeds for other in own.get(routers_of(seed), groups[rival])]
            found = [(difference(list(a.values()), list(b.values())), a, b) for a, b in pairs]
            if any(points is None or ratio is None for (points, ratio), _, _ in found):
                continue  # of an older version
            sparser = [
                fmean(row["sparsity"] for row in seed.values()) - fmean(row["sparsity"] for row in other.values())
                for _, seed, other in found
            ]
            lines.append(
                [
                    name,
                    rival,
                    over_seeds((points[0] for (points, _), _, _ in found), "+.1f"),
                    f"± {fmean(points[1] for (points, _), _, _ in found):.1f}",
                    over_seeds((ratio[0] for (_, ratio), _, _ in found), ".3f"),
                    over_seeds(sparser, "+.3f"),
                ]
            )
    return table([f"{length:,} tokens", "beside", "points", "of one seed, 95 %", "perplexity ÷", "Ω_MSR −"], lines)


def beside_mix(routed, more, fewer):
    """
    Compare routers with a mix of two fixed sets of their Ω_MSR.

    Returns Ω_MSR, accuracy, that of the mix, points between, and half their 95 % interval. None outside of the two: a
    fixed set of so many layers stands in the table.
    """
    ratio, low, high = (fmean(row["sparsity"] for row in rows) for rows in (routed, more, fewer))
    if not low < ratio < high:
        return None
    share = (ratio - low) / (high - low)
    questions = [rows for rows in zip(routed, more, fewer, strict=True) if "accuracy" in rows[0]]
    mixed = fmean((1 - share) * some["accuracy"] + share * less["accuracy"] for _, some, less in questions)
    gained = [
        [a - (1 - share) * b - share * c for a, b, c in zip(*(row["scores"] for row in rows), strict=True)]
        for rows in questions
    ]
    error = sum(variance(values) / len(values) for values in gained) ** 0.5 / len(gained)
    return (
        ratio,
        fmean(row["accuracy"] for row, _, _ in questions),
        mixed,
        100 * fmean(map(fmean, gained)),
        196 * error,
    )


def at_equal_sparsity(rows, length):
    """Compare routers with a mix of the two best fixed sets around them: one set for some inputs, one for the rest."""
    groups, lines = grouped(rows, length), []
    for name, seeds in groups.items():
        method, _, goal = name.partition(" ")
        sets = [groups.get(f"{rival} {goal}") for rival in EXHAUSTIVE]
        if method != "routed" or None in sets:
            continue
        for what, left_out in (("all inputs", ()), ("questions only", ("plain",))):
            found = []
            for seed in seeds:
                tasks = [task for task in seed if task not in left_out]
                three = [[some[task] for task in tasks] for some in (seed, sets[0][0], sets[1][0])]
                found.append(beside_mix(*three))
            found = list(filter(None, found))
            if found:
                forms = (".3f", ".3f", ".3f", "+.1f", ".1f")
                lines.append([f"{name}, {what}", *map(over_seeds, zip(*found, strict=True), forms)])
    return table([f"{length:,} tokens", "Ω_MSR", "accuracy", "mix of fixed sets", "points", "±, one seed"], lines)


def seeds_as_one(rows):
    """Return rows with the mean of each target's seeds."""
    found = []
    for length in dict.fromkeys(row["seq_len"] for row in rows):
        for seeds in grouped(rows, length).values():
            for task, row in seeds[0].items():
                some = [seed[task] for seed in seeds]
                numbers = [name for name in ("accuracy", "perplexity", "sparsity") if name in row]
                found.append({**row, **{name: fmean(each[name] for each in some) for name in numbers}})
    return found


def by_family(rows, length, methods):
    """Make a line for each family: accuracy and Ω_MSR of each method."""
    groups = grouped(rows, length)
    lines = []
    for task in groups["dense"][0]:
        some = [[seed[task] for seed in groups[method]] for method in methods]
        cells = [
            over_seeds((row.get("accuracy", row.get("perplexity")) for row in seeds), ".3f")
            + f", {fmean(row['sparsity'] for row in seeds):.2f}"
            for seeds in some
        ]
        lines.append([task.replace("_", " "), *cells])
    return table([f"{length:,} tokens", *methods], lines)


def brief():
    """Make quality.md's table: what each way of choosing answers at 4,096 tokens, over seeds."""
    groups = grouped(load("quality")["rows"], 4096)
    names = {
        "dense": "all layers full",
        "routed (0.65)": "routed, target 0.65",
        "best-static (0.8)": "two layers for every input, the best",
        "routed (0.8)": "routed, target 0.8",
        "head-static (0.8)": "three KV heads of twenty for every input",
        "best-static-fewer (0.8)": "one layer for every input, the best",
        "random (0.8)": "two layers at random",
        "sparse": "no layer full",
    }
    return answered(groups, names)


def answered(groups, names):
    """Make a table of these methods: Ω_MSR, answers and perplexity, means over seeds."""
    lines = []
    (dense,) = summary(list(groups["dense"][0].values()))
    for method, name in names.items():
        means = [summary(list(seed.values()))[0] for seed in groups[method]]
        cells = [
            f"{fmean(mean['sparsity'] for mean in means):.3f}",
            f"{fmean(mean['accuracy'] for mean in means):.3f}",
            f"{fmean(mean['perplexity'] / dense['perplexity'] for mean in means):.3f}",
        ]
        lines.append([name, *cells])
    return table(["full layers", "Ω_MSR", "questions answered", "perplexity of plain text ÷ dense"], lines)


def heads():
    """Make comparison.md's tables: heads beside layers, fixed and routed, at both lengths."""
    rows = load("quality")["rows"]
    names = {
        "dense": "all layers",
        "head-static (0.8)": "three KV heads of twenty for every input",
        "head (0.8)": "KV heads by routers, target 0.8",
        "best-static (0.8)": "two layers of ten for every input, the best",
        "routed (0.8)": "layers by routers, target 0.8",
    }
    parts = []
    for length in (4096, 8192):
        made = answered(grouped(rows, length), names)
        parts.append(made.replace("full layers", f"{length:,} tokens: what is full", 1))
    return "\n" + "\n".join(parts) + "\n"


def pages():
    """Return {name of the result file: text} of the study's page."""
    rows = load("quality")["rows"]
    parts = [
        """
        One backbone of 100 M parameters, routers at several targets, and every way of choosing full layers,
        on the same questions; [quality.md](../../docs/quality.md) says what is compared and what came out.
        The number in brackets is the target of multi-step questions. Where there are three seeds: the mean,
        and the least and most of them. Commands: [recipes/study](../../recipes/study/README.md).
        """
    ]
    for length in dict.fromkeys(row["seq_len"] for row in rows):
        parts += [
            f"## {length:,} tokens",
            f"![Accuracy over sparsity](../../docs/images/quality_{length}.svg)",
            "The first Ω_MSR is over all inputs, the next three are by class of task:",
            by_class(rows, length),
            """
            A *mix of fixed sets* uses the better of the two best fixed sets around routed inputs' Ω_MSR for
            as many inputs as give it the same Ω_MSR, and the smaller for the rest:
            """,
            at_equal_sparsity(rows, length),
            "Differences on the same samples. The interval is that of one seed, over samples:",
            differences(rows, length),
        ]
    methods = ["dense", "routed (0.65)", "routed (0.8)", "best-static (0.8)", "best-static-fewer (0.8)"]
    parts += [
        "## By kind of question",
        "Accuracy (perplexity for plain text) and Ω_MSR:",
        by_family(rows, 4096, methods),
        "## What the routers do",
        *(f"![Full attention, target {name}](../../docs/images/quality_routes_{name}.svg)" for name in ("0.65", "0.8")),
    ]
    return {"quality": page("quality", "Routed, fixed and random layers", *parts)}


def close_up(rows, length):
    """Plot accuracy over sparsity, where all but random and all-sparse layers are."""
    figure = trade_off(
        [row for row in seeds_as_one(rows) if row["method"] not in ("dense", "sparse", "random")], length
    )
    (axes,) = figure.axes
    (dense,) = summary(list(grouped(rows, length)["dense"][0].values()))
    axes.axhline(dense["accuracy"], color=COLOURS["dense"], linestyle=":", linewidth=1)
    axes.set(xlim=(0.38, 0.92), ylim=(0.78, 1.0))
    axes.set_title(f"Accuracy over sparsity at {length:,} tokens, close up; dotted: dense", size=11)
    return figure


def images():
    """Draw the plots of the study."""
    rows = load("quality")["rows"]
    for length in dict.fromkeys(row["seq_len"] for row in rows):
        save(trade_off(seeds_as_one(rows), length), f"quality_{length}")
    save(close_up(rows, 4096), "quality_close")
    for name in ("0.65", "0.8"):
        figure = heat_map(rows, 4096, grouped(rows, 4096)[f"routed ({name})"][0]["plain"]["routers"])
        figure.axes[0].set_title(f"Share of inputs with full attention, target {name}, seed 0, 4,096 tokens", size=11)
        save(figure, f"quality_routes_{name}")
