"""Makes questions in natural language for chat models, and samples of them: for evaluation, calibration and training.

A context of real English prose, documentation or code, of any length; a question about it; the answer as a chat model
would word it. What is asked about never stands in two splits: names, places, numbers and texts of "test" are neither
in "train" nor in "calibration".

=================== ====================== ========= ==============================================================
family              task class             metric    asks
=================== ====================== ========= ==============================================================
look_up             single-document QA     match     the code of a thing, told in a sentence hidden in prose
several_keys        single-document QA     match     the same, with the codes of seven other things told too
all_values          single-document QA     match     all three codes of one thing
place               single-document QA     match     where one of six people lives
hops                multi-document QA      match     the host of a guest, and the city where the host lives
several_queries     synthetic              match     the codes of three things at once
counting            synthetic              match     how often a sentence occurs
copying             synthetic              match     a real paragraph, word for word
document_fact       single-document QA     match     version, maintainer or licence of one of many documented packages
find_document       multi-document QA      match     the package that its authors' one-line summary is about
joined_fact         multi-document QA      match     name and version of the package whose documentation has a sentence
summary             summarisation          rouge-l   one line about one of many packages
classification      in-context learning    match     the label of a package, function or character, after examples
completion          code                   edit      the next line of a real source file, after other files
worked_maths        maths                  match     an arithmetic word problem, after many worked ones
spread_maths        maths                  match     one whose facts stand far apart in prose
prose               prose                  perplexity nothing: the text is scored
=================== ====================== ========= ==============================================================
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from flux_attention.tasks.corpus import Corpus
from flux_attention.tasks.encoding import encode_answer, encode_prompt, has_chat, joined, without_middle
from flux_attention.tasks.natural import code, facts, library, maths
from flux_attention.tasks.natural.draft import Draft, fit
from flux_attention.tasks.samples import Sample
from flux_attention.tasks.words import Words
from flux_attention.validation import check_known


@dataclass(frozen=True)
class Question:
    """
    Holds one question about a context, with its answer.

    Attributes
    ----------
    context : str
        A long text.
    question : str
        What is asked behind it; empty for prose, which is scored itself.
    answer : str
        The reference, worded as a chat model would: the loss is computed on it.
    expected : tuple of str
        What a right answer contains; for other metrics than "match", the references.
    family : str
        One of ``NATURAL``, or what the records of a user call it.
    metric : str
        One of ``metrics.METRICS``.
    task_class : str
        What the family demands, as columns of reports.
    question_first : bool
        Whether the question stands before the context.
    """

    context: str
    question: str
    answer: str
    expected: tuple[str, ...]
    family: str
    metric: str
    task_class: str
    question_first: bool = False

    @property
    def prompt(self) -> str:
        """The text of the prompt, as a user would send it."""
        return joined(self.context, self.question, self.question_first)

    @property
    def is_prose(self) -> bool:
        """Whether nothing is asked."""
        return self.metric == "perplexity"


@dataclass(frozen=True)
class Family:
    """
    Describes a family of questions.

    Attributes
    ----------
    make : callable
        Makes a draft from a corpus, words and the prompt's length in tokens.
    task_class, metric : str
        As in ``Question``.
    """

    make: Callable[[Corpus, Words, int], Draft]
    task_class: str
    metric: str = "match"


PROSE = "prose"
SINGLE, MULTI = "single-document QA", "multi-document QA"
#: Every family of questions in natural language.
NATURAL: dict[str, Family] = {
    "look_up": Family(facts.look_up, SINGLE),
    "several_keys": Family(partial(facts.look_up, keys=8), SINGLE),
    "all_values": Family(facts.all_values, SINGLE),
    "place": Family(facts.place, SINGLE),
    "hops": Family(facts.hops, MULTI),
    "several_queries": Family(facts.several_queries, "synthetic"),
    "counting": Family(facts.counting, "synthetic"),
    "copying": Family(facts.copying, "synthetic"),
    "document_fact": Family(library.document_fact, SINGLE),
    "find_document": Family(library.find_document, MULTI),
    "joined_fact": Family(library.joined_fact, MULTI),
    "summary": Family(library.summary, "summarisation", "rouge-l"),
    "classification": Family(library.classification, "in-context learning"),
    "completion": Family(code.completion, "code", "edit"),
    "worked_maths": Family(maths.worked, "maths"),
    "spread_maths": Family(maths.spread, "maths"),
    "prose": Family(facts.prose, PROSE, "perplexity"),
}


def prompt_ids(question: Question, tokenizer, chat: bool | None = None) -> list[int]:
    """Encode the prompt of a question; without a chat template "Answer:" tells that the text ends here."""
    if question.is_prose:
        return encode_prompt(question.context, tokenizer, chat=False)
    chat = has_chat(tokenizer, chat)
    return encode_prompt(question.prompt if chat else f"{question.prompt}\nAnswer:", tokenizer, chat)


def make_question(family: str, corpus: Corpus, tokenizer, length: int, seed: int, chat: bool | None = None) -> Question:
    """
    Make one question, the same for the same arguments.

    Parameters
    ----------
    family : str
        One of ``NATURAL``.
    corpus : Corpus
        Text of one split, to which the question then belongs.
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's.
    length : int
        Tokens of the prompt, chat template included: at most so many, and at least 97 % of them where the family's
        material suffices.
    chat : bool, optional
        Whether the prompt goes through the chat template; default: where there is one.

    Raises
    ------
    ValueError
        For an unknown family; if ``length`` is too short for what the question needs.
    """
    check_known("families", [family], NATURAL)
    kind = NATURAL[family]
    words = Words(random.Random(f"{corpus.split}-{family}-{length}-{seed}"), corpus.split)
    draft = kind.make(corpus, words, length)

    def ask(context: str) -> Question:
        return Question(context, draft.question, draft.answer, draft.expected, family, kind.metric, kind.task_class)

    context, tokens = fit(draft, length, lambda context: len(prompt_ids(ask(context), tokenizer, chat)))
    if tokens > length:
        raise ValueError(
            f"a prompt of {length} tokens cannot hold a question of {family}, which takes {tokens} at least"
        )
    return ask(context)


def as_sample(question: Question, tokenizer, chat: bool | None = None, max_length: int | None = None) -> Sample:
    """
    Encode a question: its prompt, and behind it the reference answer with the token that ends a turn.

    For prose the "answer" is the second half of the text, as for ``plain``.

    Parameters
    ----------
    chat : bool, optional
        Whether the prompt goes through the chat template; default: where there is one.
    max_length : int, optional
        Tokens of the sample at most: a longer prompt loses its middle, longer prose and an answer beyond half of it
        their ends.

    Raises
    ------
    ValueError
        For prose of fewer than two tokens.
    """
    prompt = prompt_ids(question, tokenizer, chat)
    if question.is_prose:
        ids = np.asarray(prompt[:max_length], np.int32)
        if len(ids) < 2:
            raise ValueError(f"the text {question.context!r} has {len(ids)} tokens, too few to foretell any")
        return Sample(ids, [(len(ids) // 2, len(ids))], question.family, question)
    answer = encode_answer(question.answer if has_chat(tokenizer, chat) else f" {question.answer}", tokenizer)
    if max_length is not None:
        answer = answer[: max(1, max_length // 2)]
        prompt = without_middle(prompt, max_length - len(answer))
    ids = np.asarray([*prompt, *answer], np.int32)
    return Sample(ids, [(len(prompt), len(ids))], question.family, question)
