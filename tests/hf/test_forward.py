"""The forward pass: mixed attention and its gradients, packed sequences, checkpointing."""

import pytest
import torch
from helpers.models import CONFIG, FAMILIES, PATTERNS, TRIANGLE, VOCAB, ids, packed, randomize, tiny_model
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flux_attention import attach, decision
from flux_attention.errors import UnsupportedModelError
from flux_attention.hf.cache.layer import RoutedLayer
from flux_attention.hf.cache.size import dense_kv_bytes, kv_bytes
from flux_attention.hf.context import current, enclosing
from flux_attention.hf.forward import ForwardPass
from flux_attention.hf.inputs import Inputs, Prompt
from flux_attention.hf.layout import BatchLayout
from flux_attention.patterns import Full
from flux_attention.training.module import noise_of


def without_and_with_checkpointing():
    """Yield a model in training, with routers: once as it is, once with gradient checkpointing."""
    for checkpointing in (False, True):
        model = tiny_model("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        yield model, attach(model, CONFIG)


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for model, routing in without_and_with_checkpointing():
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


@pytest.mark.parametrize("config", PATTERNS.values(), ids=PATTERNS)
def test_gradients_of_mixed_attention_equal_those_of_the_plain_formula(config, monkeypatch):
    """Invariant 7: O = z · FA + (1 − z) · SA, written out with dense masks, through a whole model in float64."""
    model, prompt, lengths = tiny_model("qwen3").double(), ids(3, 30), [30, 18, 25]
    gates = [torch.tensor(z, dtype=torch.float64, requires_grad=True) for z in ([1.0, 0, 1], [0.0, 0, 1], [0.0, 1, 0])]
    embeds = model.get_input_embeddings()(prompt).detach().requires_grad_()
    weight = torch.randn(3, 30, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    routing = attach(model, config)
    pattern, remaining = routing.sparse, list(gates)
    monkeypatch.setattr(decision, "soft_route", lambda logits, temperature, noise: remaining.pop(0))
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


def test_nan_is_reported_with_its_layer():
    model = tiny_model("llama")
    attach(model, CONFIG)
    model.get_decoder().layers[1].input_layernorm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="layer 1 read NaN"):
        model(ids(1, 8))


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


def test_packed_sequences_have_no_blocks():
    model = tiny_model("qwen3")
    attach(model, PATTERNS["streaming, blocks"])
    with pytest.raises(UnsupportedModelError, match="block_size 4: leave block_size out"):
        model(**packed([ids(1, 30)[0], ids(1, 12)[0]]))


@pytest.mark.parametrize("config", [CONFIG, TRIANGLE], ids=["streaming", "triangle"])
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
def test_the_gates_gradient_is_summed_over_many_tokens_without_loss(dtype):
    """⟨∂L/∂O, FA − SA⟩ of thousands of tokens, which a sum in bfloat16 would stop counting at 256 times one's."""
    lengths = [5000, 300]
    routing = attach(tiny_model("qwen3"), CONFIG)
    layout = BatchLayout.packed(lengths)
    inputs = Inputs(layout, lengths, {}, Prompt(torch.zeros(1, sum(lengths)), layout, lengths))
    forward = ForwardPass(inputs, None, (0,), {}, routing.sparse, routing.full)
    full = torch.ones(1, 4, sum(lengths), 16, dtype=dtype)
    gate = torch.tensor([1.0, 0.0], requires_grad=True)
    chosen = torch.where((torch.arange(sum(lengths)) < 5000)[:, None], full, 3 * full)  # FA − SA is 1, then −3
    forward._mixed(gate, chosen, lambda: torch.zeros_like(full), dtype).sum().backward()
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


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, torch.OutOfMemoryError])
@pytest.mark.parametrize("place", [None, (ForwardPass, "_by_group"), (RoutedLayer, "append")])
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


@pytest.mark.parametrize("family", ["qwen3", "qwen2_vl"])
def test_ctrl_c_leaves_nothing_behind(family):
    """PyTorch does not call hooks behind a KeyboardInterrupt."""
    model = tiny_model(family)
    routing = attach(model, CONFIG)

    def stop(*args):
        raise KeyboardInterrupt

    with torch.no_grad():
        cache = model(ids(1, 20)).past_key_values
        for _ in range(3):
            hook = model.get_decoder().layers[1].register_forward_pre_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                model(ids(1, 20))
            hook.remove()
            assert current.get() is None and enclosing.get() == ()
        routing.detach()
        with pytest.raises(RuntimeError, match="attach the routers again"):
            model(ids(1, 1), past_key_values=cache)


def test_a_reroute_that_failed_is_decided_again(monkeypatch):
    model = tiny_model("qwen3")
    routing = attach(model, CONFIG, keep_full_kv=True)
    with torch.no_grad():
        cache = model(ids(1, 30)).past_key_values
        routing.reroute(cache)
        with monkeypatch.context() as patched, routing.force("sparse"):
            patched.setattr(ForwardPass, "_by_group", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError()))
            with pytest.raises(torch.OutOfMemoryError):
                model(ids(1, 3), past_key_values=cache)
        with routing.force("sparse"):
            model(ids(1, 3), past_key_values=cache)
    assert [cache.layers[layer].routes for layer in routing.layers] == [[False]] * 3


def test_a_cache_of_a_first_call_that_failed_holds_nothing(monkeypatch):
    model, cache = tiny_model("qwen3"), DynamicCache()
    attach(model, CONFIG)
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(ForwardPass, "_by_group", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        with pytest.raises(torch.OutOfMemoryError):
            model(ids(1, 8), past_key_values=cache)
    assert kv_bytes(cache) == dense_kv_bytes(cache) == 0
    with torch.no_grad():
        assert model(ids(1, 8), past_key_values=cache).logits.isfinite().all()


def test_gradients_through_a_cache_are_refused_not_lost():
    model = tiny_model("qwen3")
    attach(model, CONFIG)
    cache = DynamicCache()
    model(ids(1, 12), past_key_values=cache)
    for width in (1, 3):  # a forward call alone is fine
        loss = model(ids(1, width), past_key_values=cache).logits.sum()
        with pytest.raises(UnsupportedModelError, match="do not flow through a routed KV cache"):
            loss.backward()
    model(ids(1, 12)).logits.sum().backward()


@pytest.mark.parametrize("soft", [False, True])
def test_rows_of_unlike_routes_under_autocast(soft):
    model = tiny_model("qwen3")
    routing = attach(model, CONFIG)
    routes = torch.tensor([[1, 0, 1], [0, 1, 0]])
    noise = 100.0 * torch.stack([1 - routes, routes], -1).float()
    with torch.autocast("cpu", torch.bfloat16), routing.soft(1.0, noise) if soft else routing.force(routes):
        together = model(ids(2, 30), use_cache=False).logits
    for row in range(2):
        deciding = routing.soft(1.0, noise[row : row + 1]) if soft else routing.force(routes[row])
        with torch.autocast("cpu", torch.bfloat16), deciding:
            alone = model(ids(2, 30)[row : row + 1], use_cache=False).logits
        assert (together[row] - alone[0]).norm() < 0.05 * alone.norm()


def test_checkpointed_layers_of_routed_prompts_are_not_read_again():
    grads = []
    for model, routing in without_and_with_checkpointing():
        with torch.no_grad():
            for number, router in enumerate(routing.routers.values()):
                router.head[-1].bias.copy_(torch.tensor([float(number == 1), 0.5]))
        model(ids(2, 30), use_cache=False).logits.square().sum().backward()
        assert routing.routes.msr == pytest.approx([1 / 3] * 2)
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*grads)
