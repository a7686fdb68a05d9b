"""Facts hidden in prose: names, numbers and places to look up, to join, to list and to count."""

from __future__ import annotations

import random

from flux_attention.tasks.corpus import Corpus
from flux_attention.tasks.natural.draft import Draft, hidden, sentences
from flux_attention.tasks.words import Words

ATTRIBUTES = ("access code", "registration number", "serial number", "locker number", "membership number")
FACTS = (
    "The {attribute} of the {key} is {code}.",
    "Please remember that the {attribute} of the {key} is {code}.",
    "The {key} has the {attribute} {code}.",
    "For the {key}, the {attribute} is {code}.",
    "Anyone who asks about the {key} should know that its {attribute} is {code}.",
)
#: A question, and how it is answered.
QUESTIONS = (
    ("What is the {attribute} of the {key} mentioned in the text?", "The {attribute} of the {key} is {code}."),
    (
        "According to the text, which {attribute} does the {key} have?",
        "According to the text, the {attribute} of the {key} is {code}.",
    ),
    ("What is the {attribute} of the {key}? Answer with the number only.", "{code}"),
    ("Find the {attribute} of the {key} in the text above, and reply with the number alone.", "{code}"),
)
OPENINGS = (
    "Read the following text carefully. Some facts are hidden in it, and you will be asked about them.\n\n",
    "A question follows this text. It can be answered from what is said in it.\n\n",
    "Below is a long text. Somewhere in it stands what you need to answer the question at its end.\n\n",
)
HOMES = (
    "{person} lives in {city}.",
    "{person} has a small flat in {city} and lives there all year.",
    "{person} moved to {city} some years ago and lives there now.",
    "These days {person} lives in {city}.",
)
STAYS = (
    "{guest} is staying with {host} this week.",
    "This week {guest} is a guest of {host}.",
    "{guest} is visiting {host} this week and sleeps on the sofa there.",
)


def listed(names: list[str]) -> str:
    """Join names as a sentence lists them."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def in_prose(facts: list[str], corpus: Corpus, rng: random.Random, asked: tuple[str, str], expected: list[str]):
    """Hide facts between the sentences of the corpus's prose, in their order."""
    filler = sentences(corpus.paragraphs(rng))
    context = hidden([f"{fact} " for fact in facts], filler, rng, rng.choice(OPENINGS))
    return Draft(context, asked[0], asked[1], tuple(expected))


def _codes(words: Words, keys: int, values: int = 1) -> tuple[str, list[tuple[str, list[str]]], list[str]]:
    """Draw an attribute, keys with their codes, the first with ``values`` of them, and facts that tell them."""
    attribute = words.rng.choice(ATTRIBUTES)
    told = [(words.key(), [words.code() for _ in range(values if not index else 1)]) for index in range(keys)]
    facts = [
        words.rng.choice(FACTS).format(attribute=attribute, key=key, code=code) for key, codes in told for code in codes
    ]
    words.rng.shuffle(facts)
    return attribute, told, facts


def look_up(corpus: Corpus, words: Words, length: int, keys: int = 1) -> Draft:
    """Ask for one key's code, told among those of ``keys`` keys."""
    attribute, told, facts = _codes(words, keys)
    key, (code,) = told[0]
    asked = tuple(t.format(attribute=attribute, key=key, code=code) for t in words.rng.choice(QUESTIONS))
    return in_prose(facts, corpus, words.rng, asked, [code])


def all_values(corpus: Corpus, words: Words, length: int, keys: int = 4, values: int = 3) -> Draft:
    """Ask for all the codes of one key."""
    attribute, told, facts = _codes(words, keys, values)
    key, codes = told[0]
    codes = sorted(codes, key=lambda code: next(i for i, fact in enumerate(facts) if code in fact))
    question = words.rng.choice(
        (
            f"The text gives {values} {attribute}s of the {key}. What are they?",
            f"List all {values} {attribute}s of the {key} that the text mentions.",
        )
    )
    answer = f"The {attribute}s of the {key} are {listed(codes)}."
    return in_prose(facts, corpus, words.rng, (question, answer), codes)


def several_queries(corpus: Corpus, words: Words, length: int, keys: int = 6, asked: int = 3) -> Draft:
    """Ask for the codes of several keys at once."""
    attribute, told, facts = _codes(words, keys)
    names = [f"the {key}" for key, _ in told[:asked]]
    question = words.rng.choice(
        (
            f"What are the {attribute}s of {listed(names)}?",
            f"Give the {attribute} of each of these: {listed(names)}.",
        )
    )
    codes = [codes[0] for _, codes in told[:asked]]
    lines = [f"- The {attribute} of {name} is {code}." for name, code in zip(names, codes, strict=True)]
    return in_prose(facts, corpus, words.rng, (question, "\n".join(lines)), codes)


def place(corpus: Corpus, words: Words, length: int, people: int = 6) -> Draft:
    """Ask where one of several people lives."""
    homes = [(words.draw("person"), words.draw("city")) for _ in range(people)]
    facts = [words.rng.choice(HOMES).format(person=person, city=city) for person, city in homes]
    words.rng.shuffle(facts)
    person, city = homes[0]
    asked = words.rng.choice(
        (
            (f"In which city does {person} live?", f"{person} lives in {city}."),
            (f"Where does {person} live, according to the text?", f"According to the text, {person} lives in {city}."),
            (f"Which city is the home of {person}? Answer with the name of the city only.", city),
        )
    )
    return in_prose(facts, corpus, words.rng, asked, [city])


def hops(corpus: Corpus, words: Words, length: int, pairs: int = 3) -> Draft:
    """Ask for the host of a guest and the city in which the host lives, which are told apart."""
    homes = [(words.draw("person"), words.draw("city")) for _ in range(pairs)]
    stays = [(words.draw("person"), host) for host, _ in homes]
    facts = [words.rng.choice(HOMES).format(person=host, city=city) for host, city in homes]
    facts += [words.rng.choice(STAYS).format(guest=guest, host=host) for guest, host in stays]
    words.rng.shuffle(facts)
    (host, city), (guest, _) = homes[0], stays[0]
    asked = words.rng.choice(
        (
            (
                f"{guest} is a guest of somebody this week. Who is the host, and in which city does the host live?",
                f"The host is {host}, and {host} lives in {city}.",
            ),
            (
                f"Whom is {guest} visiting this week, and what is the home city of that person?",
                f"{guest} is visiting {host}, and the home city of {host} is {city}.",
            ),
        )
    )
    return in_prose(facts, corpus, words.rng, asked, [host, city])


def counting(corpus: Corpus, words: Words, length: int, most: int = 5) -> Draft:
    """Ask how often something was said to have happened."""
    cities = [words.draw("city"), words.draw("city")]
    times = [words.rng.randint(1, most) for _ in cities]
    facts = [f"The bell of {city} rang." for city, count in zip(cities, times, strict=True) for _ in range(count)]
    words.rng.shuffle(facts)
    question = (
        f'How many times does the sentence "The bell of {cities[0]} rang." stand in the text? Answer with a number.'
    )
    return in_prose(facts, corpus, words.rng, (question, str(times[0])), [str(times[0])])


def copying(corpus: Corpus, words: Words, length: int, notes: int = 2) -> Draft:
    """Ask for a real paragraph, which a title precedes, word for word."""
    paragraphs = corpus.paragraphs(words.rng)
    passages = [text for text in paragraphs if 20 <= len(text.split()) <= 45 and text.isascii()][:notes]
    titles = [words.key() for _ in passages]
    facts = [f"\n\nNote on the {title}: {text}\n\n" for title, text in zip(titles, passages, strict=True)]
    words.rng.shuffle(facts)
    filler = sentences(text for text in paragraphs if text not in passages)
    question = words.rng.choice(
        (
            f"Repeat the note on the {titles[0]} word for word.",
            f"Write out the text of the note on the {titles[0]} exactly as it stands above.",
        )
    )
    parts = passages[0].split()
    expected = tuple(" ".join(parts[start : start + 5]) for start in range(0, len(parts), 5))
    return Draft(hidden(facts, filler, words.rng, words.rng.choice(OPENINGS)), question, passages[0], expected)


def prose(corpus: Corpus, words: Words, length: int) -> Draft:
    """Take prose alone."""
    return Draft(hidden([], sentences(corpus.paragraphs(words.rng)), words.rng), "", "", ())
