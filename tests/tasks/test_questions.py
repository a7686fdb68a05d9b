"""Questions in natural language: of the length asked for, answerable from the prompt, encoded as the tokenizer does."""

import copy
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_attention.tasks.corpus import local_corpus
from flux_attention.tasks.metrics import METRICS, score_answer
from flux_attention.tasks.questions import NATURAL, Question, as_sample, make_question, prompt_ids
from flux_attention.tasks.text import SPLITS
from flux_attention.tasks.words import CITIES, GOODS, PEOPLE, split_words

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
#: Examples and lines of code are used whole or not at all.
WHOLE = {"worked_maths": 0.91, "classification": 0.94, "completion": 0.94}


@pytest.fixture(scope="module")
def chat(tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = TEMPLATE
    return chat


@pytest.fixture(scope="module")
def corpus():
    return local_corpus("test")


@pytest.mark.parametrize("family", NATURAL)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**9), length=st.sampled_from([1200, 2048, 5000]), split=st.sampled_from(SPLITS))
def test_prompts_have_the_length_asked_for_and_answers_score_full(family, chat, seed, length, split):
    question = make_question(family, local_corpus(split), chat, length, seed)
    tokens = len(prompt_ids(question, chat))
    least = (WHOLE.get(family, 0.97) if length < 4000 else 0.97) * length
    if family == "classification" and length < 4000:  # less than an example is missing, and some are long
        longest = max(len(chat(example).input_ids) for example in question.context.split("\n\n"))
        least = max(0.91 * length, min(least, length - longest))
    assert least <= tokens <= length
    assert (question.family, question.task_class) == (family, NATURAL[family].task_class)
    if question.is_prose:
        assert question.question == question.answer == ""
    else:
        assert score_answer(question, question.answer) == 1
        assert score_answer(question, "I do not know.") < 0.5


@pytest.mark.parametrize("family", NATURAL)
def test_questions_are_the_same_for_the_same_seed_alone(family, corpus, tokenizer):
    one, again, other = (make_question(family, corpus, tokenizer, 1024, seed) for seed in (3, 3, 4))
    assert one == again != other
    assert make_question(family, local_corpus("train"), tokenizer, 1024, 3) != one


@pytest.mark.parametrize("family", [name for name in NATURAL if name not in ("classification", "worked_maths")])
def test_prompts_can_be_long(family, corpus, tokenizer):
    assert 0.97 * 32_768 <= len(prompt_ids(make_question(family, corpus, tokenizer, 32_768, 0), tokenizer)) <= 32_768


#: Families whose answers stand in the context word for word.
TOLD = ["look_up", "several_keys", "all_values", "several_queries", "place", "hops", "copying"]
TOLD += ["document_fact", "find_document", "joined_fact", "classification"]


@pytest.mark.parametrize("family", TOLD)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_the_context_tells_the_answer_and_the_question_does_not(family, tokenizer, seed):
    question = make_question(family, local_corpus("test"), tokenizer, 1200, seed)
    assert METRICS["match"](question.context, question.expected) == 1
    if family != "classification":  # where labels are words like others
        assert METRICS["match"](question.question, question.expected) == 0


def test_prose_alone_does_not_tell_the_answer(corpus, tokenizer):
    """Without the sentence that tells the code, the code is nowhere."""
    question = make_question("look_up", corpus, tokenizer, 1200, 0)
    assert question.context.count(question.expected[0]) == 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_counts_are_right(tokenizer, seed):
    question = make_question("counting", local_corpus("test"), tokenizer, 1200, seed)
    sentence = re.search('"(.*)"', question.question)[1]
    assert question.context.count(sentence) == int(question.answer)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**9), family=st.sampled_from(["worked_maths", "spread_maths"]))
def test_sums_are_right(tokenizer, seed, family):
    question = make_question(family, local_corpus("test"), tokenizer, 1200, seed)
    sums = re.findall(r"(\d+) ([-+x]) (\d+) = (\d+)", question.context + question.answer)
    assert sums
    for left, sign, right, result in sums:
        assert {"+": int(left) + int(right), "-": int(left) - int(right), "x": int(left) * int(right)}[sign] == int(
            result
        )
    assert question.answer.endswith(f"The answer is {question.expected[0]}.")


def test_completions_are_the_files_next_lines(corpus, tokenizer):
    for seed in range(5):
        question = make_question("completion", corpus, tokenizer, 1200, seed)
        last = question.context.rstrip().splitlines()[-6:]
        followed = [source for _, source in corpus.code if "\n".join(last) in source]
        assert any(source.split("\n".join(last), 1)[1].lstrip().startswith(question.answer) for source in followed)


def test_splits_share_no_names(tokenizer):
    for split in SPLITS:
        corpus, other = local_corpus(split), [part for part in SPLITS if part != split]
        for family in ("place", "hops", "worked_maths"):
            for seed in range(5):
                question = make_question(family, corpus, tokenizer, 1024, seed)
                said = set(re.findall(r"\w+", question.question + question.answer))
                for words in (PEOPLE, CITIES, GOODS):
                    assert not said & {word for part in other for word in split_words(words, part)}


def test_a_length_that_cannot_hold_the_question_is_an_error(corpus, tokenizer):
    with pytest.raises(ValueError, match="a prompt of 60 tokens cannot hold a question of several_keys"):
        make_question("several_keys", corpus, tokenizer, 60, 0)
    with pytest.raises(ValueError, match="unknown families"):
        make_question("riddle", corpus, tokenizer, 1024, 0)


def test_samples_are_the_tokenizers_own_encoding(corpus, tokenizer, chat):
    question = make_question("place", corpus, chat, 1024, 1)
    sample = as_sample(question, chat)
    text = f"<user>{question.prompt}</user>\n<assistant>"
    assert sample.prompt_ids.tolist() == chat(text, add_special_tokens=False)["input_ids"]
    assert chat.decode(sample.answer_ids[:-1]) == question.answer
    assert sample.answer_ids[-1] == chat.eos_token_id
    assert (sample.family, sample.question) == ("place", question)
    plain = as_sample(question, chat, chat=False)
    assert plain.prompt_ids.tolist() == tokenizer(f"{question.prompt}\nAnswer:")["input_ids"]
    assert chat.decode(plain.answer_ids[:-1]) == f" {question.answer}"


def test_prose_is_its_own_answer(corpus, chat):
    question = make_question("prose", corpus, chat, 1024, 1)
    sample = as_sample(question, chat)
    assert sample.input_ids.tolist() == chat(question.context)["input_ids"]
    assert sample.answers == [(len(sample.input_ids) // 2, len(sample.input_ids))]
    with pytest.raises(ValueError, match="too few to foretell"):
        as_sample(Question("", "", "", (), "prose", "perplexity", "prose"), chat)


def test_samples_are_shortened_in_the_middle(corpus, chat):
    question = make_question("place", corpus, chat, 1024, 1)
    whole, short = as_sample(question, chat), as_sample(question, chat, max_length=200)
    assert len(short.input_ids) == 200
    assert np.array_equal(short.answer_ids, whole.answer_ids)
    assert np.array_equal(short.prompt_ids[:50], whole.prompt_ids[:50])
    assert np.array_equal(short.prompt_ids[-50:], whole.prompt_ids[-50:])
    first = Question("Text.", "What?", "That.", ("That",), "records", "match", "records", question_first=True)
    assert first.prompt == "What?\n\nText."
