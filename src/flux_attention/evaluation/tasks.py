"""Generated long-context tasks: facts hidden in real source text, questions at the end, exact answers.

Each *family* makes a different demand on attention, so that different inputs can need different layers:

============== ==================================================================================
single_needle  one key, one value
multi_key      sixteen keys, one is asked for
multi_value    one key with several values, all are asked for in order
two_hop        a guest's city is the host's city, which an earlier line gives: two look-ups in one token
count          how often a line occurs: aggregation, not look-up
copy           repeat a long passage verbatim
plain          no question: real text, scored by perplexity
============== ==================================================================================

The first six are retrieval-intensive, ``plain`` is context-holistic (the paper's task classes). The shipped model was
trained on them. Four more, in the style of RULER, it was not trained on:

================= ===============================================================================
multi_query       sixteen keys, four are asked for at once
variable_tracking which variables have a value, through chains of assignments
common_words      the most common words of lists that fill half of the context
frequent_words    the most frequent words, in order, of such lists by Zipf's law
================= ===============================================================================
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flux_attention.evaluation.text import is_held_out
from flux_attention.evaluation.words import ADJECTIVES, CITIES, NOUNS, PEOPLE, split_words


class Words:
    """
    Names and values drawn without repetition, from the training or the held-out vocabulary.

    Held-out names are never keys or asked values in training. They do occur there in copied passages, as a token
    that was never read has no meaning to look up.

    Parameters
    ----------
    rng : random.Random
        Source of randomness.
    held_out : bool
        Which part of every word list, and which five-digit codes, to draw from.

    Raises
    ------
    IndexError
        When a list is used up; the sample is then as dense as the vocabulary allows.
    """

    def __init__(self, rng: random.Random, held_out: bool = False):
        self.rng, self.held_out = rng, held_out
        self.pools = {
            name: rng.sample(words, len(words))
            for name, words in (
                ("person", split_words(PEOPLE, held_out)),
                ("city", split_words(CITIES, held_out)),
            )
        }
        self.adjectives, self.nouns = split_words(ADJECTIVES, held_out), split_words(NOUNS, held_out)
        self.taken: set[str] = set()

    def draw(self, kind: str) -> str:
        """A person or a city that was not drawn yet."""
        return self.pools[kind].pop()

    def key(self) -> str:
        """An adjective and a noun that were not drawn together yet."""
        if len(self.taken) == len(self.adjectives) * len(self.nouns):
            raise IndexError("all keys are drawn")
        while True:
            key = f"{self.rng.choice(self.adjectives)} {self.rng.choice(self.nouns)}"
            if key not in self.taken:
                self.taken.add(key)
                return key

    def code(self) -> str:
        """Five digits."""
        while True:
            code = f"{self.rng.randrange(100_000):05d}"
            if is_held_out(code, 0.2) == self.held_out:
                return code

    def distinct(self) -> list[str]:
        """All names of one word of this part, in random order."""
        pool = sorted(
            {word for words in (ADJECTIVES, NOUNS, PEOPLE, CITIES) for word in split_words(words, self.held_out)}
        )
        return self.rng.sample(pool, len(pool))

    def any_words(self, count: int) -> list[str]:
        """Words of all lists and both splits, with repetition."""
        return [self.rng.choice(self.rng.choice((ADJECTIVES, NOUNS, PEOPLE, CITIES))) for _ in range(count)]


@dataclass(frozen=True)
class Episode:
    """Lines to hide in the text, in this order, and questions about them with their answers."""

    facts: list[str]
    questions: list[tuple[str, str]]


def needles(words: Words, keys: int = 1, values: int = 1, questions: int = 1) -> Episode:
    """``keys`` keys with one code each, but the first ``questions`` with ``values`` codes."""
    facts, asked = [], []
    for index in range(keys):
        key = words.key()
        codes = [words.code() for _ in range(values if index < questions else 1)]
        facts += [f"The secret code of the {key} is {code}." for code in codes]
        if index < questions:
            text = f"What is the secret code of the {key}?" if values == 1 else f"List all codes of the {key}."
            asked.append((text, ", ".join(codes)))
    # Values of one key are told apart by their order, so shuffling keys must keep the order within a key.
    order = sorted(range(len(facts)), key=lambda _: words.rng.random())
    slots: dict[str, list[str]] = {}
    for fact in facts:
        slots.setdefault(fact.split(" is ")[0], []).append(fact)
    shuffled = [slots[facts[i].split(" is ")[0]].pop(0) for i in order]
    return Episode(shuffled, asked)


def two_hop(words: Words, pairs: int = 6, questions: int = 1, hint: float = 0.0) -> Episode:
    """Hosts live in cities; guests stay with hosts. ``hint`` is the share of guest lines that name the city."""
    hosts = [(words.draw("person"), words.draw("city")) for _ in range(pairs)]
    guests = [(words.draw("person"), *words.rng.choice(hosts)) for _ in range(pairs)]
    facts = [f"{host} lives in {city}." for host, city in hosts]
    for guest, host, city in guests:
        facts.append(f"{guest} is a guest of {host} in {city if words.rng.random() < hint else 'secret'}.")
    asked = [(f"In which city is {guest}?", city) for guest, _, city in guests[:questions]]
    return Episode(facts, asked)


def count(words: Words, questions: int = 1, most: int = 8) -> Episode:
    """Two bells, each ringing one to ``most`` times."""
    facts, asked = [], []
    for index in range(2):
        city, times = words.draw("city"), words.rng.randint(1, most)
        facts += [f"The bell of {city} rings."] * times
        if index < questions:
            asked.append((f"How many times does the bell of {city} ring?", str(times)))
    words.rng.shuffle(facts)
    return Episode(facts, asked)


def copy(words: Words, length: int = 48, questions: int = 1) -> Episode:
    """Two passages of ``length`` random words."""
    facts, asked = [], []
    for index in range(2):
        title, passage = words.key(), " ".join(words.any_words(length))
        facts.append(f"Passage {title}: {passage}")
        if index < questions:
            asked.append((f"Repeat passage {title}:", passage))
    words.rng.shuffle(facts)
    return Episode(facts, asked)


def multi_query(words: Words, keys: int = 16, asked: int = 4) -> Episode:
    """``keys`` keys with one code each, ``asked`` of which one question asks for."""
    pairs = [(words.key(), words.code()) for _ in range(keys)]
    facts = [f"The secret code of the {key} is {code}." for key, code in pairs]
    words.rng.shuffle(facts)
    names = ", ".join(f"the {key}" for key, _ in pairs[:asked])
    return Episode(facts, [(f"What are the secret codes of {names}?", ", ".join(code for _, code in pairs[:asked]))])


def variable_tracking(words: Words, chains: int = 3, hops: int = 4) -> Episode:
    """Chains of variables that take each other's value; one question asks for all that have one chain's."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names = iter({"".join(words.rng.choices(letters, k=5)): None for _ in range(2 * chains * (hops + 1) + 20)})
    told = []
    for _ in range(chains):
        chain = [next(names) for _ in range(hops + 1)]
        value = words.code()
        facts = [f"VAR {chain[0]} = {value}"] + [f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(chain)]
        told.append((chain, value, facts))
    order = [index for index, (_, _, facts) in enumerate(told) for _ in facts]
    words.rng.shuffle(order)
    queues = [iter(facts) for _, _, facts in told]
    chain, value, _ = told[0]
    question = f"Which variables have the value {value}, in the order in which they got it?"
    return Episode([next(queues[index]) for index in order], [(question, ", ".join(chain))])


def _word_lists(words: Words, counts: dict[str, int], question: str, answer: Sequence[str]) -> Episode:
    listed = [word for word, times in counts.items() for _ in range(times)]
    words.rng.shuffle(listed)
    lines = [f"Words: {' '.join(listed[start : start + 8])}" for start in range(0, len(listed), 8)]
    return Episode(lines, [(question, ", ".join(answer))])


def common_words(words: Words, length: int, common: int = 5) -> Episode:
    """Lists in which ``common`` words occur ten times as often as all others."""
    pool = words.distinct()
    often = 0.3 * length / (common + (len(pool) - common) / 10)  # a word and its share of a line take about 1.5 tokens
    counts = {word: max(1, round(often if place < common else often / 10)) for place, word in enumerate(pool)}
    counts |= {word: max(3, counts[word]) for word in pool[:common]}
    question = f"Which {common} words are the most common in the lists, in alphabetical order?"
    return _word_lists(words, counts, question, sorted(pool[:common]))


def frequent_words(words: Words, length: int, asked: int = 3) -> Episode:
    """Lists of thirty words, whose counts fall with the square of their rank."""
    pool = words.distinct()[:30]
    first = 0.3 * length / sum(1 / rank**2 for rank in range(1, len(pool) + 1))
    # In the shortest lists too, the words asked for differ in how often they occur.
    counts = {word: max(1, asked + 2 - rank, round(first / rank**2)) for rank, word in enumerate(pool, 1)}
    question = f"Which {asked} words are the most frequent in the lists, the most frequent first?"
    return _word_lists(words, counts, question, pool[:asked])


Maker = Callable[[Words, int], Episode]
#: Each family's episode at evaluation, for a sample of so many tokens: one question.
FAMILIES: dict[str, Maker | None] = {
    "single_needle": lambda words, length: needles(words),
    "multi_key": lambda words, length: needles(words, keys=16),
    "multi_value": lambda words, length: needles(words, keys=6, values=3),
    "two_hop": lambda words, length: two_hop(words),
    "count": lambda words, length: count(words),
    "copy": lambda words, length: copy(words),
    "plain": None,
}
#: Those, and the ones that the shipped model was not trained on.
EVERY_FAMILY: dict[str, Maker | None] = {
    **FAMILIES,
    "multi_query": lambda words, length: multi_query(words),
    "variable_tracking": lambda words, length: variable_tracking(words),
    "common_words": common_words,
    "frequent_words": frequent_words,
}
RETRIEVAL = tuple(name for name, make in FAMILIES.items() if make is not None)


class Haystack:
    """
    Real text as tokens, cut at line ends.

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
        """``length`` consecutive tokens that end with a line, and the offsets in them at which lines end."""
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
    One prompt with its answers.

    Attributes
    ----------
    input_ids : numpy.ndarray
        int32, the whole sequence: text, facts, questions and answers.
    answers : list of (int, int)
        Where each answer stands, [start, end) in tokens; its end token (the newline) is included.
    family : str
        One of ``EVERY_FAMILY``.
    """

    input_ids: np.ndarray
    answers: list[tuple[int, int]]
    family: str

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
    One sample of ``family``, the same for the same seed.

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
    A sample with many episodes and questions of ``families``: dense supervision for training a backbone.

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
