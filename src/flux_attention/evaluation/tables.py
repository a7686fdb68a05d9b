"""Makes the tables of a report of quality results."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from flux_attention.evaluation.compare import (
    by_method,
    difference,
    find_baseline,
    frontier,
    label,
    mean_sparsity,
    rivals,
    short_names,
    summary,
)

#: A family or class of which dense has a lower mean score is marked: it has hardly anything to lose.
HARDLY = 0.1
MARK = " *"
MARKED = (
    "What dense answers less than a tenth of has a star: it cannot tell what sparse layers lose, though it counts in "
    "the means."
)
LEFT_OUT = (
    "Only at a glance, on the frontier and in the figure it is left out; at a length where dense answers nothing else, "
    "there is neither frontier nor figure."
)


def at(length: int | None) -> str:
    """Say at which length generated questions were; lm-eval's tasks have none."""
    return "on lm-eval's tasks" if length is None else f"at {length:,} tokens"


def tokens(length: int | None) -> str:
    """Write a length as a cell of a table."""
    return "" if length is None else f"{length:,}"


def _points(points: tuple[float, float] | None) -> str:
    return f"{points[0]:+.1f} ± {points[1]:.1f}" if points else ""


ON_FRONTIER = "●"
#: What the table ``at_a_glance`` does not say itself.
FRONTIER = f"{ON_FRONTIER} is the frontier: no other method here is as sparse and answers as much."
GLANCE = (
    f"{FRONTIER} KV ÷ dense is what the prompts keep in "
    "the KV cache, by arithmetic. Seconds are those of a sample in this run, answer and scoring included, by the "
    "host's clock; they are no measure of speed."
)


def standings(rows: list[dict[str, Any]], baseline: str = "dense") -> list[dict[str, Any]]:
    """
    Say how each method of one length stands, from dense to sparse: for programs, and for ``at_a_glance``.

    Returns
    -------
    list of dict
        As ``summary`` makes them, with ``name``, ``points`` (accuracy beside the baseline, and half of its 95 %
        interval; None where they are not known) and ``frontier``. Kinds that dense hardly answers are left out; where
        there are no others, all count, and no method is on the frontier.
    """
    told = telling(rows)
    tells = is_asked(told) or not is_asked(rows)
    rows = told if tells else rows
    names, means = short_names(rows), summary(rows)
    on = frontier(means) if tells else [False] * len(means)
    base = find_baseline(rows, baseline)
    found = []
    for each, some, on_frontier in zip(means, by_method(rows).values(), on, strict=True):
        points = None if base is None or some[0] is base[0] else difference(some, base)[0]
        found.append({"name": label(each, names), **each, "points": points, "frontier": on_frontier})
    return sorted(found, key=lambda each: each["sparsity"])


def at_a_glance(rows: list[dict[str, Any]], baseline: str = "dense") -> tuple[list[str], list[list[str]]]:
    """Make heading and lines of a table of one length, from dense to sparse; without columns of which none is known."""

    def number(fact: str, form: str) -> Callable[[dict[str, Any]], str]:
        return lambda each: "" if each[fact] is None else format(each[fact], form)

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "method": lambda each: each["name"],
        "Ω_MSR": number("sparsity", ".3f"),
        "accuracy": number("accuracy", ".3f"),
        f"points beside {baseline}": lambda each: _points(each["points"]),
        "perplexity": number("perplexity", ".3f"),
        "KV ÷ dense": number("kv", ".2f"),
        "s a sample": number("seconds", ".3g"),
        ON_FRONTIER: lambda each: ON_FRONTIER if each["frontier"] else "",
    }
    cells = {name: [cell(each) for each in standings(rows, baseline)] for name, cell in columns.items()}
    shown = {name: some for name, some in cells.items() if any(some)}
    return list(shown), list(map(list, zip(*shown.values(), strict=True)))


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
                sparser = mean_sparsity(some) - mean_sparsity(others)
                cells = [tokens(key[0]), _points(points), ratio, f"{sparser:+.3f}"]
                lines.append([label(some[0], names), label(others[0], names), *cells])
    return lines


def task_classes(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group the rows of answers to questions in words by their task class."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "task_class" in row and "accuracy" in row:
            found.setdefault(row["task_class"], []).append(row)
    return found


def hardly_answered(rows: list[dict[str, Any]]) -> bool:
    """Whether dense hardly answers a family or class, whose rows of one length these are."""
    dense = [row["accuracy"] for row in rows if row["method"] == "dense" and "accuracy" in row]
    return bool(dense) and fmean(dense) < HARDLY


def marked(name: str, rows: list[dict[str, Any]]) -> str:
    """Mark the name of a family or class, whose rows of one length these are, if dense hardly answers it."""
    return name + MARK if hardly_answered(rows) else name


def telling(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out, of rows of one length, the families that dense hardly answers: they tell no methods apart."""
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault(row["task"], []).append(row)
    kept = {task for task, some in families.items() if not hardly_answered(some)}
    return [row for row in rows if row["task"] in kept]


def is_asked(rows: list[dict[str, Any]]) -> bool:
    """Whether any of the rows is of questions; plain text has no accuracy."""
    return any("accuracy" in row for row in rows)


def about_marked(rows: list[dict[str, Any]]) -> str | None:
    """Say what a star is, if a family is marked at any length; of a class that is, one of its families is too."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["seq_len"], row["task"]), []).append(row)
    return f"{MARKED} {LEFT_OUT}" if any(map(hardly_answered, groups.values())) else None


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


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    value = row["accuracy"] if "accuracy" in row else row["perplexity"]
    return f"{value:.3f}" + (f" [{row['low']:.2f}, {row['high']:.2f}]" if row["low"] is not None else "")


def tables(rows: list[dict[str, Any]], baseline: str = "dense") -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, heading and lines of each table: first each length at a glance, then all differences, then more."""
    found = []
    by_length = {length: [row for row in rows if row["seq_len"] == length] for length in lengths(rows)}
    for length, some in by_length.items():
        found.append((f"At a glance {at(length)}", *at_a_glance(some, baseline)))
    if lines := comparisons(rows):
        found.append((DIFFERENCES, COMPARED, lines))
    for length, some in by_length.items():
        found += _of_length(some, length)
    return found


def lengths(rows: list[dict[str, Any]]) -> list[int | None]:
    """List the lengths that were judged, in order."""
    return list(dict.fromkeys(row["seq_len"] for row in rows))


def _of_length(rows: list[dict[str, Any]], length: int | None) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return the tables of a length: by task class, by task, and how sparse routed inputs were."""
    found, names = [], short_names(rows)
    if task_classes(rows):
        found.append((f"Accuracy by task class {at(length)}", *class_table(rows)))
        heading, lines = class_differences(rows)
        if lines:
            found.append((f"Differences to dense in points, {at(length)}, with 95 % intervals", heading, lines))
    columns = list(dict.fromkeys(label(row, names) for row in rows))
    by = {(row["task"], label(row, names)): row for row in rows}
    named = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        name = task if length is None else task.replace("_", " ")
        named[task] = marked(name, [row for row in rows if row["task"] == task])
    lines = [[name, *(_cell(by.get((task, column))) for column in columns)] for task, name in named.items()]
    found.append((f"Accuracy {at(length)}, with 95 % intervals", ["task", *columns], lines))
    routed = [column for column in columns if column.startswith("routed")]
    lines = [
        [name, *(f"{by[task, column]['sparsity']:.3f}" for column in routed)]
        for task, name in named.items()
        if all((task, column) in by for column in routed)
    ]
    if routed:
        found.append((f"Ω_MSR of routed inputs {at(length)}", ["task", *routed], lines))
    return found
