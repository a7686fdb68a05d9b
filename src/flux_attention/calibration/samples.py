"""The samples that layers are ranked and budgets judged by: generated questions, or a user's own questions or text."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flux_attention.config import FluxConfig
from flux_attention.errors import CalibrationError
from flux_attention.patterns import sparse_pattern
from flux_attention.tasks.corpus import local_corpus
from flux_attention.tasks.questions import NATURAL, Question, as_sample, has_chat, make_question
from flux_attention.tasks.samples import Haystack, Sample
from flux_attention.validation import check_known

#: Generated samples that judge have seeds from this one on.
JUDGED_SEED = 10_000


@dataclass(frozen=True)
class CalibrationSet:
    """
    The samples that layers are chosen by.

    Attributes
    ----------
    ranked : list of Sample
        By which layers are ranked.
    judged : dict of str to list of Sample
        By which budgets are judged, by family.
    settings : dict
        What they depend on: results of other settings are not mixed with them.
    """

    ranked: list[Sample]
    judged: dict[str, list[Sample]]
    settings: Mapping[str, Any]


def generated_samples(
    tokenizer, families: Sequence[str], length: int, samples: int, judged: int, chat: bool | None = None
) -> CalibrationSet:
    """
    Make questions of the calibration split, hidden in local text.

    Parameters
    ----------
    families : sequence of str
        Of ``questions.NATURAL``.
    length : int
        Tokens of a prompt.
    samples : int
        By which layers are ranked; families take turns.
    judged : int
        Of each family, by which budgets are judged.
    chat : bool, optional
        Whether prompts go through the chat template; default: where there is one.
    """
    check_known("families", families, NATURAL)
    corpus = local_corpus("calibration")

    def make(family: str, seed: int) -> Sample:
        return as_sample(make_question(family, corpus, tokenizer, length, seed, chat), tokenizer, chat)

    settings = dict(
        families=list(families), length=length, samples=samples, judged=judged, chat=has_chat(tokenizer, chat)
    )
    return CalibrationSet(
        [make(families[index % len(families)], index) for index in range(samples)],
        {family: [make(family, JUDGED_SEED + index) for index in range(judged)] for family in families},
        settings,
    )


def given_samples(tokenizer, questions: Sequence[Question], length: int, chat: bool | None = None) -> CalibrationSet:
    """
    Make samples of a user's own questions: every second one ranks layers, the others judge budgets.

    Raises
    ------
    CalibrationError
        For fewer than two questions of a family, or one whose prompt and answer have more than ``length`` tokens.
    """
    families: dict[str, list[Sample]] = {}
    for number, question in enumerate(questions, 1):
        sample = as_sample(question, tokenizer, chat)
        if len(sample.input_ids) > length:
            raise CalibrationError(
                f"record {number} has {len(sample.input_ids)} tokens, expected at most {length}: shorten it, or raise "
                "the length, if the model reads so many"
            )
        families.setdefault(question.family, []).append(sample)
    if few := [family for family, some in families.items() if len(some) < 2]:
        raise CalibrationError(
            f"{few} have a single record, expected two or more: half rank layers, half judge budgets"
        )
    digest = hashlib.sha256(b"".join(s.input_ids.tobytes() for some in families.values() for s in some)).hexdigest()
    return CalibrationSet(
        [sample for some in families.values() for sample in some[::2]],
        {family: some[1::2] for family, some in families.items()},
        dict(records=digest, chat=has_chat(tokenizer, chat)),
    )


def text_samples(tokenizer, texts: Sequence[str], length: int, samples: int, judged: int) -> CalibrationSet:
    """
    Cut samples from a user's own texts, which are scored by the loss of their second half; no answers are judged.

    Raises
    ------
    CalibrationError
        If the texts are too short for one sample.
    """
    haystack, rng = Haystack(texts, tokenizer), random.Random("calibration")

    def cut(count: int) -> list[Sample]:
        try:
            windows = [haystack.window(rng, length)[0] for _ in range(count)]
        except ValueError as error:
            raise CalibrationError(f"{error}; give more text, or shorter samples") from None
        return [Sample(window, [(length // 2, length)], "text") for window in windows]

    digest = hashlib.sha256(haystack.tokens.tobytes()).hexdigest()
    return CalibrationSet(
        cut(samples), {"text": cut(judged)}, dict(text=digest, length=length, samples=samples, judged=judged)
    )


def check_length(config: FluxConfig, length: int, positions: int | None) -> None:
    """
    Refuse samples that sparse layers see whole, or that are longer than the model's positions.

    Raises
    ------
    CalibrationError
        With both numbers.
    """
    seen = sparse_pattern(config).kept(2**28)
    if length <= 2 * seen:
        raise CalibrationError(
            f"samples of {length} tokens are too short: sparse layers keep {seen} of them, expected samples more than "
            "twice as long"
        )
    if positions and length > positions:
        raise CalibrationError(
            f"samples of {length} tokens do not fit into the model's {positions} positions: shorten them"
        )
