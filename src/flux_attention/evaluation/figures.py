"""Draws the figures of a report of quality results, for light and dark pages."""

from __future__ import annotations

import io
from statistics import fmean
from typing import Any

from flux_attention.evaluation.compare import ROUTED, find_baseline, frontier, short_names, summary
from flux_attention.evaluation.tables import at, is_asked, lengths, telling

#: Colours that a page replaces by its own, light or dark: of its text, and of its ground.
INK, GROUND = "#010203", "#fcfdfe"
#: Colours that are readable on either ground: dense is about that of full layers in ``pages``, sparse of sparse ones.
COLOURS = {"dense": "#d9561c", "sparse": "#5b93c7", "routed": "#8e63ce", "routed-ends": "#b57edc"}
COLOURS |= {"static-nll": "#3d9950", "static": "#1f8a8a", "best-static": "#5f8f1f", "best-static-fewer": "#97862a"}
COLOURS |= {"head": "#c2548c", "head-static": "#d8789f", "random": "#8a8a8a", "forced": "#b07d2b"}
MARKERS = {"dense": "s", "sparse": "s", "routed": "D", "routed-ends": "d", "random": "x", "head": "P"}
#: The look of plots, for ``matplotlib.rc_context``.
STYLE = {"svg.fonttype": "none", "font.size": 10, "svg.hashsalt": "flux", "legend.facecolor": "none"} | dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK
)


def svg(figure) -> str:
    """Write a figure as SVG that takes its page's colour of text and ground, and close it."""
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor").replace(GROUND, "var(--ground)")


def shades():
    """Return the colour map of shares of full attention: from the page's ground to the colour of full layers."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    ends = [to_rgba(COLOURS["dense"], alpha) for alpha in (0.0, 1.0)]
    return LinearSegmentedColormap.from_list("full", ends)


def trade_off(rows: list[dict[str, Any]], length: int | None, baseline: str | None = None):
    """Plot mean accuracy over mean Ω_MSR: a point for each method and adapter, the frontier, and the baseline."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    rows = [row for row in rows if row["seq_len"] == length]
    means, points = [each for each in summary(rows) if each["accuracy"] is not None], {}
    for each in means:
        points.setdefault(each["method"], []).append((each["sparsity"], each["accuracy"], each.get("budget")))
    for method, some in points.items():
        some.sort(key=lambda point: point[:2])
        ratios, accuracies, budgets = zip(*some, strict=True)
        look = MARKERS.get(method, "o")
        axes.plot(ratios, accuracies, f"{look}-", color=COLOURS[method], label=method, markersize=6, zorder=3)
        for ratio, accuracy, budget in zip(ratios, accuracies, budgets, strict=True):
            if budget is not None:
                place = dict(xytext=(0, 7), textcoords="offset points", ha="center")
                axes.annotate(f"{budget:g}", (ratio, accuracy), size=8, color=INK, **place)
    best = sorted((each["sparsity"], each["accuracy"]) for each, on in zip(means, frontier(means), strict=True) if on)
    if len(best) > 1:
        axes.step(*zip(*best, strict=True), where="pre", color=INK, alpha=0.45, linewidth=1, label="frontier", zorder=1)
    base = None if baseline is None else find_baseline(rows, baseline)
    if base is not None and any("accuracy" in row for row in base):
        accuracy = fmean(row["accuracy"] for row in base if "accuracy" in row)
        axes.axhline(accuracy, color=INK, linestyle=":", linewidth=1, alpha=0.7, label=f"as {baseline}")
    # Real models answer few of some kinds, and differences between methods should be seen.
    top = min(1.03, 1.3 * max((each["accuracy"] for each in means), default=1.0) or 1.03)
    axes.set(xlabel="mean Ω_MSR: share of sparse layers", ylabel="mean accuracy of the questions")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03 * (top / 1.03), top))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title(f"Accuracy and sparsity {at(length)}", size=11)
    return figure


def _of_routers(row: dict[str, Any]) -> bool:
    """Whether routers decided, and how is known: rows of lm-eval's tasks of older versions do not say."""
    return row["method"] in ROUTED and "fa_rate" in row


def heat_map(rows: list[dict[str, Any]], length: int | None, routers: str):
    """Plot how often each layer (or, on average, each of its heads) ran full attention by these routers, by task."""
    import matplotlib.pyplot as plt

    some = [row for row in rows if _of_routers(row) and (row["seq_len"], row["routers"]) == (length, routers)]
    rates = []
    for row in some:
        by_layer: dict[str, list[float]] = {}
        for unit, rate in row["fa_rate"].items():  # "3", or "3.0" and "3.1" of a layer's heads
            by_layer.setdefault(unit.partition(".")[0], []).append(rate)
        layers = list(by_layer)
        rates.append([fmean(units) for units in by_layer.values()])
    figure, axes = plt.subplots(
        figsize=(1.8 + 0.42 * max(10, len(layers)), 1.2 + 0.34 * len(some)), layout="constrained"
    )
    image = axes.imshow(rates, cmap=shades(), vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(layers)), layers)
    axes.set_yticks(range(len(some)), [row["task"].replace("_", " ") for row in some])
    axes.set_xlabel("layer")
    axes.set_title(f"Share of full attention, {short_names(rows)[routers]}, {at(length)}", size=11)
    figure.colorbar(image, ax=axes)
    return figure


def trade_offs(rows: list[dict[str, Any]], baseline: str) -> list[str]:
    """Draw each length's trade-off, where questions were asked that dense answers, as SVG."""
    told = [telling([row for row in rows if row["seq_len"] == length]) for length in lengths(rows)]
    return _drawn(lambda: [trade_off(some, some[0]["seq_len"], baseline) for some in told if is_asked(some)])


def heat_maps(rows: list[dict[str, Any]]) -> list[str]:
    """Draw the routers' heat maps of each length, as SVG."""

    def draw():
        for length in lengths(rows):
            here = [row for row in rows if row["seq_len"] == length and _of_routers(row)]
            for method, routers in dict.fromkeys((row["method"], row["routers"]) for row in here):
                yield heat_map([row for row in here if row["method"] == method], length, routers)

    return _drawn(draw)


def _drawn(draw) -> list[str]:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        return [svg(figure) for figure in draw()]
