"""Makes long-context tasks: facts hidden in real source text, questions at the end, exact answers.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flux_attention.tasks.words import Words


@dataclass(frozen=True)
class Episode:
    """Holds lines to hide in the text, in this order, and questions about them with their answers."""

    facts: list[str]
    questions: list[tuple[str, str]]


def needles(words: Words, keys: int = 1, values: int = 1, questions: int = 1) -> Episode:
    """Make ``keys`` keys with one code each, but the first ``questions`` with ``values`` codes."""
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
    """Make hosts in cities, and guests who stay with them; ``hint`` is the share of guest lines that name the city."""
    hosts = [(words.draw("person"), words.draw("city")) for _ in range(pairs)]
    guests = [(words.draw("person"), *words.rng.choice(hosts)) for _ in range(pairs)]
    facts = [f"{host} lives in {city}." for host, city in hosts]
    for guest, host, city in guests:
        facts.append(f"{guest} is a guest of {host} in {city if words.rng.random() < hint else 'secret'}.")
    asked = [(f"In which city is {guest}?", city) for guest, _, city in guests[:questions]]
    return Episode(facts, asked)


def count(words: Words, questions: int = 1, max_rings: int = 8) -> Episode:
    """Make two bells, each ringing one to ``max_rings`` times."""
    facts, asked = [], []
    for index in range(2):
        city, times = words.draw("city"), words.rng.randint(1, max_rings)
        facts += [f"The bell of {city} rings."] * times
        if index < questions:
            asked.append((f"How many times does the bell of {city} ring?", str(times)))
    words.rng.shuffle(facts)
    return Episode(facts, asked)


def copy(words: Words, length: int = 48, questions: int = 1) -> Episode:
    """Make two passages of ``length`` random words."""
    facts, asked = [], []
    for index in range(2):
        title, passage = words.key(), " ".join(words.any_words(length))
        facts.append(f"Passage {title}: {passage}")
        if index < questions:
            asked.append((f"Repeat passage {title}:", passage))
    words.rng.shuffle(facts)
    return Episode(facts, asked)


def multi_query(words: Words, keys: int = 16, asked: int = 4) -> Episode:
    """Make ``keys`` keys with one code each, ``asked`` of which one question asks for."""
    pairs = [(words.key(), words.code()) for _ in range(keys)]
    facts = [f"The secret code of the {key} is {code}." for key, code in pairs]
    words.rng.shuffle(facts)
    names = ", ".join(f"the {key}" for key, _ in pairs[:asked])
    return Episode(facts, [(f"What are the secret codes of {names}?", ", ".join(code for _, code in pairs[:asked]))])


def variable_tracking(words: Words, chains: int = 3, hops: int = 4) -> Episode:
    """Make chains of variables that take each other's value; one question asks for all that have one chain's."""
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
    """Make lists in which ``common`` words occur ten times as often as all others."""
    pool = words.distinct()
    often = 0.3 * length / (common + (len(pool) - common) / 10)  # a word and its share of a line take about 1.5 tokens
    counts = {word: max(1, round(often if place < common else often / 10)) for place, word in enumerate(pool)}
    counts |= {word: max(3, counts[word]) for word in pool[:common]}
    question = f"Which {common} words are the most common in the lists, in alphabetical order?"
    return _word_lists(words, counts, question, sorted(pool[:common]))


def frequent_words(words: Words, length: int, asked: int = 3) -> Episode:
    """Make lists of thirty words, whose counts fall with the square of their rank."""
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
