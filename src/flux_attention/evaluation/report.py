"""Writes a report of quality results: one HTML page that needs nothing else, and the same as markdown."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from jinja2 import Environment, FileSystemLoader

from flux_attention.evaluation.savings import nothing_saved

#: A colour that the page replaces by the text's own, light or dark.
INK = "#010203"
COLOURS = {"dense": "#009e73", "sparse": "#888888", "routed": "#d55e00", "static": "#0072b2", "random": "#cc79a7"}
COLOURS |= {"head": "#e69f00", "head-static": "#56b4e9", "best-static": "#004a7c", "best-static-fewer": "#8c564b"}
COLOURS |= {"static-nll": "#f0b400", "routed-ends": "#7b3294", "forced": "#44aa99"}
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=lambda name: name.startswith("report.html"),
    trim_blocks=True,
    keep_trailing_newline=True,
)
#: What the page says first, by the kinds of questions that were asked, and behind that of all.
GENERATED = (
    "Right answers to generated questions: every token of the answer is the most likely one, so that greedy "
    "generation would give it; of lm-eval's tasks the first metric."
)
IN_WORDS = (
    "Answers to questions in words, as the model generates them greedily: a score is the share of the expected strings "
    "that occur in an answer, of summaries and other long answers ROUGE-L, of code how alike the lines are. Prose has "
    "its perplexity. Lengths are those of prompts at most."
)
OF_ALL = (
    "All methods see the same samples. Static and random layers are as many as routed inputs use on average, rounded "
    "up, or as many as a budget leaves. Intervals are about other samples, not about other seeds in training."
)

#: A family or class of which dense has a lower mean score is marked: it has hardly anything to lose.
HARDLY = 0.1
MARK = " *"
MARKED = (
    "What dense answers less than a tenth of has a star: it cannot tell what sparse layers lose, though it counts in "
    "the means."
)


def _svg(figure) -> str:
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in rows))


def short_names(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Find the shortest ends of the adapters' names that tell them apart."""
    names = {row["routers"] for row in rows if row["routers"]}
    parts = max((len(Path(name).parts) for name in names), default=1)
    for count in range(1, parts + 1):
        short = {name: "/".join(Path(name).parts[-count:]) for name in names}
        if len(set(short.values())) == len(names):
            return short
    return {name: name for name in names}


def label(row: dict[str, Any], names: dict[str, str]) -> str:
    """Name a row's method, adapter and budget, for people."""
    text = row["method"] if row.get("force") is None else f"{row['method']} {row['force']}"
    text += f" ({names[row['routers']]})" if row["routers"] else ""
    return text if row.get("budget") is None else f"{text} at {row['budget']:g}"


def _at(length: int | None) -> str:
    """Say at which length generated questions were; lm-eval's tasks have none."""
    return "on lm-eval's tasks" if length is None else f"at {length:,} tokens"


def tokens(length: int | None) -> str:
    """Write a length as a cell of a table."""
    return "" if length is None else f"{length:,}"


#: What tells methods apart in rows of one length.
KIND = ("method", "routers", "budget", "force")


def by_method(rows: list[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    """Group the rows by length, method, adapter, budget and forced routes."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["seq_len"], *(row.get(fact) for fact in KIND)), []).append(row)
    return groups


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average each method, adapter and length: the questions' accuracy, Ω_MSR, and plain text's perplexity."""
    found = []
    for (length, *kind), some in by_method(rows).items():
        answers = [row for row in some if "accuracy" in row]
        plain = [row["perplexity"] for row in some if "perplexity" in row]
        found.append(
            dict(
                seq_len=length,
                **dict(zip(KIND, kind, strict=True)),
                accuracy=fmean(row["accuracy"] for row in answers) if answers else None,
                perplexity=fmean(plain) if plain else None,
                sparsity=_mean_sparsity(some),
            )
        )
    return found


def _mean_sparsity(rows: list[dict[str, Any]]) -> float:
    return fmean(row["sparsity"] for row in rows)


def difference(
    rows: list[dict[str, Any]], others: list[dict[str, Any]]
) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """
    Compare ``rows`` with ``others``, sample by sample, as all methods see the same ones.

    Parameters
    ----------
    rows, others : list of dict
        Rows of one length, method and adapter each.

    Returns
    -------
    points : (float, float) or None
        Mean accuracy minus that of ``others``, in percentage points, and half of its 95 % interval. The mean is over
        the kinds of questions that both have.
    perplexity : (float, float) or None
        Perplexity of plain text over that of ``others``, and half of its 95 % interval.
        Both are None where files of older versions do not hold the samples' scores, or have other samples. Intervals
        are about other samples, not about other seeds in training or other calibration samples.
    """
    measured = {row["task"]: row["scores"] for row in others if "scores" in row}
    changes = {
        row["task"]: [one - other for one, other in zip(row["scores"], measured[row["task"]], strict=True)]
        for row in rows
        if len(row.get("scores", ())) == len(measured.get(row["task"], ())) > 1
    }
    texts = {row["task"] for row in rows if "perplexity" in row or row["task"] == "plain"}
    plain = [change for task in list(changes) if task in texts for change in changes.pop(task)]
    points = perplexity = None
    if changes:
        error = math.sqrt(sum(map(_squared_error, changes.values()))) / len(changes)
        points = 100 * fmean(map(fmean, changes.values())), 100 * 1.96 * error
    if plain:
        ratio = math.exp(fmean(plain))
        perplexity = ratio, ratio * 1.96 * math.sqrt(variance(plain) / len(plain))
    return points, perplexity


def _squared_error(change: list[float]) -> float:
    """
    Return the squared error of the mean of differences between two methods' scores.

    Of right and wrong answers it is that of Agresti and Min (2005): half a sample more in each of the four ways that
    two methods can answer, so that methods which answered alike are not taken for equal. Scores in between differ by
    less than whole answers, so half a sample would outweigh them: their error is that of a mean, by their own spread.
    """
    if not all(each in (-1, 0, 1) for each in change):
        return variance(change) / len(change)
    better, worse, n = change.count(1) + 0.5, change.count(-1) + 0.5, len(change) + 2
    return (better + worse - (better - worse) ** 2 / n) / n**2


_SETS = ("static", "best-static", "best-static-fewer", "random")
#: What each method is set beside, of the same adapter: as many full layers or heads (or one fewer), chosen otherwise.
RIVALS = {"routed": _SETS, "routed-ends": ("routed", *_SETS), "head": ("head-static",), "static-nll": _SETS}
#: Methods whose routers decide, input by input.
ROUTED = ("routed", "routed-ends", "head")


def rivals(groups: dict[tuple, list[dict[str, Any]]], key: tuple) -> list[tuple]:
    """List what a group is set beside: dense, its rivals, and of calibrated sets the one nearest in Ω_MSR."""
    length, method, routers, budget, _ = key
    if method == "dense":
        return []
    own = None if method == "static-nll" else routers  # sets at a budget are of no adapter
    found = [(length, "dense", None, None, None)]
    found += [(length, rival, own, budget, None) for rival in RIVALS.get(method, ())]
    if method in ("routed", "routed-ends"):
        sets = [other for other in groups if other[:2] == (length, "static-nll")]
        ratio = _mean_sparsity(groups[key])
        found += sorted(sets, key=lambda other: abs(_mean_sparsity(groups[other]) - ratio))[:1]
    return [other for other in found if other in groups]


#: Title and heading of the table of ``comparisons``.
DIFFERENCES = "Differences on the same samples, with 95 % intervals"
COMPARED = ["method", "beside", "tokens", "accuracy, points", "perplexity, ratio", "Ω_MSR"]


def comparisons(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Make the lines of a table: every method beside dense, and routers beside their rivals."""
    lines, names, groups = [], short_names(rows), by_method(rows)
    for key, some in groups.items():
        for others in (groups[rival] for rival in rivals(groups, key)):
            points, perplexity = difference(some, others)
            if points or perplexity:
                ratio = f"{perplexity[0]:.3f} ± {perplexity[1]:.3f}" if perplexity else ""
                sparser = _mean_sparsity(some) - _mean_sparsity(others)
                cells = [tokens(key[0]), _points(points), ratio, f"{sparser:+.3f}"]
                lines.append([label(some[0], names), label(others[0], names), *cells])
    return lines


def _points(points: tuple[float, float] | None) -> str:
    return f"{points[0]:+.1f} ± {points[1]:.1f}" if points else ""


def task_classes(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group the rows of answers to questions in words by their task class."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "task_class" in row and "accuracy" in row:
            found.setdefault(row["task_class"], []).append(row)
    return found


def marked(name: str, rows: list[dict[str, Any]]) -> str:
    """Mark the name of a family or class, whose rows of one length these are, if dense hardly answers it."""
    dense = [row["accuracy"] for row in rows if row["method"] == "dense" and "accuracy" in row]
    return name + MARK if dense and fmean(dense) < HARDLY else name


def has_marked(rows: list[dict[str, Any]]) -> bool:
    """Whether a family is marked at any length; of a class that is, one of its families is too."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["seq_len"], row["task"]), []).append(row)
    return any(marked("", some) for some in groups.values())


def class_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Make heading and lines of a table of one length: each method's mean accuracy by task class, and in all."""
    lines, names, classes = [], short_names(rows), task_classes(rows)
    has_prose = any("perplexity" in row for row in rows)
    for each, some in zip(summary(rows), by_method(rows).values(), strict=True):
        mine = task_classes(some)
        means = [fmean(row["accuracy"] for row in mine[name]) if name in mine else None for name in classes]
        numbers = [*means, each["accuracy"], *([each["perplexity"]] if has_prose else []), each["sparsity"]]
        lines.append([label(each, names), *("" if number is None else f"{number:.3f}" for number in numbers)])
    heading = [marked(name, some) for name, some in classes.items()]
    return ["method", *heading, "mean accuracy", *(["prose, perplexity"] if has_prose else []), "mean Ω_MSR"], lines


def class_differences(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Make heading and lines of a table of one length: what each method gains or loses beside dense, by task class."""
    lines, names, groups, classes = [], short_names(rows), by_method(rows), task_classes(rows)
    for key, some in groups.items():
        dense = groups.get((key[0], "dense", None, None, None))
        if dense is not None and some is not dense:
            mine, theirs = task_classes(some), task_classes(dense)
            cells = [_points(difference(mine.get(name, []), theirs.get(name, []))[0]) for name in classes]
            lines.append([label(some[0], names), *cells])
    return ["method", *(marked(name, some) for name, some in classes.items())], lines


def trade_off(rows: list[dict[str, Any]], length: int):
    """Plot mean accuracy over mean Ω_MSR, a point for each method and adapter."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    points: dict[str, list[tuple[float, float]]] = {}
    for each in summary(rows):
        if each["seq_len"] == length and each["accuracy"] is not None:
            points.setdefault(each["method"], []).append((each["sparsity"], each["accuracy"]))
    for method, some in points.items():
        some.sort()
        axes.plot(*zip(*some, strict=True), "o-", color=COLOURS[method], label=method, markersize=6)
    # Real models answer few of some kinds, and differences between methods should be seen.
    top = min(1.03, 1.3 * max((accuracy for some in points.values() for _, accuracy in some), default=1.0) or 1.03)
    axes.set(xlabel="mean Ω_MSR", ylabel="mean accuracy of the questions")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03 * (top / 1.03), top))
    axes.grid(alpha=0.3)
    legend = axes.legend(frameon=False)
    for text in legend.get_texts():
        text.set_color(INK)
    axes.set_title(f"Accuracy and sparsity {_at(length)}", size=11)
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
    image = axes.imshow(rates, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(layers)), layers)
    axes.set_yticks(range(len(some)), [row["task"].replace("_", " ") for row in some])
    axes.set_xlabel("layer")
    axes.set_title(f"Share of full attention, {short_names(rows)[routers]}, {_at(length)}", size=11)
    figure.colorbar(image, ax=axes)
    return figure


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    value = row["accuracy"] if "accuracy" in row else row["perplexity"]
    return f"{value:.3f}" + (f" [{row['low']:.2f}, {row['high']:.2f}]" if row["low"] is not None else "")


def tables(rows: list[dict[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, heading and lines of each table: a summary, then one a length."""
    lines, names = [], short_names(rows)
    for each in summary(rows):
        accuracy = "" if each["accuracy"] is None else f"{each['accuracy']:.3f}"
        plain = "" if each["perplexity"] is None else f"{each['perplexity']:.3f}"
        lines.append([label(each, names), tokens(each["seq_len"]), accuracy, plain, f"{each['sparsity']:.3f}"])
    heading = ["method", "tokens", "mean accuracy", "plain text, perplexity", "mean Ω_MSR"]
    found = [("Summary", heading, lines)]
    if lines := comparisons(rows):
        found.append((DIFFERENCES, COMPARED, lines))
    for length in dict.fromkeys(row["seq_len"] for row in rows):
        some = [row for row in rows if row["seq_len"] == length]
        if task_classes(some):
            found.append((f"Accuracy by task class {_at(length)}", *class_table(some)))
            heading, lines = class_differences(some)
            if lines:
                found.append((f"Differences to dense in points, {_at(length)}, with 95 % intervals", heading, lines))
        columns = list(dict.fromkeys(label(row, names) for row in some))
        by = {(row["task"], label(row, names)): row for row in some}
        named = {}
        for task in _names(some):
            name = task if length is None else task.replace("_", " ")
            named[task] = marked(name, [row for row in some if row["task"] == task])
        lines = [[name, *(_cell(by.get((task, column))) for column in columns)] for task, name in named.items()]
        found.append((f"Accuracy {_at(length)}, with 95 % intervals", ["task", *columns], lines))
        routed = [column for column in columns if column.startswith("routed")]
        lines = [
            [name, *(f"{by[task, column]['sparsity']:.3f}" for column in routed)]
            for task, name in named.items()
            if all((task, column) in by for column in routed)
        ]
        if routed:
            found.append((f"Ω_MSR of routed inputs {_at(length)}", ["task", *routed], lines))
    return found


def figures(rows: list[dict[str, Any]]) -> list[str]:
    """Draw each length's trade-off, where questions were asked, and the routers' heat maps, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    found = []
    with plt.rc_context({"svg.fonttype": "none", "font.size": 10, "svg.hashsalt": "flux", **ink}):
        for length in dict.fromkeys(row["seq_len"] for row in rows):
            here = [row for row in rows if row["seq_len"] == length]
            if any("accuracy" in row for row in here):  # plain text has none
                found.append(_svg(trade_off(rows, length)))
            some = [row for row in here if _of_routers(row)]
            for method, routers in dict.fromkeys((row["method"], row["routers"]) for row in some):
                shown = [row for row in rows if not _of_routers(row) or row["method"] == method]
                found.append(_svg(heat_map(shown, length, routers)))
    return found


def write_report(results: str | Path, folder: str | Path) -> tuple[Path, Path]:
    """
    Write ``report.html`` and ``report.md`` of a quality.json.

    Parameters
    ----------
    results : str or Path
        What ``flux-attention eval`` wrote.
    folder : str or Path
        Where the report goes.

    Returns
    -------
    html, markdown : Path

    Raises
    ------
    ValueError
        If the file has no quality rows.
    """
    data = json.loads(Path(results).read_text(encoding="utf-8"))
    rows = [row for row in data["rows"] if "task" in row and "method" in row]
    if not rows:
        raise ValueError(f"{results} has no quality rows")
    facts = {key: value for key, value in data["meta"].items() if key != "settings"}
    facts |= data["meta"].get("settings", {})
    note = nothing_saved(rows)
    shown = {
        "title": "Quality of routed attention",
        "intro": " ".join(
            text
            for text, is_there in (
                (GENERATED, any("task_class" not in row for row in rows)),
                (IN_WORDS, any("task_class" in row for row in rows)),
                (OF_ALL, True),
                (MARKED, has_marked(rows)),
                (note or "", note is not None),
            )
            if is_there
        ),
        "figures": figures(rows),
        "tables": tables(rows),
        "facts": [
            (key, json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value)
            for key, value in facts.items()
        ],
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "report.html", folder / "report.md"
    for path in paths:
        path.write_text(TEMPLATES.get_template(f"{path.name}.jinja").render(shown), encoding="utf-8")
    return paths
