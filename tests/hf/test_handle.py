"""The handle: forcing, soft decisions, least lengths, re-routing."""

import asyncio
import copy
import pickle
import threading

import pytest
import torch
from helpers.models import CONFIG, ids, randomize, tiny_model

from flux_attention import attach


def test_force_none_lets_the_routers_decide():
    model = tiny_model("qwen3")
    routing = randomize(attach(model, CONFIG))
    with torch.no_grad():
        model(ids(3, 30))
        decided = routing.routes.routes_BL
        with routing.force("sparse"), routing.force(None):
            model(ids(3, 30))
    assert decided.any() and torch.equal(routing.routes.routes_BL, decided)


def test_short_prompts_run_full_whatever_the_routers_say():
    model = tiny_model("qwen3")
    routing = attach(model, CONFIG, min_tokens=30)
    for router in routing.routers.values():
        with torch.no_grad():
            router.head[-1].bias.copy_(torch.tensor([1.0, 0.0]))
    prompt = ids(2, 30)
    mask = torch.ones_like(prompt)
    mask[0, 0] = 0  # one token too few
    with torch.no_grad():
        logits = model(prompt, attention_mask=mask).logits
        assert routing.routes.msr == [0.0, 1.0] and routing.routes.logits_BL2 is not None
        for row, spec in enumerate(("full", "sparse")):
            with routing.force(spec):
                torch.testing.assert_close(logits[row, 1:], model(prompt, attention_mask=mask).logits[row, 1:])
        cache = model(prompt[:, :29]).past_key_values
        assert routing.routes.msr == [0.0, 0.0] and routing.routes.logits_BL2 is None  # no router ran
        model(prompt, past_key_values=cache)  # stays so, however long it grows
        assert cache.layers[0].routes == [True, True]
        with routing.force("sparse"):
            model(prompt[:, :29])
        assert routing.routes.msr == [1.0, 1.0]
    with routing.soft(1.0):
        model(prompt[:, :29])
    assert routing.gates.requires_grad


@pytest.mark.parametrize("wrong", [-1, "8K", None])
def test_a_wrong_least_length_is_refused(wrong):
    with pytest.raises(ValueError, match="min_tokens"):
        attach(tiny_model("qwen3"), CONFIG, min_tokens=wrong)


def test_a_context_counts_as_a_whole_when_routed_again():
    model = tiny_model("qwen3")
    routing = randomize(attach(model, CONFIG, keep_full_kv=True, min_tokens=30))
    with torch.no_grad():
        cache = model(ids(1, 28)).past_key_values
        routing.reroute(cache)
        model(ids(1, 2), past_key_values=cache)
    assert routing.routes.logits_BL2 is not None


def test_soft_routes_are_hard_and_carry_gradients():
    model = tiny_model("qwen3")
    routing = attach(model, CONFIG)
    for router in routing.routers.values():
        router.head[-1].bias.data.zero_()
    with routing.soft(1.0):
        loss = model(ids(3, 30), labels=ids(3, 30)).loss
    assert routing.gates.shape == (3, 3) and set(routing.gates.flatten().tolist()) <= {0.0, 1.0}
    loss.backward()
    for layer in routing.layers:
        assert routing.routers[str(layer)].head[-1].bias.grad.abs().max() > 0


def test_rerouting_needs_the_full_cache():
    routing = attach(tiny_model("qwen3"), CONFIG)
    with torch.no_grad(), routing.force("sparse"):
        cache = routing.model(ids(1, 40)).past_key_values
    with pytest.raises(ValueError, match="keep_full_kv"):
        routing.reroute(cache)


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


def test_an_attached_model_is_not_copied_by_halves():
    model = tiny_model("qwen3")
    routing = attach(model, CONFIG)
    with pytest.raises(RuntimeError, match="cannot be copied or pickled: detach"):
        copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="cannot be copied or pickled: detach"):
        pickle.dumps(routing)


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


def test_what_a_thread_forces_and_decides_is_its_own():
    model = tiny_model("qwen3")
    routing = randomize(attach(model, CONFIG))
    assert routing.routes is None and routing.gates is None
    seen, wrong = {}, []

    def request():
        with torch.no_grad():
            model(ids(1, 40))
        seen["settings"], seen["routes"] = routing.settings.forced, routing.routes

    with routing.force("sparse"):
        thread = threading.Thread(target=request)
        thread.start()
        thread.join()
        assert routing.routes is seen["routes"]  # of any thread, as this one ran nothing
        with torch.no_grad():
            model(ids(1, 40))
        assert routing.routes.msr == [1.0]
    assert seen["settings"] is None and seen["routes"].logits_BL2 is not None

    def reader(length):
        for _ in range(8):
            with routing.force(0.5 if length % 20 else None):
                model.generate(ids(1, length), max_new_tokens=2, do_sample=False)
            if routing.routes.lengths != (length,) or (routing.routes.logits_BL2 is None) != bool(length % 20):
                wrong.append(length)

    threads = [threading.Thread(target=reader, args=(length,)) for length in (20, 30, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_tasks_force_is_its_own():
    """Two requests of one thread that take turns, as under asyncio."""
    model = tiny_model("qwen3")
    routing = attach(model, CONFIG)

    async def request(spec, ratios):
        with routing.force(spec):
            for _ in range(3):
                await asyncio.sleep(0)
                with torch.no_grad():
                    model(ids(1, 40))
                ratios.extend(routing.routes.msr)

    async def both():
        found = [], []
        await asyncio.gather(request("sparse", found[0]), request("full", found[1]))
        return found

    assert asyncio.run(both()) == ([1.0] * 3, [0.0] * 3)


def test_blocks_of_generators_end_in_any_order():
    routing = attach(tiny_model("qwen3"), CONFIG)

    def forced(spec):
        with routing.force(spec):
            yield

    first, second = forced("sparse"), forced("full")
    next(first)
    next(second)
    assert routing.settings.forced == "full"
    first.close()
    assert routing.settings.forced == "full"
    second.close()
    assert routing.settings.forced is None


def test_soft_decisions_of_forced_routes_are_refused():
    model = tiny_model("qwen3")
    routing = attach(model, CONFIG)
    with routing.force("sparse"), routing.soft(1.0), pytest.raises(ValueError, match="carry no gradients"):
        model(ids(1, 20))
    with routing.force("sparse"), routing.force(None), routing.soft(1.0):
        model(ids(1, 20))
    assert routing.gates.requires_grad
    routing.detach()
    assert routing.routes is not None and routing.gates is None


def test_a_handle_forces_nothing_once_it_is_detached():
    model = tiny_model("qwen3")
    routing = attach(model, CONFIG)
    with routing.force("sparse"):  # a block that is open meanwhile ends in peace
        routing.detach()
    for what, call in (("force routes", lambda: routing.force("full")), ("decide softly", lambda: routing.soft(1.0))):
        with pytest.raises(RuntimeError, match=rf"cannot {what} after detach\(\).*attach\(model, \.\.\.\) again"):
            call()
