"""Makes samples: an episode's facts hidden in real text, its questions at the end, all as tokens of one length.

For evaluation a sample asks one question, for training a backbone as many as there is room for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flux_attention.tasks.families import (
    EVERY_FAMILY,
    RETRIEVAL,
    Episode,
    copy,
    count,
    multi_query,
    needles,
    two_hop,
    variable_tracking,
)
from flux_attention.tasks.words import Words

if TYPE_CHECKING:
    from flux_attention.tasks.questions import Question


class Haystack:
    """
    Holds real text as tokens, cut at line ends.

    Parameters
    ----------
    texts : sequence of str
        Files' contents.
    tokenizer : transformers.PreTrainedTokenizerFast
        Any fast tokenizer.
    """

    def __init__(self, texts: Sequence[str], tokenizer):
        encodings = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
        self.tokens = np.concatenate([np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings])
        vocabulary = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        ends_line = np.asarray([text.endswith("\n") for text in vocabulary])
        self.ends = np.flatnonzero(ends_line[self.tokens]) + 1

    def window(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ``length`` consecutive tokens that end with a line, and the offsets in them at which lines end."""
        first = int(np.searchsorted(self.ends, length))
        if first >= len(self.ends):
            raise ValueError(f"the text has {len(self.tokens)} tokens, fewer than the {length} asked for")
        end = int(self.ends[rng.randrange(first, len(self.ends))])
        start = end - length
        low, high = np.searchsorted(self.ends, [start, end], side="left")
        return self.tokens[start:end], self.ends[low : high + 1] - start


@dataclass(frozen=True)
class Sample:
    """
    Holds one prompt with its answers.

    Attributes
    ----------
    input_ids : numpy.ndarray
        int32, the whole sequence: text, facts, questions and answers.
    answers : list of (int, int)
        Where each answer stands, [start, end) in tokens; its end token (the newline) is included.
    family : str
        One of ``EVERY_FAMILY``, or of ``questions.NATURAL``.
    question : Question, optional
        What the sample asks in words, where it was made from that.
    """

    input_ids: np.ndarray
    answers: list[tuple[int, int]]
    family: str
    question: Question | None = None

    @property
    def prompt_ids(self) -> np.ndarray:
        """int32, everything before the last answer."""
        return self.input_ids[: self.answers[-1][0]]

    @property
    def answer_ids(self) -> np.ndarray:
        """int32, the last answer."""
        return self.input_ids[slice(*self.answers[-1])]


def compose(
    haystack: Haystack, tokenizer, episode: Episode, length: int, rng: random.Random, family: str = ""
) -> Sample:
    """
    Hide an episode's facts at random lines of real text and put its questions at the end.

    Parameters
    ----------
    length : int
        Tokens of the whole sample, answers included.

    Raises
    ------
    ValueError
        If facts and questions alone are longer than ``length``.
    """
    encode = tokenizer.backend_tokenizer.encode_batch
    pieces = [f"# {fact}\n" for fact in episode.facts]
    for question, answer in episode.questions:
        pieces += [f"# Question: {question}\n# Answer:", f" {answer}\n"]
    ids = [encoding.ids for encoding in encode(pieces, add_special_tokens=False)]
    facts, tail = ids[: len(episode.facts)], ids[len(episode.facts) :]
    prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = length - len(prefix) - sum(map(len, ids))
    if room < 0:
        raise ValueError(
            f"a sample of {length} tokens cannot hold the {length - room} tokens of its facts and questions"
        )
    text, line_ends = haystack.window(rng, room) if room else (np.empty(0, np.int32), np.zeros(1, np.int64))
    places = sorted(rng.choice(line_ends) for _ in facts)
    parts, at = [prefix], 0
    for place, fact in zip(places, facts, strict=True):
        parts += [text[at:place], fact]
        at = place
    parts.append(text[at:])
    start = length - sum(map(len, tail))
    answers = []
    for question, answer in zip(tail[::2], tail[1::2], strict=True):
        start += len(question)
        answers.append((start, start + len(answer)))
        start += len(answer)
        parts += [question, answer]
    return Sample(np.concatenate([np.asarray(part, dtype=np.int32) for part in parts]), answers, family)


def make_sample(family: str, haystack: Haystack, tokenizer, length: int, seed: int, held_out: bool = True) -> Sample:
    """
    Make one sample of ``family``, the same for the same seed.

    For ``plain`` the "answer" is the second half of the text: the first half is the prompt.
    """
    rng = random.Random(f"{family}-{seed}")
    make = EVERY_FAMILY[family]
    if make is None:
        text, _ = haystack.window(rng, length)
        if tokenizer.bos_token_id is not None:
            text = np.concatenate([[tokenizer.bos_token_id], text[1:]]).astype(np.int32)
        return Sample(text, [(length // 2, length)], family)
    return compose(haystack, tokenizer, make(Words(rng, held_out), length), length, rng, family)


def training_sample(
    haystack: Haystack,
    tokenizer,
    length: int,
    rng: random.Random,
    hint: float,
    families: Sequence[str] = RETRIEVAL,
    held_out: bool = False,
) -> Sample:
    """
    Make a sample with many episodes and questions of ``families``: dense supervision for training a backbone.

    ``single_needle`` and ``multi_key`` are one here, with one to sixteen keys. ``hint`` is as in ``two_hop``,
    ``held_out`` as in ``Words``.

    Raises
    ------
    ValueError
        If no family asks anything, or the text is shorter than ``length``.
    """
    words = Words(rng, held_out)
    # Families that are learnt slowly stand here twice.
    makers: list[tuple[str, Callable[[], Episode]]] = [
        ("multi_key", lambda: needles(words, keys=rng.randint(1, 16), questions=rng.randint(1, 8))),
        ("multi_value", lambda: needles(words, rng.randint(1, 6), rng.randint(2, 4), rng.randint(1, 2))),
        ("two_hop", lambda: two_hop(words, pairs=rng.randint(2, 8), questions=8, hint=hint)),
        ("two_hop", lambda: two_hop(words, pairs=rng.randint(2, 8), questions=8, hint=hint)),
        ("count", lambda: count(words, questions=2)),
        ("copy", lambda: copy(words, length=rng.randint(8, 48), questions=rng.randint(1, 2))),
        ("multi_query", lambda: multi_query(words, keys=rng.randint(4, 16), asked=rng.randint(2, 4))),
        ("variable_tracking", lambda: variable_tracking(words, chains=rng.randint(1, 3), hops=rng.randint(1, 4))),
        ("variable_tracking", lambda: variable_tracking(words, chains=rng.randint(1, 3), hops=rng.randint(1, 4))),
    ]
    asked = {"multi_key" if family == "single_needle" else family for family in families}
    chosen = [make for family, make in makers if family in asked]
    # Lines of two lists could not be told apart, so there is one at most, in some samples none.
    lists = [EVERY_FAMILY[family] for family in ("common_words", "frequent_words") if family in asked]
    if not chosen and not lists:
        raise ValueError(f"none of the families {sorted(asked)} asks a question")
    # The lines of the tasks have about three characters a token.
    budget, episodes, used = rng.uniform(0.05, 0.6) * length, [], 0.0
    if lists and (make := rng.choice([*lists, None])) is not None:
        episodes.append(make(words, rng.randint(length // 8, length // 2)))
        used += sum(map(len, episodes[0].facts)) / 3
    while chosen and used < budget:
        try:
            episode = rng.choice(chosen)()
        except IndexError:  # the names are used up
            break
        episodes.append(episode)
        used += sum(map(len, episode.facts)) / 3 + sum(len(q) + len(a) + 20 for q, a in episode.questions) / 3
    while True:
        # Merge the episodes' facts at random, each episode's own order kept.
        order = [index for index, episode in enumerate(episodes) for _ in episode.facts]
        rng.shuffle(order)
        queues = [iter(episode.facts) for episode in episodes]
        questions = [question for episode in episodes for question in episode.questions]
        rng.shuffle(questions)
        try:
            return compose(haystack, tokenizer, Episode([next(queues[i]) for i in order], questions), length, rng)
        except ValueError:  # too long
            if not episodes:
                raise
            episodes.pop()
