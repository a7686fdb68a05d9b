"""Runs a whole calibration, from a model to an adapter that is a ranking of its layers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from flux_attention import adapters
from flux_attention.calibration.calibrator import PLOT_FILE, TOLERANCE, Calibrator, Progress, answered, choose_budget
from flux_attention.calibration.plot import plot
from flux_attention.calibration.samples import check_length, generated_samples, given_samples, text_samples
from flux_attention.config import FluxConfig
from flux_attention.hf.attach import attach
from flux_attention.hf.support import check_head, max_positions
from flux_attention.tasks.questions import NATURAL, Question


def calibrate(
    model,
    tokenizer,
    output: str | os.PathLike | None = None,
    *,
    config: FluxConfig | None = None,
    questions: Sequence[Question] | None = None,
    texts: Sequence[str] | None = None,
    families: Sequence[str] = tuple(NATURAL),
    length: int = 4096,
    samples: int = 16,
    judged: int = 16,
    tolerance: float = TOLERANCE,
    greedy: bool = False,
    chat: bool | None = None,
    batch_size: int = 1,
    restart: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> FluxConfig:
    """
    Find, without training, which layers of a model need full attention, and how many of them.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal LM without routers attached.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its tokenizer.
    output : path, optional
        Folder for the adapter (``flux_config.json`` and its card), the figures (``calibration.json``) and their plot;
        a run that was interrupted goes on from what lies there.
    config : FluxConfig, optional
        The patterns and their sizes; default ``FluxConfig()``.
    questions : sequence of Question, optional
        The user's own; default: generated ones of ``families``.
    texts : sequence of str, optional
        The user's own, instead of questions: then budgets are judged by the loss alone.
    families : sequence of str
        Of ``tasks.questions.NATURAL``.
    length : int
        Tokens of a prompt; of ``questions``, at most, with the answer.
    samples : int
        Generated questions by which layers are ranked; families take turns.
    judged : int
        Generated questions of each family by which budgets are judged.
    tolerance : float
        Nats a token by which no family's loss may rise at the default budget.
    greedy : bool
        See ``Calibrator.rank``.
    chat : bool, optional
        Whether prompts go through the chat template; default: where there is one.
    batch_size : int
        Samples a forward.
    restart : bool
        Measure all anew.
    progress : callable
        Told what is being done, how many parts of it are done, and how many there are.

    Returns
    -------
    FluxConfig
        With ``ranking`` and the default ``budget``, for ``attach``.

    Raises
    ------
    CalibrationError
        If samples are too short for sparse layers to differ, or too long for the model; if the model does not answer
        them; if records are too few.
    """
    config = replace(config or FluxConfig(), ranking=None, budget=None)
    check_length(config, length, max_positions(model.config))
    if questions is not None:
        made = given_samples(tokenizer, questions, length, chat)
    elif texts is not None:
        made = text_samples(tokenizer, texts, length, samples, judged)
    else:
        made = generated_samples(tokenizer, families, length, samples, judged, chat)
    folder = None if output is None else Path(output)
    routing = attach(model, config)
    try:
        check_head(routing)
        calibrator = Calibrator(routing, tokenizer, made, batch_size, folder, restart, progress)
        ranking = calibrator.rank(greedy)
        rows = calibrator.judge(ranking)
    finally:
        routing.detach()
    budget = choose_budget(rows, answered(rows), tolerance)
    config = replace(routing.config, ranking=ranking, budget=budget)
    if folder is not None:
        adapters.save(folder, config, nn.ModuleDict())
        plot(rows, answered(rows), budget, tolerance, folder / PLOT_FILE)
    return config
