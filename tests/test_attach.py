"""The invariants of attaching: nothing changes until routes do, and what routes change is exactly the mask."""

import sys

import flux_attention.call
import pytest
import torch
from conftest import FAMILIES, SMALL, VOCAB, tiny_model
from flux_attention.cache import Tokens
from flux_attention.call import Call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flux_attention import FluxConfig, UnsupportedModelError, attach, kv_bytes
from flux_attention.patterns import Full
from flux_attention.training.module import noise_of

CONFIG = FluxConfig(sink=4, window=9, last_n=5, pool_size=6)
TRIANGLE = FluxConfig(pattern="triangle", sink=4, window=9, last_n=5, pool_size=6)


def ids(batch, length, seed=0):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def randomize(routing, seed=0):
    """Routers that decide differently for different inputs and layers."""
    generator = torch.Generator().manual_seed(seed)
    for router in routing.routers.values():
        with torch.no_grad():
            router.head[-1].weight.normal_(std=3.0, generator=generator)
            router.head[-1].bias.zero_()
            router.encoder[0].weight.mul_(8.0)
            router.encoder[2].weight.mul_(4.0)
    return routing


def oracle_logits(model, input_ids, masks):
    """The stock model with a dense bool mask for each layer: ``masks[layer]`` is (S, S)."""

    def masked(module, query, key, value, attention_mask, **kwargs):
        mask = masks.get(module.layer_idx)
        if mask is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return sdpa_attention_forward(module, query, key, value, mask[None, None], **kwargs)

    config = model.get_decoder().config
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register("oracle", masked)
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    ALL_MASK_ATTENTION_FUNCTIONS.register("oracle", sdpa_mask)
    config._attn_implementation = "oracle"
    try:
        with torch.no_grad():
            return model(input_ids, use_cache=False).logits
    finally:
        config._attn_implementation = before


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


def test_of_a_prompt_in_chunks_the_first_counts():
    routing = randomize(attach(tiny_model("qwen3"), CONFIG, min_tokens=30))
    for chunk, ran in ((16, False), (32, True)):
        routing.model.generate(ids(1, 40), max_new_tokens=2, prefill_chunk_size=chunk, do_sample=False)
        assert (routing.routes.logits_BL2 is not None) == ran


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


def test_fresh_routers_change_nothing(model):
    prompt = ids(2, 40)
    with torch.no_grad():
        expected = model(prompt).logits
        routing = attach(model, CONFIG)
        torch.testing.assert_close(model(prompt).logits, expected, atol=2e-5, rtol=1e-4)
    assert routing.routes.routes_BL.all()
    assert routing.routes.msr == [0.0, 0.0]


def test_activations_in_pieces_change_nothing(model, monkeypatch):
    prompt = ids(2, 40)
    layer = model.get_decoder().layers[0]
    calls, forward = [], layer.mlp.forward
    monkeypatch.setattr(layer.mlp, "forward", lambda states: calls.append(states.shape[1]) or forward(states))
    attach(model, CONFIG)
    with torch.no_grad():
        whole = model(prompt).logits
        module = sys.modules["flux_attention.attach"]  # the name in the package is the function
        monkeypatch.setattr(module, "PIECE", 15)
        torch.testing.assert_close(model(prompt).logits, whole, atol=2e-5, rtol=1e-4)
    assert calls == [40, 7, 7, 7, 7, 7, 5]  # of two rows each


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


@pytest.mark.parametrize("config", [CONFIG, TRIANGLE], ids=lambda c: c.pattern)
def test_forced_routes_compute_exactly_the_mask(model, config):
    prompt = ids(1, 37)
    routing = attach(model, config)
    for spec in ("full", "sparse", 0.5, [routing.layers[-1]]):
        with torch.no_grad(), routing.force(spec):
            actual = model(prompt, use_cache=False).logits
            cached = model(prompt, use_cache=True).logits
        pattern = {
            layer: (Full() if full else routing.pattern).mask(37)
            for layer, full in zip(routing.layers, routing.routes.routes_BL[0].tolist(), strict=True)
        }
        routing.detach()
        expected = oracle_logits(model, prompt, pattern)
        routing = attach(model, config)
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(cached, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("config", [CONFIG, TRIANGLE], ids=lambda c: c.pattern)
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
            layer: (Full() if full else routing.pattern).mask(length, prompt_length=cuts[0])
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


def test_query_layouts_where_length_equals_heads():
    """(B, S, H, D) and (B, H, S, D) look alike then: routes must still be those of a longer batch's row."""
    for family in ("gemma3", "qwen3"):
        model = tiny_model(family)
        routing = randomize(attach(model, CONFIG))
        prompt = ids(1, 4)
        with torch.no_grad():
            model(prompt)
            alone = routing.routes.logits_BL2
            padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], 1)
            mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
            model(padded, attention_mask=mask, position_ids=torch.tensor([[0, 0, 0, 0, 1, 2, 3]]))
        torch.testing.assert_close(routing.routes.logits_BL2, alone, atol=1e-4, rtol=1e-4)


def test_sliding_layers_are_left_alone():
    routing = attach(tiny_model("gemma3"), CONFIG)
    assert routing.layers == (1, 3)


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


def test_inputs_embeds_and_positional_arguments(model):
    decoder = model.get_decoder()
    prompt = ids(2, 30)
    routing = attach(model, CONFIG)
    with torch.no_grad(), routing.force("sparse"):
        expected = decoder(input_ids=prompt).last_hidden_state
        torch.testing.assert_close(decoder(prompt).last_hidden_state, expected)
        embeds = model.get_input_embeddings()(prompt)
        if "gemma" not in model.config.model_type:  # whose embedding layer scales, also when called from outside
            torch.testing.assert_close(decoder(inputs_embeds=embeds).last_hidden_state, expected)


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = tiny_model("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        routing = attach(model, CONFIG)
        for router in routing.routers.values():
            torch.nn.init.normal_(router.head[-1].weight, generator=torch.Generator().manual_seed(1))
        losses = []
        with routing.soft(1.0):
            for seed in (0, 1):  # two forwards before the backward: recomputation must find the right call
                torch.manual_seed(seed)
                out = model(ids(2, 30, seed), labels=ids(2, 30, seed), prompt_lengths=[20 + seed, 12])
                losses.append(out.loss + routing.gates.mean())
        sum(losses).backward()
        grads.append([p.grad.clone() for p in routing.routers.parameters()])
    assert any(g.abs().max() > 0 for g in grads[0])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-4)


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


def test_prompt_lengths_hide_the_answer_from_the_router():
    model = tiny_model("qwen3")
    routing = randomize(attach(model, CONFIG))
    prompt = ids(2, 30)
    other = prompt.clone()
    other[:, 20:] = ids(2, 10, seed=5)
    with torch.no_grad():
        model(prompt, prompt_lengths=[20, 20])
        first = routing.routes.logits_BL2
        model(other, prompt_lengths=[20, 20])
        torch.testing.assert_close(routing.routes.logits_BL2, first)
        model(other)
        assert not torch.allclose(routing.routes.logits_BL2, first)
    for wrong in ([20], [0, 20], [31, 20]):
        with pytest.raises(ValueError, match="prompt_lengths"):
            model(prompt, prompt_lengths=wrong)


def test_rerouting_needs_the_full_cache():
    routing = attach(tiny_model("qwen3"), CONFIG)
    with torch.no_grad(), routing.force("sparse"):
        cache = routing.model(ids(1, 40)).past_key_values
    with pytest.raises(ValueError, match="keep_full_kv"):
        routing.reroute(cache)


@pytest.mark.parametrize("config", [CONFIG, TRIANGLE], ids=lambda c: c.pattern)
def test_gradients_of_mixed_attention_equal_those_of_the_plain_formula(config, monkeypatch):
    """Invariant 7: O = z · FA + (1 − z) · SA, written out with dense masks, through a whole model in float64."""
    model, prompt, lengths = tiny_model("qwen3").double(), ids(3, 30), [30, 18, 25]
    gates = [torch.tensor(z, dtype=torch.float64, requires_grad=True) for z in ([1.0, 0, 1], [0.0, 0, 1], [0.0, 1, 0])]
    embeds = model.get_input_embeddings()(prompt).detach().requires_grad_()
    weight = torch.randn(3, 30, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    routing = attach(model, config)
    pattern, remaining = routing.pattern, list(gates)
    monkeypatch.setattr(flux_attention.call, "soft_route", lambda logits, temperature, noise: remaining.pop(0))
    with routing.soft(1.0):
        logits = model(inputs_embeds=embeds, prompt_lengths=lengths).logits
    actual = torch.autograd.grad((logits * weight).sum(), [embeds, *gates])
    routing.detach()

    def plain(module, query, key, value, attention_mask, scaling=None, **kwargs):
        z = gates[module.layer_idx][:, None, None, None]
        masks = torch.stack([pattern.mask(30, prompt_length=length) for length in lengths])[:, None]
        scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * scaling
        value = value.repeat_interleave(2, 1)
        full, sparse = (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value for mask in (Full().mask(30), masks))
        return (z * full + (1 - z) * sparse).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("plain", plain)
    model.config._attn_implementation = "plain"
    logits = model(inputs_embeds=embeds, use_cache=False).logits
    expected = torch.autograd.grad((logits * weight).sum(), [embeds, *gates])
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


BAD_CALLS = {
    "empty": (dict(input_ids=torch.zeros(1, 0, dtype=torch.long)), ValueError, "empty"),
    "no input": (dict(), ValueError, "without input_ids"),
    "attentions": (dict(input_ids=ids(1, 8), output_attentions=True), UnsupportedModelError, "output_attentions"),
    "4-D mask": (
        dict(input_ids=ids(1, 8), attention_mask=torch.ones(1, 1, 8, 8)),
        UnsupportedModelError,
        "padding mask",
    ),
    "wrong mask": (
        dict(input_ids=ids(1, 8), attention_mask=torch.ones(1, 7)),
        ValueError,
        r"shape \(1, 7\), expected \(1, 8\)",
    ),
    "all masked": (
        dict(input_ids=ids(2, 8), attention_mask=torch.tensor([[1] * 8, [0] * 8])),
        ValueError,
        "every token of sequence 1",
    ),
    "packed": (
        dict(input_ids=ids(1, 8), position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]), use_cache=False),
        UnsupportedModelError,
        "packed",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused_and_leave_the_model_usable(name):
    arguments, error, message = BAD_CALLS[name]
    model = tiny_model("llama")
    attach(model, CONFIG)
    with torch.no_grad():
        expected = model(ids(1, 8)).logits
        with pytest.raises(error, match=message):
            model.get_decoder()(**arguments)
        torch.testing.assert_close(model(ids(1, 8)).logits, expected)


def test_nan_is_reported_with_its_layer():
    model = tiny_model("llama")
    attach(model, CONFIG)
    model.get_decoder().layers[1].input_layernorm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="layer 1 read NaN"):
        model(ids(1, 8))


def test_a_mask_that_changes_the_past_is_refused():
    model = tiny_model("llama")
    attach(model, CONFIG)
    with torch.no_grad():
        cache = model(ids(1, 8), attention_mask=torch.ones(1, 8)).past_key_values
        with pytest.raises(ValueError, match="already in the KV cache"):
            model(ids(1, 1), attention_mask=torch.tensor([[0] + [1] * 8]), past_key_values=cache)


def packed(rows):
    """What a forward of these sequences packed into one row takes."""
    lengths = [len(row) for row in rows]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return dict(input_ids=torch.cat(rows)[None], position_ids=positions[None], sequence_lengths=lengths)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_packed_sequences_are_as_if_alone(family):
    if family == "qwen2_vl":
        pytest.skip("its positions have three dimensions")
    model = tiny_model(family)
    routing = randomize(attach(model, CONFIG))
    rows, prompts = [ids(1, length, length)[0] for length in (30, 1, 44, 17)], [30, 1, 20, 9]
    with torch.no_grad():
        together = model(**packed(rows), prompt_lengths=prompts).logits[0].split([len(row) for row in rows])
        routes = routing.routes
        assert routes.lengths == tuple(prompts)
        for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            alone = model(row[None], prompt_lengths=[prompt], use_cache=False).logits[0]
            assert routing.routes.routes_BL[0].tolist() == routes.routes_BL[index].tolist()
            torch.testing.assert_close(together[index], alone, atol=2e-5, rtol=1e-4)
    assert 0 < routes.routes_BL.float().mean() < 1


@pytest.mark.parametrize("config", [CONFIG, TRIANGLE], ids=lambda c: c.pattern)
def test_gradients_of_packed_sequences_are_those_of_each_alone(config):
    model = tiny_model("qwen3")
    routing = randomize(attach(model, config))
    rows, prompts = [ids(1, length, length)[0] for length in (30, 12, 44)], [30, 5, 20]
    noise = noise_of(0, 0, [0, 1, 2], 3)
    gates, grads = [], []
    for groups in ([[0, 1, 2]], [[0], [1], [2]]):
        routing.routers.zero_grad()
        for group in groups:
            with routing.soft(2.0, noise[group]):
                logits = model(**packed([rows[i] for i in group]), prompt_lengths=[prompts[i] for i in group]).logits
            (logits.square().sum() + routing.gates.sum()).backward()
            gates.append(routing.gates.detach())
        grads.append([parameter.grad.clone() for parameter in routing.routers.parameters()])
    assert torch.equal(gates[0], torch.cat(gates[1:])) and 0 < gates[0].mean() < 1
    for together, alone in zip(*grads, strict=True):
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gates_gradient_is_summed_over_many_tokens_without_loss(dtype, monkeypatch):
    """⟨∂L/∂O, FA − SA⟩ of thousands of tokens, which a sum in bfloat16 would stop counting at 256 times one's."""
    lengths = [5000, 300]
    routing = attach(tiny_model("qwen3"), CONFIG)
    call = Call(routing, Tokens.packed(lengths), lengths, {})
    full = torch.ones(1, 4, sum(lengths), 16, dtype=dtype)
    gate = torch.tensor([1.0, 0.0], requires_grad=True)
    call.gates[0], call.routes[0] = gate, [True, False]
    monkeypatch.setattr(call, "_by_route", lambda routes, *a: torch.zeros_like(full))
    chosen = torch.where((torch.arange(sum(lengths)) < 5000)[:, None], full, 3 * full)  # FA − SA is 1, then −3
    call._mixed(0, chosen, full, None, None, 1.0).sum().backward()
    assert gate.grad.tolist() == [5000 * 64, -3 * 300 * 64]


def test_routers_decide_in_float32_under_autocast():
    model = tiny_model("qwen3").to(torch.bfloat16)
    routing = randomize(attach(model, CONFIG))
    with torch.no_grad():
        model(ids(1, 40))
        plain = routing.routes.logits_BL2
        with torch.autocast("cpu", torch.bfloat16):
            model(ids(1, 40))
    assert routing.routes.logits_BL2.dtype == torch.float32 and torch.equal(routing.routes.logits_BL2, plain)


def test_packing_is_refused_where_layers_would_mix_sequences():
    sizes = dict(SMALL, num_hidden_layers=2, head_dim=16, layer_types=["linear_attention", "full_attention"])
    linear = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    config = AutoConfig.for_model("qwen3_next", **sizes, **linear, **experts)
    model = AutoModelForCausalLM.from_config(config).eval()
    attach(model, CONFIG)
    with pytest.raises(UnsupportedModelError, match="would mix packed sequences"):
        model(**packed([ids(1, 5)[0], ids(1, 7)[0]]))
    with torch.no_grad():
        assert model(**packed([ids(1, 5)[0]])).logits.shape == (1, 5, VOCAB)


def test_wrong_packing_is_refused():
    model = tiny_model("qwen3")
    routing = attach(model, CONFIG)
    good = packed([ids(1, 5)[0], ids(1, 7)[0]])
    for wrong, message in (
        (dict(sequence_lengths=[5, 6]), "expected one row"),
        (dict(sequence_lengths=[12, 0]), "expected one row"),
        (dict(sequence_lengths=[]), "expected one row"),
        (dict(position_ids=None), "position_ids"),
        (dict(attention_mask=torch.ones(1, 12)), "no attention_mask"),
        (dict(past_key_values=DynamicCache()), "no past_key_values"),
        (dict(prompt_lengths=[5]), "prompt_lengths"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{**good, **wrong})
    with routing.soft(1.0, torch.zeros(1, 3, 2)), pytest.raises(ValueError, match=r"noise has shape \(1, 3, 2\)"):
        model(**good)
