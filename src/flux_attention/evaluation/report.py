"""Writes a report of quality results: one HTML page that needs nothing else, and the same as markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flux_attention.evaluation.figures import heat_maps, trade_offs
from flux_attention.evaluation.pages import TEMPLATES
from flux_attention.evaluation.savings import nothing_saved
from flux_attention.evaluation.tables import GLANCE, about_marked, lengths, tables

#: What the page says of how it was measured, by the kinds of questions that were asked, and behind that of all.
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


def model_of(meta: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Name the model that was judged."""
    return meta.get("settings", {}).get("model") or rows[0].get("model") or "a model"


def write_report(
    results: str | Path, folder: str | Path, baseline: str = "dense", command: str | None = None
) -> tuple[Path, Path]:
    """
    Write ``report.html`` and ``report.md`` of a quality.json.

    Parameters
    ----------
    results : str or Path
        What ``flux-attention eval`` wrote.
    folder : str or Path
        Where the report goes.
    baseline : str
        The method that all others are set beside, see ``compare.find_baseline``.
    command : str, optional
        The command that asks for the report; default: that by which the results were measured.

    Returns
    -------
    html, markdown : Path

    Raises
    ------
    ValueError
        If the file has no quality rows, or not those of the baseline.
    """
    data = json.loads(Path(results).read_text(encoding="utf-8"))
    rows = [row for row in data["rows"] if "task" in row and "method" in row]
    if not rows:
        raise ValueError(f"{results} has no quality rows; name what flux-attention eval wrote")
    facts = {key: value for key, value in data["meta"].items() if key not in ("settings", "command")}
    facts |= data["meta"].get("settings", {})
    made, glances = tables(rows, baseline), len(lengths(rows))
    shown = {
        "title": model_of(data["meta"], rows),
        "command": command or data["meta"].get("command"),
        "notes": [note for note in (nothing_saved(rows), about_marked(rows), GLANCE) if note],
        "about": " ".join(
            text
            for text, is_there in (
                (GENERATED, any("task_class" not in row for row in rows)),
                (IN_WORDS, any("task_class" in row for row in rows)),
                (OF_ALL, True),
            )
            if is_there
        ),
        "trade_offs": trade_offs(rows, baseline),
        "heat_maps": heat_maps(rows),
        "glances": made[:glances],
        "tables": made[glances:],
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
