"""Packs hold every sequence once; a run's order is its own."""

from hypothesis import given, settings
from hypothesis import strategies as st

from flux_attention.training import Recipe, load_data
from flux_attention.training.packing import Steps, pack


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(20, 100), st.integers(0, 5))
def test_packs_hold_every_sequence_once_within_the_budget(lengths, budget, seed):
    packs = pack(lengths, budget, seed)
    assert sorted(index for some in packs for index in some) == list(range(len(lengths)))
    for some in packs:
        assert sum(lengths[index] for index in some) <= budget or len(some) == 1
    assert packs == pack(lengths, budget, seed)


def test_packs_may_be_longer_than_sequences(recipe, tokenizer):
    recipe = Recipe.from_dict({**recipe.to_dict(), "pack_length": 1000})
    data, _ = load_data(recipe, tokenizer)
    sizes = [sum(len(example.input_ids) for _, example in items) for items in data]
    assert max(sizes) > 192 and max(sizes) <= 1000
    assert max(len(example.input_ids) for items in data for _, example in items) <= 192


def test_every_pass_is_shuffled_and_no_step_is_short(recipe, tokenizer):
    data, _ = load_data(recipe, tokenizer)
    steps = Steps(data, 3 * len(data) - 1, seed=0)
    assert len(steps) == 3 * len(data) - 1
    orders = [[[n for n, _ in steps[t * len(data) + i]] for i in range(len(data))] for t in range(2)]
    assert orders[0] != orders[1] and sorted(map(str, orders[0])) == sorted(map(str, orders[1]))
    again = Steps(data, 3 * len(data) - 1, seed=0)
    assert [n for n, _ in again[len(data) + 1]] == orders[1][1]
