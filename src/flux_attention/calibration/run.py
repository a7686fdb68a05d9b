"""Runs a whole calibration, from a model to an adapter that is a ranking of its layers."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from flux_attention import adapters
from flux_attention.calibration.calibrator import (
    PLOT_FILE,
    ROUNDS,
    ROWS_FILE,
    TOLERANCE,
    Calibrator,
    Progress,
    answered,
    choose_budget,
    choose_threshold,
    dense_of,
)
from flux_attention.calibration.card import card
from flux_attention.calibration.plot import plot
from flux_attention.calibration.samples import check_length, generated_samples, given_samples, text_samples
from flux_attention.calibration.thresholds import unset_threshold
from flux_attention.config import FluxConfig
from flux_attention.errors import CalibrationError
from flux_attention.files import check_writable
from flux_attention.hf.attach import attach
from flux_attention.hf.support import check_head, max_positions
from flux_attention.patterns import Full, full_pattern
from flux_attention.tasks.questions import NATURAL, Question
from flux_attention.validation import check_known

#: Generated questions that rank layers: two of each family.
SAMPLES = 2 * len(NATURAL)


def calibrate(
    model,
    tokenizer,
    output: str | os.PathLike | None = None,
    *,
    config: FluxConfig | None = None,
    questions: Sequence[Question] | None = None,
    texts: Sequence[str] | None = None,
    families: Sequence[str] | None = None,
    length: int = 4096,
    samples: int = SAMPLES,
    judged: int = 16,
    tolerance: float = TOLERANCE,
    rounds: int = ROUNDS,
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
        The patterns and their sizes; default ``FluxConfig()``. For full layers that are block-sparse and are given no
        threshold one is chosen, after the budget; until then they are exact.
    questions : sequence of Question, optional
        The user's own, of which ``samples`` and ``judged`` are not asked; default: generated ones of ``families``.
    texts : sequence of str, optional
        The user's own, instead of questions: then budgets are judged by the loss alone.
    families : sequence of str, optional
        Of ``tasks.questions.NATURAL``; default: all.
    length : int
        Tokens of a prompt; of ``questions``, at most, with the answer.
    samples : int
        Generated questions by which layers are ranked; families take turns.
    judged : int
        Generated questions of each family by which budgets are judged.
    tolerance : float
        Nats a token by which no family's loss may rise at the default budget, with the threshold that is chosen.
    rounds : int
        Of the ranking: 1 leaves out one layer at a time, all others full; more also see what layers do together, for
        layers × (rounds + 1) / 2 evaluations.
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
        With ``ranking`` and the default ``budget``, for ``attach``; ``full`` is exact where no threshold that was tried
        keeps loss and answers.

    Raises
    ------
    CalibrationError
        If samples are too short for sparse layers to differ, or too long for the model; if the model does not answer
        them; if records are too few; if the folder holds an adapter that calibration did not write.
    ValueError
        If several of ``questions``, ``texts`` and ``families`` are given.
    """
    config = replace(config or FluxConfig(), ranking=None, budget=None, decide="prefill")
    folder = None if output is None else Path(output)
    check_arguments(config, length, max_positions(model.config), questions, texts, families, folder)
    check_numbers(samples, judged, rounds, batch_size, tolerance)
    if questions is not None:
        made = given_samples(tokenizer, questions, config, length, chat)
    elif texts is not None:
        made = text_samples(tokenizer, texts, length, samples, judged)
    else:
        made = generated_samples(tokenizer, families or tuple(NATURAL), length, samples, judged, chat)
    pattern, full = unset_threshold(config), config.full
    routing = attach(model, config if pattern is None else replace(config, full=Full().to_dict()))
    try:
        check_head(routing)
        calibrator = Calibrator(routing, tokenizer, made, batch_size, folder, restart, progress)
        calibrator.judge_dense()  # first: it may be all that is needed to refuse
        ranking = calibrator.rank(rounds)
        rows = calibrator.judge(ranking)
        budget = choose_budget(rows, answered(rows), tolerance)
        config = replace(routing.config, ranking=ranking, budget=budget)
        if pattern is not None:
            asked = answered(rows)
            judged_rows = calibrator.judge_thresholds(block_sparse_layers(config), pattern, asked)
            threshold = choose_threshold(judged_rows, dense_of(rows, asked), asked, tolerance)
            if threshold is not None:
                config = replace(config, full={**full, "threshold": threshold})
    finally:
        routing.detach()
    if folder is not None:
        adapters.save(folder, config, nn.ModuleDict())
        card(config, rows, answered(rows)).save(folder / adapters.CARD_FILE)  # also over that of a former run
        plot(rows, answered(rows), budget, tolerance, folder / PLOT_FILE)
    return config


def block_sparse_layers(config: FluxConfig) -> tuple[int, ...]:
    """Return the layers that thresholds are judged in: the full ones, or all where the default budget leaves none."""
    return config.full_layers or tuple(sorted(config.ranking or ()))


def check_arguments(
    config: FluxConfig,
    length: int,
    positions: int | None,
    questions: object = None,
    texts: object = None,
    families: Sequence[str] | None = None,
    folder: Path | None = None,
) -> None:
    """
    Refuse, before anything is loaded or lost, what cannot be calibrated; the parameters are those of ``calibrate``.

    Raises
    ------
    CalibrationError, ValueError
        With what was found, and what to do.
    """
    if sum(given is not None for given in (questions, texts, families)) > 1:
        raise ValueError("questions (records), texts and families are each what to calibrate on: give one of them")
    if families is not None:
        check_known("families", families, NATURAL)
    if config.granularity == "head":
        raise CalibrationError("granularity is 'head', but calibration ranks layers; leave it out")
    full_pattern(config)
    check_length(config, length, positions)
    if folder is None:
        return
    check_writable(folder)
    names = [adapters.WEIGHTS_FILE, "recipe.yaml"] + [adapters.CONFIG_FILE] * (not (folder / ROWS_FILE).exists())
    if found := sorted(name for name in names if (folder / name).exists()):
        raise CalibrationError(
            f"{folder} holds {' and '.join(found)}, which calibration did not write: use another output"
        )


def check_numbers(samples: int, judged: int, rounds: int, batch_size: int, tolerance: float) -> None:
    """
    Refuse numbers of samples or rounds below one, and a tolerance that is none.

    Raises
    ------
    ValueError
        With the name of what is wrong.
    """
    for name, value in {"samples": samples, "judged": judged, "rounds": rounds, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance is {tolerance}, expected nats a token, 0 or more")
