"""Makes pages and plot of what real models answer, calibrated and trained: a result file for each model.

Run by ``python benchmarks/show_pages.py``.
"""

from operator import eq
from statistics import fmean

from show_tables import load, page, prose, save, table

from flux_attention.evaluation import compare, tables
from flux_attention.evaluation.figures import COLOURS

LOOK_UPS = ("look_up", "several_keys", "all_values", "place", "several_queries")
#: Sets of layers have equal Ω_MSR if they differ by less; of 24 layers one is 0.042.
EQUAL = 0.045
#: Sets of full layers of a method that are listed one by one.
FEW = 4
#: Methods of KV heads, which are named as layer.head.
BY_HEAD = ("head", "head-static")
#: Result files.
LARGER, SMALLER = "quality_real", "quality_real_small"


def result(name=LARGER):
    """Return rows by length, as the file has them, and what it says about them."""
    found, data = {}, load(name)
    for row in data["rows"]:
        found.setdefault(row["seq_len"], []).append(row)
    return found, data["meta"]


def of(rows, families):
    return [row for row in rows if row["task"] in families]


def words(families):
    return ", ".join(family.replace("_", " ") for family in families)


def points(rows, others, families):
    """Return the difference over families, and half of its interval, in points."""
    return compare.difference(of(rows, families), of(others, families))[0]


def shown(found):
    return f"{found[0]:+.1f} ± {found[1]:.1f}".replace("-", "−")


def questions(rows):
    """List the families that are answered; prose is scored."""
    return list(dict.fromkeys(row["task"] for row in rows if "accuracy" in row))


def losing(rows):
    """List the families that all-sparse layers answer worse than dense, beyond the interval of the difference."""
    groups = compare.by_method(rows)
    dense, sparse = (next(some for key, some in groups.items() if key[1] == name) for name in ("dense", "sparse"))
    found = {family: points(sparse, dense, [family]) for family in questions(rows)}
    return [family for family, (change, width) in found.items() if change + width < 0]


def sparsity(rows):
    return fmean(row["sparsity"] for row in rows)


def compared(rows):
    """Yield pairs of a method's rows with dense's, and with those of fixed layers of equal Ω_MSR or other routes."""
    groups = compare.by_method(rows)
    for key, some in groups.items():
        for other in compare.rivals(groups, key):
            if other[1] != "static-nll" or abs(sparsity(groups[other]) - sparsity(some)) < EQUAL:
                yield some, groups[other]


def difference_table(rows):
    names, lines = compare.short_names(rows), []
    for some, others in compared(rows):
        cells = [shown(points(some, others, kinds)) for kinds in (questions(rows), LOOK_UPS, losing(rows))]
        ratio, width = compare.difference(some, others)[1]
        pair = [compare.label(each[0], names) for each in (some, others)]
        lines.append([*pair, *cells, f"{ratio:.3f} ± {width:.3f}"])
    columns = ["all kinds", "look-ups", "kinds that need full layers", "perplexity of prose, ratio"]
    return table(["points", "beside", *columns], lines)


def notes(rows):
    """Say which kinds cannot tell what is lost."""
    need = losing(rows)
    spared = words(family for family in questions(rows) if family not in need)
    text = f"Kinds in which all-sparse layers lose nothing beyond chance: {spared or 'none'}."
    dense = [row for row in rows if row["method"] == "dense" and row.get("accuracy", 1) < tables.HARDLY]
    scores = ", ".join(f"{words([row['task']])} ({row['accuracy']:.2f})" for row in dense)
    return f"{text} Kinds that dense hardly answers: {scores or 'none'}."


def length_tables(name=LARGER):
    """Make quality by class and differences of each length."""
    parts = []
    for length, rows in result(name)[0].items():
        count = rows[0]["n"]
        parts += [
            f"### {length:,} tokens, {count} samples of each kind",
            table(*tables.class_table(rows)),
            difference_table(rows),
            prose(notes(rows)),
        ]
    return "\n" + "\n\n".join(part.strip("\n") for part in parts) + "\n\n"


def verdict(reached):
    return "yes" if reached else "**no**"


#: What was aimed at, in the order of ``reached``.
AIMS = (
    "calibrated, Ω_MSR ≥ 0.5: within 1 point of dense",
    "trained, mean Ω_MSR ≥ 0.65: within 1 point of dense",
    "trained, look-ups: ≥ 5 points above calibrated layers of equal Ω_MSR",
    "trained, routes by the ends: within 0.5 points of routes in the prefill",
)


def aims(name=LARGER):
    """Make a line for each aim, with what was reached at each length."""
    by_length, _ = result(name)
    lines = zip(AIMS, *map(reached, by_length.values()), strict=True)
    return table(["aimed at", *(f"{length:,} tokens" for length in by_length)], lines)


def reached(rows):
    """Yield a cell for each aim: whether it was reached, and by what."""
    pairs, every = {}, questions(rows)
    for some, others in compared(rows):
        pairs.setdefault((some[0]["method"], others[0]["method"]), []).append((some, others))

    def best(method, other, kinds, least=0.0):
        found = [pair for pair in pairs.get((method, other), ()) if round(sparsity(pair[0]), 2) >= least]
        return max(found, key=lambda pair: points(*pair, kinds), default=None)

    yield cell(best("static-nll", "dense", every, 0.5), every, lambda change, _: change >= -1)
    trained = best("routed", "dense", every, 0.65) or best("routed", "dense", every)
    yield cell(trained, every, lambda change, ratio: change >= -1 and round(ratio, 2) >= 0.65)
    yield cell(best("routed", "static-nll", LOOK_UPS), LOOK_UPS, lambda change, _: change >= 5)
    pair = best("routed-ends", "routed", every)
    text = cell(pair, every, lambda change, _: abs(change) <= 0.5)
    if pair:
        scores = [[score for row in rows for score in row["scores"]] for rows in pair]
        text += f"; {sum(map(eq, *scores)):,} of {len(scores[0]):,} scores are the same"
    yield text


def cell(pair, families, is_enough):
    """Say whether a difference, at its Ω_MSR, is what was aimed at."""
    if pair is None:
        return "not measured"
    change, ratio = points(*pair, families), sparsity(pair[0])
    return f"{'yes' if is_enough(change[0], ratio) else '**no**'}: {shown(change)}, at Ω_MSR {ratio:.3f}"


def full_layers(row):
    """Write which layers ran full, and how often where it was not always."""
    if "fa_rate" not in row:
        others = {"dense": "all", "random": "others for each input"}.get(row["method"], "none")
        return ", ".join(map(str, row.get("full_layers") or ())) or others
    rates = {layer: rate for layer, rate in row["fa_rate"].items() if rate}
    return ", ".join(layer if rate == 1 else f"{layer} ({rate:.0%})" for layer, rate in rates.items()) or "none"


def kept(ratio, length, pattern):
    """Return the share of dense's KV cache that is kept."""
    return 1 - ratio + ratio * min(1, (pattern["sink"] + pattern["window"]) / length)


def route_table(name=LARGER):
    """Make a line for each method and the layers that it runs full: of all inputs, or of which kinds and lengths."""
    by_length, meta = result(name)
    rows = [row for some in by_length.values() for row in some]
    names, found = compare.short_names(rows), {}
    for row in sorted(rows, key=lambda row: row["sparsity"]):
        found.setdefault(compare.label(row, names), []).append(row)
    lines = []
    for name, mine in found.items():
        for inputs, layers, some in routes(mine):
            ratio = 0 if some[0]["method"] in BY_HEAD else sparsity(some)  # their cache is dense
            shares = [f"{kept(ratio, length, meta['settings']['sparse']):.2f}" for length in by_length]
            lines.append([name, inputs, layers, *shares])
    rankings = "\n\n".join(
        prose(f"""
        {title[0].upper() + title[1:]}: layers by need are {", ".join(map(str, facts["ranking"]))}.
        The default budget is {facts["budget"]:g}.
        """)
        for title, facts in meta["adapters"].items()
        if "ranking" in facts
    )
    columns = ["method", "inputs", "full layers", *(f"KV cache ÷ dense's, {length:,} tokens" for length in by_length)]
    return table(columns, lines) + f"\n{rankings}\n"


def routes(rows):
    """Yield the inputs that run alike, which layers they run full, and their rows; by class, if that is many."""
    alike = {}
    for row in rows:
        alike.setdefault(full_layers(row), []).append(row)
    if len(alike) == 1:
        yield "all", *next(iter(alike.items()))
    elif len(alike) <= FEW:
        for layers, some in alike.items():
            yield by_kind(some), layers, some
    else:
        classes = {}
        for row in rows:
            classes.setdefault(row["task_class"], []).append(row)
        for name, some in classes.items():
            layers = some[0]["fa_rate"]
            mean = {layer: round(fmean(row["fa_rate"][layer] for row in some), 2) for layer in layers}
            yield name, full_layers({"fa_rate": mean}), some


def by_kind(rows):
    """Say which lengths and families rows are of."""
    found = {}
    for row in rows:
        found.setdefault(row["seq_len"], []).append(row["task"])
    return "; ".join(f"{length:,} tokens: {words(families)}" for length, families in found.items())


def pages():
    """Return {name of the result file: text} of the pages by kind of question."""
    return {name: _page(name) for name in (LARGER, SMALLER)}


def _page(name):
    by_length, meta = result(name)
    parts = [
        f"""
        {meta["settings"]["model"]}, {meta["settings"]["dtype"]}, weights: {meta["weights"]}. What the model generated,
        by kind of question; [real-models.md](../../docs/real-models.md) says what it means, and
        [evaluation.md](../../docs/evaluation.md) what is asked. {tables.MARKED}
        """
    ]
    for rows in by_length.values():
        for title, *cells in tables.tables(rows):
            if title.startswith("Accuracy at"):
                parts += [f"## {title}", table(*cells)]
    return page(name, "A real model, by kind of question", *parts)


def score_points(rows):
    """Return Ω_MSR, mean score and half of the interval beside dense of each method: {method: those of its sets}."""
    groups, found = compare.by_method(rows), {}
    dense = next(some for key, some in groups.items() if key[1] == "dense")
    for each, some in zip(compare.summary(rows), groups.values(), strict=True):
        width = 0 if some is dense else points(some, dense, questions(rows))[1] / 100
        found.setdefault(each["method"], []).append((each["sparsity"], each["accuracy"], width))
    return found


#: How methods are drawn: a marker, and their name.
LOOKS = {
    "dense": ("o", "dense"),
    "sparse": ("o", "sparse"),
    "static-nll": ("o", "calibrated layers"),
    "routed": ("D", "trained"),
    "routed-ends": ("x", "trained, by the ends"),
    "head": ("P", "KV heads, trained"),
    "head-static": ("h", "fixed KV heads"),
    "static": ("s", "layers chosen greedily"),
    "random": ("^", "random layers"),
}


def images():
    """Plot mean score over Ω_MSR: a row for each model, a panel for each length."""
    import matplotlib.pyplot as plt

    models = [result(name) for name in (LARGER, SMALLER)]
    columns = max(len(by_length) for by_length, _ in models)
    size = (3.6 * columns, 3.4 * len(models))
    figure, panels = plt.subplots(len(models), columns, figsize=size, layout="constrained", sharey="row", squeeze=False)
    for row, (by_length, meta) in zip(panels, models, strict=True):
        for axes in row[len(by_length) :]:
            axes.set_visible(False)
        for axes, (length, rows) in zip(row, by_length.items(), strict=False):
            draw(axes, score_points(rows))
            axes.set_title(f"{meta['settings']['model'].split('/')[-1]}, {length:,} tokens", size=9)
        row[0].set_ylabel("mean score of generated answers")
    named = {name: mark for axes in panels.flat for mark, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    panels[0][0].legend(named.values(), named.keys(), frameon=False, fontsize=9, loc="lower left")
    save(figure, "real_models")


def draw(axes, found):
    """Draw the methods of one length, and a line through the best calibrated layers of each number."""
    line = dict(sorted(point[:2] for method in ("dense", "static-nll", "sparse") for point in found[method]))
    axes.plot(line.keys(), line.values(), color=COLOURS["static-nll"], zorder=1)
    for method, (marker, name) in LOOKS.items():
        if method in found:
            ratios, means, widths = zip(*found[method], strict=True)
            axes.errorbar(ratios, means, widths, fmt=marker, color=COLOURS[method], label=name, capsize=3)
    axes.set(xlabel="mean Ω_MSR", xlim=(-0.03, 1.03), ylim=(0, None))
    axes.grid(alpha=0.3)
