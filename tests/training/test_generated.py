"""Generated questions as training data."""

import numpy as np

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
