"""Samples: deterministic, exact in length; for training, of the families and words asked for."""

import random
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flux_attention.tasks.families import EVERY_FAMILY, FAMILIES
from flux_attention.tasks.samples import make_sample, training_sample
from flux_attention.tasks.words import PEOPLE, split_words


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_samples_are_deterministic_and_of_the_length_asked_for(family, haystack, tokenizer):
    sample = make_sample(family, haystack, tokenizer, 1024, seed=5)
    again = make_sample(family, haystack, tokenizer, 1024, seed=5)
    assert np.array_equal(sample.input_ids, again.input_ids)
    assert sample.answers == again.answers
    assert len(sample.input_ids) == 1024 == len(sample.prompt_ids) + len(sample.answer_ids)
    assert sample.input_ids[0] == tokenizer.bos_token_id
    assert not np.array_equal(sample.input_ids, make_sample(family, haystack, tokenizer, 1024, seed=6).input_ids)


QUESTIONS = {
    "multi_value": "List all codes",
    "two_hop": "In which city",
    "count": "How many times",
    "copy": "Repeat passage",
    "multi_query": "What are the secret codes",
    "variable_tracking": "Which variables",
    "common_words": "Which 5 words are the most common",
    "frequent_words": "Which 3 words are the most frequent",
}


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    length=st.sampled_from([200, 512, 1024, 3000]),
    families=st.sets(st.sampled_from([name for name in EVERY_FAMILY if name != "plain"]), min_size=1),
)
# A list so short that its words once occurred equally often.
@example(seed=7715, length=200, families=set(EVERY_FAMILY))
def test_training_samples_fit_and_use_training_words(haystack, tokenizer, seed, length, families):
    sample = training_sample(haystack, tokenizer, length, random.Random(seed), 0.3, families)
    assert len(sample.input_ids) == length
    decoded = tokenizer.decode(sample.input_ids)
    assert sample.answers or length < 1024 or families <= {"common_words", "frequent_words"}
    for family, question in QUESTIONS.items():
        assert family in families or not re.search(f"# Question: {question}", decoded)
    listed = Counter(word for line in re.findall(r"# Words: (.*)\n", decoded) for word in line.split())
    if found := re.search(r"Which (\d) words are the most common .*\n# Answer: (.*)\n", decoded):
        assert sorted(word for word, _ in listed.most_common(int(found[1]))) == found[2].split(", ")
    if found := re.search(r"Which (\d) words are the most frequent .*\n# Answer: (.*)\n", decoded):
        assert [word for word, _ in listed.most_common(int(found[1]))] == found[2].split(", ")
    for person in re.findall(r"# (\w+) lives in", decoded):
        assert person in split_words(PEOPLE, False)


def test_training_samples_ask_the_questions_of_their_families(haystack, tokenizer):
    for families in (list(FAMILIES), list(EVERY_FAMILY)):
        samples = [training_sample(haystack, tokenizer, 3000, random.Random(s), 0.0, families) for s in range(30)]
        decoded = "".join(tokenizer.decode(sample.input_ids) for sample in samples)
        found = {family for family, question in QUESTIONS.items() if re.search(f"# Question: {question}", decoded)}
        assert found == set(QUESTIONS) & set(families)


def test_training_samples_without_a_question_or_text_are_refused(haystack, tokenizer):
    with pytest.raises(ValueError, match="asks a question"):
        training_sample(haystack, tokenizer, 1024, random.Random(0), 0.0, ["plain"])
    with pytest.raises(ValueError, match="fewer than the"):
        training_sample(haystack, tokenizer, 10_000_000, random.Random(0), 0.0)


def test_too_short_for_its_facts(haystack, tokenizer):
    with pytest.raises(ValueError, match="a sample of 100 tokens cannot hold"):
        make_sample("copy", haystack, tokenizer, 100, 0)


def test_longer_than_the_text(haystack, tokenizer):
    with pytest.raises(ValueError, match="fewer than the"):
        make_sample("single_needle", haystack, tokenizer, 10_000_000, 0)
