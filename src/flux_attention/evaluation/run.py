"""Runs a whole evaluation: makes questions or takes lm-eval's tasks, measures every method and writes the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flux_attention.config import FluxConfig
from flux_attention.evaluation import quality
from flux_attention.evaluation.base import AdapterEvaluation
from flux_attention.evaluation.methods import DEFAULT_METHODS
from flux_attention.evaluation.report import write_report
from flux_attention.progress import Progress, silent
from flux_attention.tasks.families import EVERY_FAMILY
from flux_attention.tasks.questions import Question
from flux_attention.tasks.samples import Haystack
from flux_attention.tasks.text import local_texts

#: Characters of local text that questions are hidden in.
MAX_CHARS = 5_000_000


def run_evaluation(
    model,
    tokenizer,
    adapters: Sequence[str],
    folder: Path,
    *,
    tasks: Sequence[str] | None = None,
    include_path: Path | None = None,
    text: str | None = None,
    families: Sequence[str] = tuple(EVERY_FAMILY),
    questions: Sequence[Question] | None = None,
    chat: bool | None = None,
    lengths: Sequence[int] = (4096,),
    methods: Sequence[str] = DEFAULT_METHODS,
    config: FluxConfig | None = None,
    budgets: Sequence[float] | None = None,
    force: Sequence[str] = (),
    samples: int = 100,
    calibration: int = 8,
    batch_size: int = 1,
    restart: bool = False,
    baseline: str = "dense",
    command: str | None = None,
    progress: Progress = silent,
) -> tuple[list[dict[str, Any]], Path]:
    """
    Evaluate a model with its adapters into ``folder``: quality.json, report.html and report.md.

    Parameters
    ----------
    model, tokenizer, adapters, families, questions, chat, lengths, methods, config, budgets, force, samples, \
calibration, batch_size
        As in ``quality.Evaluation``.
    tasks, include_path : optional
        As in ``lm_harness.TaskEvaluation``; default: generated questions. Of tasks, static layers and heads are chosen
        on generated questions of the first of ``lengths``.
    text : str, optional
        What questions are hidden in; default: local source text.
    restart : bool
        Begin anew; else go on where a run stopped.
    baseline : str
        The method that the report sets all others beside, see ``compare.find_baseline``.
    command : str, optional
        The command that asks for all this, for the report.
    progress : Progress
        Told how far it is.

    Returns
    -------
    rows : list of dict
    page : Path
        The report.
    """

    shared: dict[str, Any] = dict(config=config, budgets=budgets, force=force)

    def generated() -> quality.Evaluation:
        haystack = None
        if questions is None and set(families) & set(EVERY_FAMILY):
            texts = [text] if text else local_texts(True, site_packages=True, max_chars=MAX_CHARS)
            haystack = Haystack(texts, tokenizer)
        return quality.Evaluation(
            *(model, tokenizer, adapters, haystack, families, lengths, methods, samples, calibration, batch_size),
            **shared,
            chat=chat,
            questions=questions,
        )

    def static(routing, count: int, progress: Progress):
        questions = generated()
        choose = questions.static_heads if routing.config.granularity == "head" else questions.static_layers
        return choose(routing, lengths[0], count, progress)

    if tasks:
        from flux_attention.evaluation.lm_harness import TaskEvaluation  # lm-eval is optional

        evaluation: AdapterEvaluation = TaskEvaluation(
            model, tokenizer, adapters, tasks, methods, samples, batch_size, static, include_path, **shared
        )
    else:
        evaluation = generated()
    rows = quality.run(evaluation, folder, restart, progress, **({} if command is None else {"command": command}))
    results = folder / "quality.json"
    try:
        page, _ = write_report(results, folder, baseline, command)
    except ValueError as error:
        if baseline == "dense":
            raise
        page, _ = write_report(results, folder, command=command)
        raise ValueError(f"{error}; what was measured is in {folder}, with a report beside dense") from None
    return rows, page
