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
hops                multi-document QA      match     in which city a guest is: where the host lives
several_queries     synthetic              match     the codes of three things at once
counting            synthetic              match     how often a sentence occurs
copying             synthetic              match     a real paragraph, word for word
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
from flux_attention.tasks.natural import facts
from flux_attention.tasks.natural.draft import Draft
from flux_attention.tasks.samples import Sample
from flux_attention.tasks.words import Words
from flux_attention.validation import check_known

#: Of the length asked for, a prompt has at least so much, where the material suffices.
FILLED = 0.98
ROUNDS = 8


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
    """

    context: str
    question: str
    answer: str
    expected: tuple[str, ...]
    family: str
    metric: str
    task_class: str

    @property
    def prompt(self) -> str:
        """The text of the prompt, as a user would send it."""
        return "\n\n".join(part for part in (self.context, self.question) if part.strip())


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
    "prose": Family(facts.prose, "prose", "perplexity"),
}


def has_chat(tokenizer, chat: bool | None) -> bool:
    """Whether prompts go through the chat template: as asked for, else where the tokenizer has one."""
    return bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat


def encode_prompt(text: str, tokenizer, chat: bool, **template_kwargs) -> list[int]:
    """Encode a prompt: as a user's message through the chat template, or as it stands."""
    if chat:
        settings = {**template_kwargs, "add_generation_prompt": True, "return_dict": True}
        return tokenizer.apply_chat_template([{"role": "user", "content": text}], **settings)["input_ids"]
    ids = tokenizer(text)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        ids = ids[:-1]
    return ids


def encode_answer(text: str, tokenizer) -> list[int]:
    """Encode an answer, with the token that ends a turn."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tokenizer(text, add_special_tokens=False)["input_ids"] + end


def prompt_ids(question: Question, tokenizer, chat: bool | None = None) -> list[int]:
    """Encode the prompt of a question; without a chat template "Answer:" tells that the text ends here."""
    if not question.question:
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
    best, chars, shortest = None, 4 * length, None
    for _ in range(ROUNDS):
        context = draft.context(chars)
        question = Question(context, draft.question, draft.answer, draft.expected, family, kind.metric, kind.task_class)
        tokens = len(prompt_ids(question, tokenizer, chat))
        shortest = tokens if shortest is None else min(tokens, shortest)
        if tokens <= length and (best is None or tokens > best[0]):
            best = tokens, question
        if FILLED * length <= tokens <= length or chars == 0:
            break
        grown = int((length * (1 + FILLED) / 2 - tokens) * len(context) / max(tokens, 1))
        if best is not None and tokens < length and draft.context(chars + grown) == context:
            break  # there is no more material
        chars = max(0, chars + grown)
    if best is None:
        raise ValueError(
            f"a prompt of {length} tokens cannot hold a question of {family}, whose shortest has {shortest}"
        )
    return best[1]


def as_sample(question: Question, tokenizer, chat: bool | None = None) -> Sample:
    """
    Encode a question: its prompt, and behind it the reference answer with the token that ends a turn.

    For prose the "answer" is the second half of the text, as for ``plain``.

    Parameters
    ----------
    chat : bool, optional
        Whether the prompt goes through the chat template; default: where there is one.
    """
    prompt = prompt_ids(question, tokenizer, chat)
    if not question.question:
        return Sample(np.asarray(prompt, np.int32), [(len(prompt) // 2, len(prompt))], question.family, question)
    text = question.answer if has_chat(tokenizer, chat) else f" {question.answer}"
    ids = np.asarray([*prompt, *encode_answer(text, tokenizer)], np.int32)
    return Sample(ids, [(len(prompt), len(ids))], question.family, question)
