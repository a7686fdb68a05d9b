"""The samples that layers are ranked and budgets judged by: generated questions, or a user's own questions or text."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flux_attention.config import FluxConfig
from flux_attention.errors import CalibrationError
from flux_attention.patterns import sparse_pattern
from flux_attention.tasks.making import Wanted, make_samples
from flux_attention.tasks.questions import NATURAL, Question, as_sample, has_chat
from flux_attention.tasks.samples import Sample
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
        How they were made.
    """

    ranked: list[Sample]
    judged: dict[str, list[Sample]]
    settings: Mapping[str, Any]

    def digest(self) -> str:
        """Hash the samples' tokens (SHA-256): figures of other samples are not mixed with them."""
        found = hashlib.sha256()
        for sample in (*self.ranked, *itertools.chain.from_iterable(self.judged.values())):
            found.update(repr((sample.family, sample.answers)).encode() + sample.input_ids.tobytes())
        return found.hexdigest()


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

    Raises
    ------
    CalibrationError
        For fewer samples than families.
    """
    check_known("families", families, NATURAL)
    if samples < len(families):
        raise CalibrationError(
            f"{samples} samples in all cannot rank layers by {len(families)} families: expected at least one of each, "
            f"{len(families)}, or name fewer families"
        )
    ranked = [Wanted(families[index % len(families)], length, index) for index in range(samples)]
    judging = [Wanted(family, length, JUDGED_SEED + index) for family in families for index in range(judged)]
    made = make_samples([*ranked, *judging], "calibration", tokenizer, chat)
    settings = dict(
        families=list(families), length=length, samples=samples, judged=judged, chat=has_chat(tokenizer, chat)
    )
    by_family = {
        family: made[samples + place * judged : samples + (place + 1) * judged] for place, family in enumerate(families)
    }
    return CalibrationSet(made[:samples], by_family, settings)


def given_samples(
    tokenizer, questions: Sequence[Question], config: FluxConfig, length: int, chat: bool | None = None
) -> CalibrationSet:
    """
    Make samples of a user's own questions: every second one ranks layers, the others judge budgets.

    Those that are too short for sparse layers to differ are left out.

    Raises
    ------
    CalibrationError
        For fewer than two questions of a family that are long enough, or one whose prompt and answer have more than
        ``length`` tokens.
    """
    families: dict[str, list[Sample]] = {}
    least, left_out = 2 * _seen(config), 0
    for number, question in enumerate(questions, 1):
        sample = as_sample(question, tokenizer, chat)
        if len(sample.input_ids) > length:
            raise CalibrationError(
                f"record {number} has {len(sample.input_ids)} tokens, expected at most {length}: shorten it, or raise "
                "the length, if the model reads so many"
            )
        some = families.setdefault(question.family, [])
        if len(sample.prompt_ids) > least:
            some.append(sample)
        else:
            left_out += 1
    if few := [family for family, some in families.items() if len(some) < 2]:
        raise CalibrationError(
            f"{few} have fewer than two records with prompts of more than {least} tokens, of which sparse layers see "
            "half at most: half of the records rank layers, half judge budgets"
        )
    if not families:
        raise CalibrationError("there is no record; expected two or more of each kind")
    return CalibrationSet(
        [sample for some in families.values() for sample in some[::2]],
        {family: some[1::2] for family, some in families.items()},
        dict(length=length, chat=has_chat(tokenizer, chat), left_out=left_out),
    )


def text_samples(tokenizer, texts: Sequence[str], length: int, samples: int, judged: int) -> CalibrationSet:
    """
    Cut samples from a user's own texts, which are scored by the loss of their second half; no answers are judged.

    The first half of the texts ranks layers, the second judges budgets.

    Raises
    ------
    CalibrationError
        If the texts are too short for one sample.
    """
    tokens = np.asarray(tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"], np.int32)
    halves, rng = np.split(tokens, [len(tokens) // 2]), random.Random("calibration")
    if len(halves[0]) < length:
        raise CalibrationError(
            f"half of the text has {len(halves[0])} tokens, fewer than a sample's {length}; give more text, or shorter "
            "samples"
        )

    def cut(half: np.ndarray) -> Sample:
        start = rng.randrange(len(half) - length + 1)
        window = half[start : start + length].copy()
        if tokenizer.bos_token_id is not None:
            window[0] = tokenizer.bos_token_id
        return Sample(window, [(length // 2, length)], "text")

    ranked, judging = ([cut(half) for _ in range(count)] for half, count in zip(halves, (samples, judged), strict=True))
    return CalibrationSet(ranked, {"text": judging}, dict(length=length, samples=samples, judged=judged))


def _seen(config: FluxConfig) -> int:
    """Return the most tokens that sparse layers keep."""
    return sparse_pattern(config).kept(2**28)


def check_length(config: FluxConfig, length: int, positions: int | None) -> None:
    """
    Refuse samples that sparse layers see whole, or that are longer than the model's positions.

    Raises
    ------
    CalibrationError
        With both numbers.
    """
    seen = _seen(config)
    if length <= 2 * seen:
        raise CalibrationError(
            f"samples of {length} tokens are too short: sparse layers keep {seen} of them, expected samples more than "
            "twice as long"
        )
    if positions and length > positions:
        raise CalibrationError(
            f"samples of {length} tokens do not fit into the model's {positions} positions: shorten them"
        )
