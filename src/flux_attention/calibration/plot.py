"""Shows what calibration found: loss and generated answers over the budget, by class of task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any


def by_class(rows: Sequence[Mapping[str, Any]], answered: Sequence[str]) -> list[dict[str, Any]]:
    """
    Sum rows of families up by class of task; families that cannot be judged do not count.

    Parameters
    ----------
    rows : sequence of dict
        As ``Calibrator.judge`` gives them.
    answered : sequence of str
        Families whose generated answers tell something.

    Returns
    -------
    list of dict
        ``task_class``, ``sparsity``, ``full`` layers, ``rise`` of the loss in nats a token above all layers full, of
        the worst family, and mean ``accuracy``, None where nothing is asked; by budget, then class.
    """
    dense = {row["task"]: row for row in rows if row["sparsity"] == 0}
    groups: dict[tuple[float, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["task"] not in answered and dense[row["task"]]["accuracy"] is not None:
            continue
        groups.setdefault((row["sparsity"], row["task_class"]), []).append(row)
    found = []
    for (sparsity, task_class), some in sorted(groups.items()):
        right = [row["accuracy"] for row in some if row["accuracy"] is not None]
        found.append(
            {
                "task_class": task_class,
                "sparsity": sparsity,
                "full": len(some[0]["full_layers"]),
                "rise": max(row["nats"] - dense[row["task"]]["nats"] for row in some),
                "accuracy": fmean(right) if right else None,
            }
        )
    return found


def plot(
    rows: Sequence[Mapping[str, Any]], answered: Sequence[str], budget: float, tolerance: float, path: Path
) -> None:
    """Plot ``by_class`` of ``rows``, with the default budget and the tolerance of the loss."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    points = by_class(rows, answered)
    classes = list(dict.fromkeys(point["task_class"] for point in points))
    with plt.rc_context({"svg.fonttype": "none", "font.size": 9}):
        figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        for key, axis, title in (
            ("rise", axes[0], f"loss above dense, nats a token (dotted: {tolerance:g})"),
            ("accuracy", axes[1], "score of generated answers"),
        ):
            for place, name in enumerate(classes):
                line = [
                    (point["sparsity"], point[key])
                    for point in points
                    if point["task_class"] == name and point[key] is not None
                ]
                if line:
                    axis.plot(*zip(*line, strict=True), marker="o", markersize=3, color=f"C{place}", label=name)
            axis.axvline(budget, color="0.4", linestyle="--", linewidth=1)
            axis.set_title(title, size=9)
            axis.set_xlabel(f"budget: share of sparse layers (dashed: default, {budget:.2f})")
            axis.grid(alpha=0.25)
        axes[0].axhline(tolerance, color="0.4", linestyle=":", linewidth=1)
        axes[0].set_yscale("symlog", linthresh=max(4 * tolerance, 0.02), linscale=2)  # small differences decide
        axes[1].set_ylim(-0.02, 1.02)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
        figure.savefig(path)
        plt.close(figure)
