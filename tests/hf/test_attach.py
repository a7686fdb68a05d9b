"""The invariants of attaching: nothing changes until routes do, and what routes change is exactly the mask."""

import pytest
import torch
from helpers.models import CONFIG, PATTERNS, TRIANGLE, ids, randomize, tiny_model
from helpers.oracles import oracle_logits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from flux_attention import attach, kv_bytes
from flux_attention.patterns import Full


def test_fresh_routers_change_nothing(model):
    prompt = ids(2, 40)
    with torch.no_grad():
        expected = model(prompt).logits
        routing = attach(model, CONFIG)
        torch.testing.assert_close(model(prompt).logits, expected, atol=2e-5, rtol=1e-4)
    assert routing.routes.routes_BL.all()
    assert routing.routes.msr == [0.0, 0.0]


def test_detach_restores_the_model_exactly(model):
    prompt = ids(2, 40)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    attributes = [sorted(vars(m)) for m in model.modules()]
    config = model.config.to_dict()
    with torch.no_grad():
        expected = model(prompt).logits
        routing = attach(model, CONFIG)
        assert model.state_dict().keys() == state.keys()
        with routing.force("sparse"):
            assert not torch.equal(model(prompt).logits, expected)
        routing.detach()
        assert torch.equal(model(prompt).logits, expected)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert model.config.to_dict() == config
    routing.detach()  # twice does no harm
    attach(model, CONFIG).detach()


def test_attach_twice_is_an_error_that_says_so(model):
    attach(model, CONFIG)
    with pytest.raises(RuntimeError, match=r"attached to this model already.*detach"):
        attach(model, CONFIG)


@pytest.mark.parametrize("config", PATTERNS.values(), ids=PATTERNS)
def test_forced_routes_compute_exactly_the_mask(model, config):
    prompt = ids(1, 37)
    routing = attach(model, config)
    for spec in ("full", "sparse", 0.5, [routing.layers[-1]]):
        with torch.no_grad(), routing.force(spec):
            actual = model(prompt, use_cache=False).logits
            cached = model(prompt, use_cache=True).logits
        pattern = {
            layer: (Full() if full else routing.sparse).mask(37)
            for layer, full in zip(routing.layers, routing.routes.routes_BL[0].tolist(), strict=True)
        }
        routing.detach()
        expected = oracle_logits(model, prompt, pattern)
        routing = attach(model, config)
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(cached, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("config", PATTERNS.values(), ids=PATTERNS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_split_through_the_cache_equals_one_masked_forward(family, config, data):
    model = tiny_model(family)
    length = data.draw(st.integers(2, 60), "length")
    cuts = [*sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=6), "cuts")), length]
    batch = data.draw(st.integers(1, 3), "batch")
    keep_full = data.draw(st.booleans(), "keep_full_kv")
    prompt = ids(batch, length, data.draw(st.integers(0, 99)))
    routing = attach(model, config, keep_full_kv=keep_full)
    routes = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.booleans(), min_size=len(routing.layers), max_size=len(routing.layers)),
                min_size=batch,
                max_size=batch,
            ),
            "routes",
        )
    )
    cache, pieces, start = DynamicCache(config=model.get_decoder().config), [], 0
    with torch.no_grad(), routing.force(routes):
        for stop in cuts:
            # Steps one at a time now and then, as in decode.
            for first, last in (
                [(start, stop)] if data.draw(st.booleans()) or start == 0 else [(i, i + 1) for i in range(start, stop)]
            ):
                pieces.append(model(prompt[:, first:last], past_key_values=cache, use_cache=True).logits)
            start = stop
    actual = torch.cat(pieces, dim=1)
    routing.detach()
    for row in range(batch):
        masks = {
            layer: (Full() if full else routing.sparse).mask(length, prompt_length=cuts[0])
            for layer, full in zip(routing.layers, routes[row].tolist(), strict=True)
        }
        expected = oracle_logits(model, prompt[row : row + 1], masks)
        torch.testing.assert_close(actual[row : row + 1], expected, atol=3e-4, rtol=1e-3)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_batch_equals_its_sequences_alone(family, data):
    model = tiny_model(family)
    side = data.draw(st.sampled_from(["left", "right"]), "side")
    config = data.draw(st.sampled_from([CONFIG, TRIANGLE]), "config")
    lengths = data.draw(st.lists(st.integers(1, 45), min_size=2, max_size=4), "lengths")
    routing = randomize(attach(model, config))
    prompts = [ids(1, length, seed) for seed, length in enumerate(lengths)]
    longest = max(lengths)
    padded = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, prompt in enumerate(prompts):
        where = slice(longest - lengths[row], None) if side == "left" else slice(lengths[row])
        padded[row, where], mask[row, where] = prompt[0], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    steps = ids(len(lengths), 4, 99)

    def run(input_ids, attention_mask, position_ids, following):
        cache, logits = DynamicCache(config=model.get_decoder().config), []
        extra_arguments = {} if family == "qwen2_vl" else {"position_ids": position_ids}
        out = model(input_ids, attention_mask=attention_mask, past_key_values=cache, **extra_arguments)
        prompt_logits, routes = out.logits, routing.routes
        for step in range(following.shape[1]):
            attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], 1)
            position_ids = position_ids.max(1, keepdim=True).values + 1
            extra_arguments = {} if family == "qwen2_vl" else {"position_ids": position_ids}
            out = model(
                following[:, step : step + 1], attention_mask=attention_mask, past_key_values=cache, **extra_arguments
            )
            logits.append(out.logits)
        return prompt_logits, torch.cat([prompt_logits[:, :0], *logits], 1), routes

    if side == "right" and family in ("qwen2_vl", "gemma3"):
        # Stock behaviour, not ours: the first counts positions itself, padding included, and the second's sliding
        # layers count padding into their window. Steps after right padding then differ in the stock model too.
        steps = steps[:, :0]
    with torch.no_grad():
        together, together_steps, routes = run(padded, mask, positions, steps)
        for row, prompt in enumerate(prompts):
            alone, alone_steps, own = run(
                prompt, torch.ones_like(prompt), torch.arange(lengths[row])[None], steps[row : row + 1]
            )
            assert torch.equal(own.routes_BL[0], routes.routes_BL[row])
            assert own.esr[0] == pytest.approx(routes.esr[row])
            real = mask[row].bool()
            torch.testing.assert_close(together[row, real], alone[0], atol=5e-4, rtol=1e-3)
            torch.testing.assert_close(together_steps[row], alone_steps[0], atol=5e-4, rtol=1e-3)


def test_routers_can_disagree():
    """Guards the test above: with these routers, routes differ between inputs and layers."""
    routing = randomize(attach(tiny_model("qwen3"), CONFIG))
    with torch.no_grad():
        routing.model(ids(16, 40))
    routes = routing.routes.routes_BL
    assert 0 < routes.float().mean() < 1
    assert (routes != routes[0]).any()


@pytest.mark.parametrize("tokens", [50, 200])
def test_sparse_layers_keep_a_constant_number_of_bytes(model, tokens):
    routing = attach(model, CONFIG)
    with torch.no_grad(), routing.force("sparse"):
        cache = model(ids(2, tokens)).past_key_values
        for _ in range(20):
            model(ids(2, 1), past_key_values=cache)
    base = routing.config.base_model
    expected = 2 * (4 + 9) * base.num_kv_heads * base.head_dim * 2 * 4
    assert [cache.layers[layer].nbytes for layer in routing.layers] == [expected] * len(routing.layers)
    assert kv_bytes(cache) >= expected * len(routing.layers)


def test_a_cache_does_not_outlive_its_routers(model):
    routing = attach(model, CONFIG)
    with torch.no_grad():
        cache = model(ids(1, 20)).past_key_values
        routing.detach()
        with pytest.raises(RuntimeError, match="attach the routers again"):
            model(ids(1, 1), past_key_values=cache)
        stock = model(ids(1, 20)).past_key_values
        attach(model, CONFIG)
        with pytest.raises(ValueError, match="filled before routers were attached"):
            model(ids(1, 1), past_key_values=stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(family, dtype):
    model = tiny_model(family).to(dtype)
    with torch.no_grad():
        stock = model(ids(2, 30)).logits
        routing = attach(model, CONFIG)
        fresh = model(ids(2, 30)).logits
        with routing.force("sparse"):
            sparse = model(ids(2, 30)).logits
            cached = model(ids(2, 1), past_key_values=model(ids(2, 30)).past_key_values).logits
    assert fresh.dtype == sparse.dtype == cached.dtype == dtype
    tolerance = 0.06 if dtype == torch.bfloat16 else 0.01
    assert (fresh - stock).float().norm() < tolerance * stock.float().norm()
    assert sparse.isfinite().all() and cached.isfinite().all()
