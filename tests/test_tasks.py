"""The generated tasks: deterministic, exact in length, held-out where they say so, answerable from the text."""

import random
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flux_attention.shipped import BACKBONE
from flux_attention.tasks import text
from flux_attention.tasks.families import EVERY_FAMILY, FAMILIES
from flux_attention.tasks.samples import Haystack, make_sample, training_sample
from flux_attention.tasks.words import ADJECTIVES, CITIES, NOUNS, PEOPLE, Words, split_words

EVERY_WORD = [*ADJECTIVES, *NOUNS, *PEOPLE, *CITIES]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BACKBONE)


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return Haystack(text.local_texts(held_out=True, max_chars=100_000), tokenizer)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_samples_are_deterministic_and_of_the_length_asked_for(family, haystack, tokenizer):
    sample = make_sample(family, haystack, tokenizer, 1024, seed=5)
    again = make_sample(family, haystack, tokenizer, 1024, seed=5)
    assert np.array_equal(sample.input_ids, again.input_ids)
    assert sample.answers == again.answers
    assert len(sample.input_ids) == 1024 == len(sample.prompt_ids) + len(sample.answer_ids)
    assert sample.input_ids[0] == tokenizer.bos_token_id
    assert not np.array_equal(sample.input_ids, make_sample(family, haystack, tokenizer, 1024, seed=6).input_ids)


def answer_by_reading(family, prompt):
    """What a reader who follows the questions' plain meaning answers, from the text alone."""
    question = prompt.rsplit("# Question: ", 1)[1].split("\n")[0]
    if family in ("single_needle", "multi_key"):
        key = re.fullmatch(r"What is the secret code of the (.*)\?", question)[1]
        return re.search(rf"# The secret code of the {key} is (\d+)\.", prompt)[1]
    if family == "multi_value":
        key = re.fullmatch(r"List all codes of the (.*)\.", question)[1]
        return ", ".join(re.findall(rf"# The secret code of the {key} is (\d+)\.", prompt))
    if family == "two_hop":
        guest = re.fullmatch(r"In which city is (.*)\?", question)[1]
        host = re.search(rf"# {guest} is a guest of (\w+) in secret\.", prompt)[1]
        return re.search(rf"# {host} lives in (\w+)\.", prompt)[1]
    if family == "count":
        city = re.fullmatch(r"How many times does the bell of (.*) ring\?", question)[1]
        return str(len(re.findall(rf"# The bell of {city} rings\.", prompt)))
    if family == "multi_query":
        keys = re.fullmatch(r"What are the secret codes of the (.*)\?", question)[1].split(", the ")
        return ", ".join(re.search(rf"# The secret code of the {key} is (\d+)\.", prompt)[1] for key in keys)
    if family == "variable_tracking":
        value = re.fullmatch(r"Which variables have the value (\d+), in the order in which they got it\?", question)[1]
        found = re.findall(rf"# VAR (\w+) = {value}\n", prompt)
        for name, other in re.findall(r"# VAR (\w+) = VAR (\w+)\n", prompt):
            found += [name] if other in found else []
        return ", ".join(found)
    if family in ("common_words", "frequent_words"):
        counts = Counter(word for line in re.findall(r"# Words: (.*)\n", prompt) for word in line.split())
        top = [word for word, _ in counts.most_common(5 if family == "common_words" else 3)]
        return ", ".join(sorted(top) if family == "common_words" else top)
    title = re.fullmatch(r"Repeat passage (.*):", question)[1]
    return re.search(rf"# Passage {title}: (.*)\n", prompt)[1]


@pytest.mark.parametrize("family", [family for family, make in EVERY_FAMILY.items() if make is not None])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**9), held_out=st.booleans())
def test_the_answer_follows_from_the_prompt(family, haystack, tokenizer, seed, held_out):
    sample = make_sample(family, haystack, tokenizer, 1024, seed, held_out)
    answer = tokenizer.decode(sample.answer_ids)
    assert answer.startswith(" ")
    assert answer.endswith("\n")
    assert answer_by_reading(family, tokenizer.decode(sample.prompt_ids)) == answer.strip()


#: How Llama 3 and Qwen cut text: line ends stay with the signs before them.
WITH_LINE_ENDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def trained(kind):
    """Tokenizers as other models have them, trained on a little text: where spaces and line ends go differs."""
    if kind == "SentencePiece":  # Llama 2, Mistral, Gemma
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        spaces = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "removed"), spaces])
    else:
        tokenizer, special = Tokenizer(models.BPE()), ["<s>"]
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "GPT-2")
        cut = [] if kind == "GPT-2" else [pre_tokenizers.Split(Regex(WITH_LINE_ENDS), "isolated")]
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([*cut, bytes_]), decoders.ByteLevel()
    vocabulary = [*text.local_texts(held_out=True, max_chars=300_000), *(f" {word}" for word in EVERY_WORD * 20)]
    tokenizer.train_from_iterator(vocabulary, trainers.BpeTrainer(vocab_size=3000, special_tokens=special))
    if kind == "SentencePiece":  # line ends are bytes
        tokenizer.pre_tokenizer = spaces
        marks = decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence(list(marks))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.mark.parametrize("kind", ["GPT-2", "Llama 3", "SentencePiece"])
def test_any_fast_tokenizer_will_do(kind):
    tokenizer = trained(kind)
    haystack = Haystack(text.local_texts(held_out=True, max_chars=100_000), tokenizer)
    for family, make in EVERY_FAMILY.items():
        for seed in range(5):
            sample = make_sample(family, haystack, tokenizer, 2048, seed)
            assert len(sample.input_ids) == 2048 and sample.input_ids[0] == tokenizer.bos_token_id
            if make is None:
                continue
            decoded = tokenizer.decode(sample.prompt_ids[1:])
            # A piece that was encoded alone may begin with a space.
            lines = "".join(re.sub("^ # ", "# ", line) for line in decoded.splitlines(keepends=True))
            answer = tokenizer.decode(sample.answer_ids)
            assert answer.endswith("\n")
            assert answer_by_reading(family, lines) == answer.strip()


def test_held_out_and_training_vocabularies_are_disjoint():
    for words in (ADJECTIVES, NOUNS, PEOPLE, CITIES):
        parts = [set(split_words(words, held_out)) for held_out in (False, True)]
        assert not parts[0] & parts[1]
        assert parts[0] | parts[1] == set(words)
        assert all(len(part) >= 12 for part in parts)
    draws = [{Words(random.Random(seed), held_out).code() for seed in range(2000)} for held_out in (False, True)]
    assert not draws[0] & draws[1]


def test_every_name_is_one_token(tokenizer):
    for word in EVERY_WORD:
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1, word


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


def test_splits_of_the_local_text_are_disjoint():
    training = {line.strip() for read in text.local_texts(False) for line in read.split("\n")}
    held_out = text.local_texts(True)
    assert sum(map(len, held_out)) > 300_000
    for read in held_out:
        lines = [line.strip() for line in read.split("\n") if len(line.strip()) >= 40]
        assert sum(line in training for line in lines) <= 0.1 * len(lines)
    assert text.is_held_out("asyncio/events.py") == text.is_held_out("asyncio/events.py")
    share = np.mean([text.is_held_out(str(i)) for i in range(20000)])
    assert share == pytest.approx(text.HELD_OUT_FRACTION, abs=0.005)


def test_no_text_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(text, "python_roots", lambda site_packages=False: [tmp_path])
    text.local_texts.cache_clear()
    with pytest.raises(RuntimeError, match="no source files found"):
        text.local_texts(True)
    text.local_texts.cache_clear()
