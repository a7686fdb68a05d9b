"""Generated questions as training data."""

import numpy as np
import pytest

from flux_attention.errors import RecipeError
from flux_attention.training import load_data
from flux_attention.training.records import PLAIN


def test_generated_questions_need_no_file(recipe, tokenizer):
    recipe.targets = {"look-up": 0.8, PLAIN: 1.0}
    tasks = {"single_needle": "look-up", "plain": PLAIN}
    recipe.data, recipe.max_length = [{"generated": 8, "lengths": [256, 400], "tasks": tasks, "max_chars": 10**5}], 800
    data, report = load_data(recipe, tokenizer)
    assert report.tasks == {"look-up": 4, PLAIN: 4}
    numbers = sorted(number for items in data for number, _ in items)
    assert numbers == list(range(8))
    recipe.data = recipe.data * 2
    twice, _ = load_data(recipe, tokenizer)
    assert len({example.input_ids.tobytes() for items in twice for _, example in items}) == 16
    recipe.data = recipe.data[:1]
    again, _ = load_data(recipe, tokenizer)
    for one, two in zip(data, again, strict=True):
        assert all(np.array_equal(a.input_ids, b.input_ids) for (_, a), (_, b) in zip(one, two, strict=True))
    recipe.training = {**recipe.training, "seed": 1}
    other, _ = load_data(recipe, tokenizer)
    assert len({example.input_ids.tobytes() for some in (again, other) for items in some for _, example in items}) == 16


def test_questions_in_words_are_training_data_too(recipe, tokenizer):
    """With the answer they have at most the tokens that were asked for, and are of the training split."""
    recipe.targets = {"look-up": 0.8, "copy": 0.5, PLAIN: 1.0}
    tasks = {"look_up": "look-up", "copying": "copy", "prose": PLAIN, "single_needle": "look-up"}
    recipe.data = [{"generated": 12, "lengths": [600, 800], "tasks": tasks, "max_chars": 10**5}]
    recipe.max_length = 800
    data, report = load_data(recipe, tokenizer)
    assert report.tasks == {"look-up": 6, "copy": 3, PLAIN: 3}
    source = data.sources[0]
    assert source.corpus.split == "train"
    for index, example in enumerate(source):
        family, length = source.families[index % 4], source.lengths[index]
        assert len(example.input_ids) <= length and len(example.input_ids) > 0.75 * length
        assert 0 < example.prompt_length < len(example.input_ids)
        again = source[index]
        assert np.array_equal(again.input_ids, example.input_ids)
        if family == "copying":
            prompt, answer = np.split(example.input_ids, [example.prompt_length])
            assert tokenizer.decode(answer)[1:60] in tokenizer.decode(prompt)
    assert data.hash() == load_data(recipe, tokenizer)[0].hash()
    recipe.data[0]["held_out"] = True
    assert load_data(recipe, tokenizer)[0].sources[0].corpus.split == "test"


def test_unknown_families_are_named_with_the_known_ones(recipe, tokenizer):
    recipe.targets = {"x": 0.5}
    recipe.data = [{"generated": 4, "lengths": [256], "tasks": {"poems": "x"}}]
    with pytest.raises(RecipeError, match=r"unknown families \['poems'\]; known are .*'look_up'"):
        load_data(recipe, tokenizer)
