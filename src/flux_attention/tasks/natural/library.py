"""Questions about documentation: facts of one document of many, the document that fits, its summary, its label."""

from __future__ import annotations

import itertools
import random
import re
import unicodedata
from functools import lru_cache

from flux_attention.tasks.corpus import FRACTION, Corpus, prose_of
from flux_attention.tasks.documents import Document
from flux_attention.tasks.natural.draft import SENTENCE, Draft, cut, hidden
from flux_attention.tasks.text import SPLITS, split_of
from flux_attention.tasks.words import Words

OPENING = "The following is documentation of several packages and functions.\n\n"
#: Ways to ask for a fact, and to tell it.
FACTS = {
    "version": (
        ("Which version of {name} is documented above?", "The documented version of {name} is {value}."),
        ("What is the version of the package {name}? Answer with the version only.", "{value}"),
    ),
    "maintainer": (
        ("Who maintains the package {name}?", "The package {name} is maintained by {value}."),
        (
            "Who is the maintainer of {name}, according to the documentation above?",
            "The maintainer of {name} is {value}.",
        ),
    ),
    "licence": (
        ("Under which licence is {name} published?", "{name} is published under the licence {value}."),
        ("What is the licence of {name}? Answer with the licence only.", "{value}"),
    ),
}
#: Share of a summary's words that stand in the text.
DERIVABLE = 0.7
#: Words of a sentence that is quoted.
QUOTED = range(8, 31)
#: Labels in one prompt at most, and examples of each at least.
LABELS, SHOTS = 4, 3
#: Letters of an example at most.
EXAMPLE_CHARS = 300
#: Unicode's categories of which a character's name tells something: their long names, and the words that do.
CATEGORIES = {
    "Lu": ("uppercase letter", {"capital"}),
    "Ll": ("lowercase letter", {"small"}),
    "Mn": ("nonspacing mark", {"combining"}),
    "So": ("other symbol", {"circled", "symbol", "pattern", "black", "squared", "face", "with"}),
}
#: Prompts have fewer characters for each token.
CHARS_A_TOKEN = 5


def _shuffled(corpus: Corpus, words: Words) -> list[Document]:
    """List the documents in random order, packages first, with no name twice."""
    documents = words.rng.sample(corpus.documents, len(corpus.documents))
    documents.sort(key=lambda document: document.kind != "package")
    return list({document.name.casefold(): document for document in documents}.values())


def _among(
    asked: Document, documents: list[Document], rng: random.Random, asks: tuple[str, str], expected: str
) -> Draft:
    """Hide a document among the others."""
    filler = [document.block for document in documents if document is not asked]
    return Draft(hidden([asked.block], filler, rng, OPENING), *asks, (expected,))


def document_fact(corpus: Corpus, words: Words, length: int) -> Draft:
    """Ask for the version, the maintainer or the licence of one of the packages."""
    documents = _shuffled(corpus, words)
    asked = documents[0]
    label, value = words.rng.choice([fact for fact in asked.facts if fact[0] in FACTS])
    asks = tuple(text.format(name=asked.name, value=value) for text in words.rng.choice(FACTS[label]))
    return _among(asked, documents, words.rng, asks, value)


def find_document(corpus: Corpus, words: Words, length: int) -> Draft:
    """Ask which package a summary, which its documentation does not contain, is about."""
    documents = _shuffled(corpus, words)
    asked = next(doc for doc in documents if doc.name.casefold() not in doc.summary.casefold())
    question = words.rng.choice(
        (
            f'Which of the packages above could be summed up as "{asked.summary}"? Answer with its name only.',
            f'One of the packages above is described in one line as "{asked.summary}". Give the name of that package.',
        )
    )
    return _among(asked, documents, words.rng, (question, asked.name), asked.name)


def joined_fact(corpus: Corpus, words: Words, length: int) -> Draft:
    """Ask for the version of the package of whose documentation a sentence is quoted."""
    documents = _shuffled(corpus, words)
    for asked in documents:
        version = dict(asked.facts).get("version")
        said = [sentence for paragraph in prose_of(asked.text) for sentence in SENTENCE.split(paragraph)]
        told = [asked.name.casefold(), version]
        quotes = [text for text in said if version and len(text.split()) in QUOTED]
        quotes = [text for text in quotes if not any(name in text.casefold() for name in told)]
        if quotes:
            break
    quote = words.rng.choice(quotes)
    question = (
        f'The documentation of one of the packages above says: "{quote}" What are the name and the version of that '
        "package?"
    )
    answer = f"The package is {asked.name}, and its version is {version}."
    draft = _among(asked, documents, words.rng, (question, answer), version)
    return Draft(draft.context, question, answer, (asked.name, version))


def _derivable(document: Document) -> bool:
    """Whether most words of a document's summary stand in its text, so that the text can be summed up like this."""
    said, summed = (set(re.findall(r"\w+", text.lower())) for text in (document.text, document.summary))
    return len(said & summed) >= DERIVABLE * len(summed)


def summary(corpus: Corpus, words: Words, length: int) -> Draft:
    """Ask for one line about one of the packages; what its authors' own line or first sentence has is right."""
    documents = _shuffled(corpus, words)
    asked = next((document for document in documents if _derivable(document)), documents[0])
    first = SENTENCE.split(" ".join(asked.text.split("\n\n")[0].split()))[0]
    question = words.rng.choice(
        (
            f"Summarize in one short line what the {asked.kind} {asked.name} is.",
            f"In one short sentence, what is the {asked.kind} {asked.name}?",
        )
    )
    draft = _among(asked, documents, words.rng, (question, asked.summary), asked.summary)
    return Draft(draft.context, question, asked.summary, (asked.summary, first))


def _documents_of(kind: str, corpus: Corpus, longer: bool) -> list[tuple[str, str]]:
    """List texts about the documents of a kind, in one line or at length, each with its label."""
    about = [document for document in corpus.documents if document.kind == kind and document.label]
    texts = [f"{doc.summary}. {' '.join(doc.text.split())}" if longer else doc.summary for doc in about]
    return [(cut(text, EXAMPLE_CHARS), document.label) for text, document in zip(texts, about, strict=True)]


@lru_cache(maxsize=len(SPLITS))
def characters(split: str) -> list[tuple[str, str]]:
    """List the names of Unicode's characters that belong to a split, each with its category."""
    found = []
    for sign in map(chr, range(0x20, 0x20000)):
        name, category = unicodedata.name(sign, "").lower(), unicodedata.category(sign)
        label, telling = CATEGORIES.get(category, ("", set()))
        if telling & set(name.split()) and split_of(name, FRACTION) == split:
            found.append((name.capitalize(), label))
    return found


def _examples(labelled: list[tuple[str, str]], words: Words) -> list[tuple[str, str]]:
    """Order texts so that each label comes once, then each once again; those of the labels that have most."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for example in words.rng.sample(labelled, len(labelled)):
        groups.setdefault(example[1], []).append(example)
    groups = {label: some for label, some in groups.items() if len(some) > SHOTS}
    often = sorted(groups.values(), key=len, reverse=True)[:LABELS]
    if len(often) < 2:
        return []
    rounds = [[example for example in some if example] for some in itertools.zip_longest(*often)]
    return [example for some in rounds for example in words.rng.sample(some, len(some))]


def classification(corpus: Corpus, words: Words, length: int) -> Draft:
    """
    Ask for the label of a package, a function or a character, after as many examples as there is room for.

    A split has examples for some ten thousand tokens; longer prompts stay as short as that.
    """
    known = {
        ("package", "section"): [_documents_of("package", corpus, longer) for longer in (False, True)],
        ("function", "module"): [_documents_of("function", corpus, longer) for longer in (False, True)],
        ("character", "category"): [characters(corpus.split)],
    }
    enough = []
    for (kind, noun), sources in known.items():
        for examples in (_examples(source, words) for source in sources):
            size = sum(len(text) + len(label) + len("Description: \n : \n\n") for text, label in examples)
            if size > CHARS_A_TOKEN * length:
                enough.append((kind, noun, examples))
                break
    kind, noun, examples = words.rng.choice(enough or [("character", "category", examples)])
    labels = len({label for _, label in examples})
    asked, label = examples.pop(labels + words.rng.randrange(labels))  # of the second round: the first shows its label
    texts = [f"Description: {text}\n{noun.capitalize()}: {each}\n\n" for text, each in examples]
    opening = f"Each {kind} belongs to one {noun}, as these examples show.\n\n"
    question = (
        f"What is the {noun} of this {kind}, in the manner of the examples? Answer with the {noun} only.\n\n"
        f"Description: {asked}\n{noun.capitalize()}:"
    )
    return Draft(hidden([], texts, words.rng, opening, whole=True), question, label, (label,))
