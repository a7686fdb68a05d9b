"""Groups result rows by method, and compares methods: sample by sample, and with all others."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, variance
from typing import Any

#: What tells methods apart in rows of one length.
KIND = ("method", "routers", "budget", "force")


def by_method(rows: list[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    """Group the rows by length, method, adapter, budget and forced routes."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["seq_len"], *(row.get(fact) for fact in KIND)), []).append(row)
    return groups


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Average each method, adapter and length.

    Returns
    -------
    list of dict
        ``accuracy`` of the questions, ``perplexity`` of plain text, ``sparsity`` (Ω_MSR), ``kv`` (what the prompts keep
        in the KV cache, a share of dense) and ``seconds`` a sample; None where it was not measured.
    """
    found = []
    for (length, *kind), some in by_method(rows).items():
        found.append(
            dict(
                seq_len=length,
                **dict(zip(KIND, kind, strict=True)),
                accuracy=_mean(some, "accuracy"),
                perplexity=_mean(some, "perplexity"),
                sparsity=mean_sparsity(some),
                kv=_kv(some),
                seconds=_mean(some, "seconds") if all("seconds" in row for row in some) else None,
            )
        )
    return found


def _mean(rows: list[dict[str, Any]], fact: str) -> float | None:
    known = [row[fact] for row in rows if fact in row]
    return fmean(known) if known else None


def _kv(rows: list[dict[str, Any]]) -> float | None:
    if any("kv_bytes" not in row for row in rows):  # of earlier versions, or of heads, whose cache is dense
        return None
    return sum(row["kv_bytes"] for row in rows) / sum(row["baseline_kv_bytes"] for row in rows)


def mean_sparsity(rows: list[dict[str, Any]]) -> float:
    """Average Ω_MSR."""
    return fmean(row["sparsity"] for row in rows)


def frontier(means: list[dict[str, Any]]) -> list[bool]:
    """
    Say which methods of one length are on the frontier: no other one is as sparse, and answers as much or more.

    Parameters
    ----------
    means : list of dict
        As ``summary`` makes them. Where nothing was asked, the lower perplexity counts; of equals all are.
    """

    def worth(each: dict[str, Any]) -> tuple[float, float]:
        return each["sparsity"], -each["perplexity"] if each["accuracy"] is None else each["accuracy"]

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one != other and all(mine >= its for mine, its in zip(one, other, strict=True))

    worths = [worth(each) for each in means]
    return [not any(beats(other, mine) for other in worths) for mine in worths]


def find_baseline(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]] | None:
    """
    Find the rows of the method that all others are set beside, among those of one length.

    Parameters
    ----------
    name : str
        A method; or, where it was judged more than once, its label.

    Returns
    -------
    list of dict or None
        None where dense, which is the default, was not judged.

    Raises
    ------
    ValueError
        For any other method that was not judged, or more than once.
    """
    names, groups = short_names(rows), list(by_method(rows).values())
    found = [some for some in groups if name in (some[0]["method"], label(some[0], names))]
    if len(found) == 1:
        return found[0]
    if not found and name == "dense":
        return None
    labels = [label(some[0], names) for some in (found or groups)]
    what = "was judged more than once" if found else "was not judged"
    raise ValueError(f"the baseline {name!r} {what}; expected one of {labels}")


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
        ratio = mean_sparsity(groups[key])
        found += sorted(sets, key=lambda other: abs(mean_sparsity(groups[other]) - ratio))[:1]
    return [other for other in found if other in groups]
