"""Questions can be answered from the text, whatever the tokenizer."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from flux_attention.tasks import text
from flux_attention.tasks.families import EVERY_FAMILY
from flux_attention.tasks.samples import Haystack, make_sample
from flux_attention.tasks.words import ADJECTIVES, CITIES, NOUNS, PEOPLE

EVERY_WORD = [*ADJECTIVES, *NOUNS, *PEOPLE, *CITIES]


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
