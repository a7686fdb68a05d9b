"""The routed cache layer: selection, cropping, copying, resetting."""

import copy

import pytest
import torch
from helpers.models import CONFIG, ids, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from flux_attention import UnsupportedModelError, attach


def test_cropping_everything_starts_anew():
    model = tiny_model("qwen3")
    routing = attach(model, CONFIG, keep_full_kv=True)
    with torch.no_grad():
        with routing.force("sparse"):
            cache = model(ids(2, 12)).past_key_values
        cache.crop(-12)
        assert cache.get_seq_length() == 0
        with routing.force("full"):
            model(ids(3, 9), past_key_values=cache)
    assert cache.layers[0].routes == [True] * 3


MIXED = torch.tensor([[1, 0, 1], [0, 0, 1], [0, 1, 0]])


def prefilled(length=40, keep_full=False, routes=MIXED):
    routing = attach(tiny_model("qwen3"), CONFIG, keep_full_kv=keep_full)
    cache = DynamicCache()
    with torch.no_grad(), routing.force(routes):
        routing.model(ids(len(routes), length), past_key_values=cache)
    return routing, cache


def step(routing, cache, rows):
    """Logits of one more token for each row; row r's token depends on r alone."""
    tokens = torch.tensor([[7 + row] for row in rows])
    with torch.no_grad():
        return routing.model(tokens, past_key_values=cache).logits


@pytest.mark.parametrize("keep_full", [False, True])
@settings(max_examples=15, deadline=None)
@given(index=st.lists(st.integers(0, 2), min_size=1, max_size=5), length=st.sampled_from([6, 13, 40]))
def test_any_selection_of_rows(keep_full, index, length):
    routing, cache = prefilled(length, keep_full)
    expected = step(routing, copy.deepcopy(cache), [0, 1, 2])[index]
    cache.reorder_cache(torch.tensor(index))
    torch.testing.assert_close(step(routing, cache, index), expected, atol=1e-4, rtol=1e-3)


def test_repeat_and_select():
    routing, cache = prefilled()
    expected = step(routing, copy.deepcopy(cache), [0, 1, 2])
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    torch.testing.assert_close(
        step(routing, repeated, [0, 0, 1, 1, 2, 2]), expected.repeat_interleave(2, 0), atol=1e-4, rtol=1e-3
    )
    for indices in (torch.tensor([2, 0]), torch.tensor([True, False, True])):
        selected = copy.deepcopy(cache)
        selected.batch_select_indices(indices)
        rows = [2, 0] if indices.dtype != torch.bool else [0, 2]
        torch.testing.assert_close(step(routing, selected, rows), expected[rows], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("length, keep_full", [(40, True), (8, False)])
def test_crop_where_nothing_was_dropped(length, keep_full):
    routing, cache = prefilled(length, keep_full)
    expected = step(routing, copy.deepcopy(cache), [0, 1, 2])
    with torch.no_grad():
        routing.model(ids(3, 5, 9), past_key_values=cache)
    cache.crop(-5)
    assert cache.get_seq_length() == length
    torch.testing.assert_close(step(routing, cache, [0, 1, 2]), expected, atol=1e-4, rtol=1e-3)
    cache.layers[0].crop(length)  # older transformers: the length to keep
    assert cache.layers[0].get_seq_length() == length


def test_crop_where_tokens_were_dropped_is_refused():
    routing, cache = prefilled(40)
    with pytest.raises(ValueError, match="keep_full_kv=True to be able to crop"):
        cache.crop(-1)
    cache.crop(0)
    assert not cache.layers[0].is_croppable


def test_crop_into_padding_is_refused():
    routing = attach(tiny_model("qwen3"), CONFIG, keep_full_kv=True)
    mask = torch.tensor([[1] * 10, [1] * 6 + [0] * 4])
    with torch.no_grad():
        cache = routing.model(ids(2, 10), attention_mask=mask).past_key_values
    with pytest.raises(ValueError, match="only the last 0 are real"):
        cache.crop(-1)


def test_reset_starts_a_new_prompt():
    routing, cache = prefilled()
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        expected = routing.model(ids(2, 20)).logits
        torch.testing.assert_close(routing.model(ids(2, 20), past_key_values=cache).logits, expected)


def test_routes_stay_those_of_the_first_prefill():
    routing, cache = prefilled()
    decided = routing.routes
    with torch.no_grad(), routing.force("full"):
        routing.model(ids(3, 10), past_key_values=cache)
    assert routing.routes is decided
    assert cache.layers[0].routes == [True, False, False]


def test_rerouted_layers_see_the_whole_past():
    """One layer, whose keys do not depend on routes: after re-routing to full the model is the stock one."""
    model = tiny_model("qwen3", num_hidden_layers=1)
    prompt = ids(1, 36)
    with torch.no_grad():
        expected = model(prompt).logits[:, 30:]
        routing = attach(model, CONFIG, keep_full_kv=True)
        with routing.force("sparse"):
            cache = model(prompt[:, :30]).past_key_values
        routing.reroute(cache)
        with routing.force("full"):
            torch.testing.assert_close(
                model(prompt[:, 30:], past_key_values=cache).logits, expected, atol=1e-4, rtol=1e-3
            )
    assert cache.layers[0].routes == [True]


def test_buffers_grow_rarely_and_keep_what_they_hold():
    routing, cache = prefilled(100, routes=torch.ones(1, 3))
    store, buffers, tokens = cache.layers[0].buffers[True], set(), [ids(1, 100)]
    for index in range(200):
        tokens.append(ids(1, 1, index))
        with torch.no_grad():
            logits = routing.model(tokens[-1], past_key_values=cache).logits
        buffers.add(store.key_RKCD.data_ptr())
        assert store.key_RKCD.shape[2] < 1.7 * (101 + index)
    assert 1 < len(buffers) <= 4
    with torch.no_grad(), routing.force("full"):
        torch.testing.assert_close(routing.model(torch.cat(tokens, 1)).logits[:, -1:], logits, atol=1e-4, rtol=1e-3)


def test_other_caches_are_refused():
    model = tiny_model("qwen3")
    attach(model, CONFIG)
    with pytest.raises(UnsupportedModelError, match="StaticCache; routed layers need a DynamicCache"):
        model(ids(1, 8), past_key_values=StaticCache(config=model.config, max_cache_len=20))


def test_a_cache_of_other_sizes_is_refused():
    routing, cache = prefilled()
    routing.detach()
    attach(routing.model)
    with pytest.raises(ValueError, match="made with sink 4 and window 9"):
        routing.model(ids(3, 1), past_key_values=cache)


def test_wrong_batch_is_refused():
    routing, cache = prefilled()
    with pytest.raises(ValueError, match="holds 3 sequences, the input 2"):
        routing.model(ids(2, 1), past_key_values=cache)
