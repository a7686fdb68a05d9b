"""What happens around a call: threads, interrupts, failures, copies, modes, ragged continuations."""

import copy
import pickle
import threading

import pytest
import torch
from conftest import tiny_model
from flux_attention.cache import RoutedLayer
from flux_attention.call import Call
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attach import CONFIG, TRIANGLE, ids, oracle_logits, randomize
from transformers import DynamicCache

from flux_attention import attach
from flux_attention.patterns import Full


@pytest.mark.parametrize("config", [CONFIG, TRIANGLE], ids=lambda c: c.pattern)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_padding_anywhere_in_any_call(config, data):
    """Calls of any width with padding anywhere: each sequence gets what it would get alone, under its own mask."""
    model = tiny_model("qwen3")
    batch, calls = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    routing = attach(model, config, keep_full_kv=data.draw(st.booleans(), "keep_full"))
    bits = st.lists(st.booleans(), min_size=3, max_size=3)
    routes = torch.tensor([data.draw(bits) for _ in range(batch)])
    cache, mask, logits = DynamicCache(), torch.zeros(batch, 0, dtype=torch.long), []
    columns, first = [], None
    for call in range(calls):
        width = data.draw(st.sampled_from([1, 1, 2, 5, 20]), "width")
        real = torch.tensor([[data.draw(st.booleans()) for _ in range(width)] for _ in range(batch)]).long()
        if call == 0:
            real[:, data.draw(st.integers(0, width - 1))] = 1
            first = real.sum(1).tolist()
        tokens = ids(batch, width, call) * real
        positions = (mask.sum(1, keepdim=True) + real.cumsum(1) - 1).clamp(min=0)
        mask = torch.cat([mask, real], 1)
        columns.append(tokens)
        with torch.no_grad(), routing.force(routes):
            out = model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(out.logits)
    routing.detach()
    tokens, logits = torch.cat(columns, 1), torch.cat(logits, 1)
    for row in range(batch):
        real = mask[row].bool()
        masks = {
            layer: (Full() if full else routing.pattern).mask(int(real.sum()), prompt_length=first[row])
            for layer, full in enumerate(routes[row].tolist())
        }
        expected = oracle_logits(model, tokens[row : row + 1, real], masks)
        torch.testing.assert_close(logits[row, real], expected[0], atol=3e-4, rtol=1e-3)


def test_threads_share_a_model():
    model = tiny_model("qwen3")
    routing = randomize(attach(model, CONFIG))
    prompts = [ids(1, 20 + 5 * n, n) for n in range(4)]
    expected = [model.generate(prompt, max_new_tokens=8, do_sample=False) for prompt in prompts]
    wrong = []

    def work(index):
        try:
            for _ in range(4):
                tokens = model.generate(prompts[index], max_new_tokens=8, do_sample=False)
                if not torch.equal(tokens, expected[index]):
                    wrong.append(index)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert routing.routes is not None


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, torch.OutOfMemoryError])
@pytest.mark.parametrize("place", [None, (Call, "_by_view"), (RoutedLayer, "_append")])
def test_an_interrupted_call_leaves_the_model_usable_and_its_cache_refused(error, place, monkeypatch):
    """Interrupted behind the second layer, or in the last one's attention or while it stores."""
    model = tiny_model("qwen3")
    attach(model, CONFIG)
    cache = DynamicCache()
    with torch.no_grad():
        expected = model(ids(1, 20)).logits

        def stop(*args):
            raise error

        with monkeypatch.context() as patched:
            if place is None:
                patched.setattr(model.model.layers[1].mlp, "forward", stop)
            else:
                runs = iter([getattr(*place)] * (model.config.num_hidden_layers - 1) + [stop])
                patched.setattr(*place, lambda *args: next(runs)(*args))
            with pytest.raises(error):
                model(ids(1, 20), past_key_values=cache)
        torch.testing.assert_close(model(ids(1, 20)).logits, expected)
        with pytest.raises(ValueError, match="left half-filled"):
            model(ids(1, 20), past_key_values=cache)
        cache.reset()
        torch.testing.assert_close(model(ids(1, 20), past_key_values=cache).logits, expected)


def test_an_attached_model_is_not_copied_by_halves():
    model = tiny_model("qwen3")
    routing = attach(model, CONFIG)
    with pytest.raises(RuntimeError, match="cannot be copied: detach"):
        copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="cannot be pickled: detach"):
        pickle.dumps(routing)


def test_a_prompt_filled_in_inference_mode_can_be_decoded_outside():
    model = tiny_model("qwen3")
    routing = attach(model, CONFIG)
    with routing.force(0.5):
        with torch.no_grad():
            expected = model(ids(2, 1), past_key_values=model(ids(2, 30)).past_key_values).logits
        with torch.inference_mode():
            cache = model(ids(2, 30)).past_key_values
        with torch.no_grad():
            torch.testing.assert_close(model(ids(2, 1), past_key_values=cache).logits, expected)


def test_rerouting_and_reordering_commute():
    results = []
    for order in ("reroute first", "reorder first"):
        model = tiny_model("qwen3")
        routing = attach(model, CONFIG, keep_full_kv=True)
        with torch.no_grad():
            with routing.force("sparse"):
                cache = model(ids(3, 30)).past_key_values
            if order == "reroute first":
                routing.reroute(cache)
            cache.reorder_cache(torch.tensor([2, 0, 1]))
            if order == "reorder first":
                routing.reroute(cache)
            with routing.force("full"):
                results.append(model(ids(3, 4, 7), past_key_values=cache).logits)
        assert routing.routes.lengths == (34, 34, 34)
    assert torch.equal(*results)


def test_rerouting_a_stock_cache_is_refused():
    model = tiny_model("qwen3")
    stock = model(ids(1, 8)).past_key_values
    with pytest.raises(ValueError, match="no routed layers"):
        attach(model, CONFIG).reroute(stock)


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
