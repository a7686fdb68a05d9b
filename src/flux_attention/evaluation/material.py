"""Makes the samples that methods are judged on: generated questions of either kind, or a user's own records."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from flux_attention.tasks.corpus import local_corpus
from flux_attention.tasks.encoding import has_chat
from flux_attention.tasks.families import EVERY_FAMILY
from flux_attention.tasks.making import Wanted, make_samples
from flux_attention.tasks.questions import NATURAL, Question, as_sample
from flux_attention.tasks.samples import Haystack, Sample, make_sample
from flux_attention.validation import check_known

#: Samples from this seed on choose static layers, those from 0 on are the report's.
CALIBRATION_SEED = 10_000_000
#: Questions in words of the report start here: the wordings were chosen by looking at the first few.
UNSEEN = 1_000


class Material:
    """
    Makes samples of generated families, by tokens (``tasks.families``) or in words (``tasks.questions``).

    Parameters
    ----------
    tokenizer
        The model's.
    families : sequence of str
        Of ``EVERY_FAMILY`` and ``NATURAL``.
    haystack : Haystack, optional
        The text that families of ``EVERY_FAMILY`` are hidden in; those of ``NATURAL`` have a corpus of their own.
    chat : bool, optional
        Whether questions in words go through the chat template; default: where there is one.

    Raises
    ------
    ValueError
        For unknown families, and families of ``EVERY_FAMILY`` without a haystack.
    """

    def __init__(self, tokenizer, families: Sequence[str], haystack: Haystack | None = None, chat: bool | None = None):
        check_known("families", families, (*EVERY_FAMILY, *NATURAL))
        hidden = [family for family in families if family in EVERY_FAMILY]
        if hidden and haystack is None:
            raise ValueError(f"families {hidden} are hidden in text, but there is none; expected a Haystack")
        self.tokenizer, self.families, self.haystack, self.chat = tokenizer, list(families), haystack, chat
        self._made: dict[tuple, Any] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """Facts that the samples depend on."""
        texts = [] if self.haystack is None else [hashlib.sha256(self.haystack.tokens.tobytes()).hexdigest()]
        facts: dict[str, Any] = {"families": self.families}
        if set(self.families) & set(NATURAL):
            texts.append(local_corpus("test").digest())
            facts["chat"] = has_chat(self.tokenizer, self.chat)
        return {**facts, "text": "+".join(texts)}

    def count(self, family: str, count: int) -> int:
        """Say how many samples ``make`` gives where ``count`` are asked for."""
        return count

    def make(self, family: str, length: int, count: int, seed: int = 0) -> list[Sample]:
        """Make samples of a family, on held-out names, values and texts; each once, as all methods see the same."""
        if family in NATURAL:
            return self._in_words(length, count, seed)[family]
        key = (family, length, count, seed)
        if key not in self._made:
            self._made[key] = [
                make_sample(family, self.haystack, self.tokenizer, length, each, held_out=True)
                for each in range(seed, seed + count)
            ]
        return self._made[key]

    def _in_words(self, length: int, count: int, seed: int) -> dict[str, list[Sample]]:
        """Make the samples of all families in words together, which several processes can share."""
        key, families = (length, count, seed), [family for family in self.families if family in NATURAL]
        if key not in self._made:
            split = "calibration" if seed >= CALIBRATION_SEED else "test"
            first = seed + UNSEEN if split == "test" else seed
            wanted = [Wanted(family, length, first + index) for family in families for index in range(count)]
            samples = make_samples(wanted, split, self.tokenizer, self.chat)
            self._made[key] = {
                family: samples[place * count : (place + 1) * count] for place, family in enumerate(families)
            }
        return self._made[key]


class Records(Material):
    """
    Holds a user's own questions as samples, by their tasks; static layers are chosen on generated ones in words.

    Parameters
    ----------
    tokenizer, chat
        As in ``Material``.
    questions : sequence of Question
    longest : int, optional
        Tokens of a sample at most.

    Attributes
    ----------
    length : int
        Tokens of the longest sample.

    Raises
    ------
    ValueError
        For a record that is too long, with its number.
    """

    def __init__(self, tokenizer, questions: Sequence[Question], longest: int | None = None, chat: bool | None = None):
        self.given: dict[str, list[Sample]] = {}
        for number, question in enumerate(questions, 1):
            sample = as_sample(question, tokenizer, chat)
            if longest is not None and len(sample.input_ids) > longest:
                raise ValueError(
                    f"record {number} has {len(sample.input_ids)} tokens, expected at most {longest}: shorten it, or "
                    "allow more, if the model reads so many"
                )
            self.given.setdefault(question.family, []).append(sample)
        super().__init__(tokenizer, [], chat=chat)
        self.generated = Material(tokenizer, list(NATURAL), chat=chat)
        self.families = list(self.given)
        self.length = max(len(sample.input_ids) for some in self.given.values() for sample in some)

    @property
    def settings(self) -> dict[str, Any]:
        """Facts that the samples depend on."""
        digest = hashlib.sha256()
        for sample in (sample for some in self.given.values() for sample in some):
            digest.update(repr((sample.family, sample.input_ids.tolist(), sample.question.expected)).encode())
        facts = {"families": self.families, "chat": has_chat(self.tokenizer, self.chat)}
        return {**facts, "records": digest.hexdigest()}

    def count(self, family: str, count: int) -> int:
        """See ``Material.count``."""
        return min(count, len(self.given[family]))

    def make(self, family: str, length: int, count: int, seed: int = 0) -> list[Sample]:
        """Return a task's first records; or, to choose static layers on, generated questions of a family."""
        if seed >= CALIBRATION_SEED:
            return self.generated.make(family, length, count, seed)
        return self.given[family][:count]
