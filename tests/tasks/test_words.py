"""Names and values: each one token, and two parts that share nothing."""

import random

from flux_attention.tasks.words import ADJECTIVES, CITIES, NOUNS, PEOPLE, Words, split_words

EVERY_WORD = [*ADJECTIVES, *NOUNS, *PEOPLE, *CITIES]


def test_held_out_and_training_vocabularies_are_disjoint():
    for words in (ADJECTIVES, NOUNS, PEOPLE, CITIES):
        parts = [set(split_words(words, held_out)) for held_out in (False, True)]
        assert not parts[0] & parts[1]
        assert parts[0] | parts[1] == set(words)
        assert all(len(part) >= 12 for part in parts)
    drawers = [Words(random.Random(0), held_out) for held_out in (False, True)]
    draws = [{words.code() for _ in range(2000)} for words in drawers]
    assert not draws[0] & draws[1]


def test_every_name_is_one_token(tokenizer):
    for word in EVERY_WORD:
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1, word
