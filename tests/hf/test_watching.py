"""Decisions that are watched, and layers that are pinned while routers decide on the others."""

import threading

import pytest
import torch
from helpers.models import CONFIG, ids, randomize, tiny_model

from flux_attention import attach
from flux_attention.hf.watching import watching


@pytest.fixture
def routing():
    return randomize(attach(tiny_model("qwen3"), CONFIG))


def prefill(routing, tokens):
    with torch.no_grad():
        return routing.model(tokens).logits


@pytest.mark.parametrize("decide", ["prefill", "ends"])
def test_every_layer_is_told_in_order_with_its_routers_output(decide):
    routing = randomize(attach(tiny_model("qwen3"), CONFIG, decide=decide))
    told = []
    with watching(lambda *what: told.append(what)):
        prefill(routing, ids(2, 40))
    assert [unit for unit, _, _ in told] == list(routing.units)
    for place, (_, routes, logits_B2) in enumerate(told):
        assert routes == routing.routes.routes_BL[:, place].tolist()
        assert torch.equal(logits_B2, routing.routes.logits_BL2[:, place])
    prefill(routing, ids(2, 40))
    assert len(told) == len(routing.units)  # nobody is told behind the block


def test_forced_routes_have_no_margins(routing):
    told = []
    with watching(lambda *what: told.append(what)), routing.force([1]):
        prefill(routing, ids(1, 30))
    assert told == [(0, [False], None), (1, [True], None), (2, [False], None)]


@pytest.mark.parametrize("is_full", [True, False])
def test_a_pinned_layer_runs_so_and_routers_decide_on_the_others(routing, is_full):
    tokens = ids(1, 60)
    with watching(lambda *_: None, {1: is_full}):
        logits = prefill(routing, tokens)
    routes = routing.routes
    assert bool(routes.routes_BL[0, 1]) is is_full and routes.logits_BL2 is not None
    others = [place for place in range(3) if place != 1]
    assert torch.equal(routes.routes_BL[:, others], (routes.logits_BL2[..., 1] > routes.logits_BL2[..., 0])[:, others])
    with routing.force(routes.routes_BL):  # an independent way to the same routes
        assert torch.equal(prefill(routing, tokens), logits)


def test_what_is_raised_ends_the_call_between_two_layers(routing):
    seen = []

    def stop(unit, *_):
        seen.append(unit)
        if unit == 1:
            raise InterruptedError("enough")

    with watching(stop), pytest.raises(InterruptedError, match="enough"):
        prefill(routing, ids(1, 30))
    assert seen == [0, 1]
    prefill(routing, ids(1, 30))  # the model is as before


def test_other_threads_are_not_watched(routing):
    told = []
    with watching(lambda *what: told.append(what), {0: True}):
        thread = threading.Thread(target=prefill, args=(routing, ids(1, 30)))
        thread.start()
        thread.join()
    assert not told


def test_blocks_may_end_in_another_order_than_they_began(routing):
    told = {name: [] for name in "ab"}

    def opened(name):
        with watching(lambda *what: told[name].append(what)):
            yield

    first, second = opened("a"), opened("b")
    next(first), next(second)
    first.close()
    prefill(routing, ids(1, 30))
    second.close()
    prefill(routing, ids(1, 30))
    assert len(told["b"]) == len(routing.units) and not told["a"]


def test_pins_of_what_is_not_routed_are_refused_before_anything_is_computed(routing):
    told = []
    with watching(lambda *what: told.append(what), {99: True}), pytest.raises(ValueError, match=r"cannot pin \[99\]"):
        prefill(routing, ids(1, 30))
    assert not told
