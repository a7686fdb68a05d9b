"""Whatever swaps, wraps, copies or replicates modules after attach routes rightly or is refused; detach finishes."""

import copy

import pytest
import torch
from helpers.models import CONFIG, ids, randomize, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from flux_attention import UnsupportedModelError, attach

LORA = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)


def lora(model):
    torch.manual_seed(1)
    return get_peft_model(model, LORA)


def decided(model, routing):
    with torch.no_grad():
        logits = model(ids(3, 40)).logits
    return logits, routing.routes.logits_BL2


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("compile", [False, True])
def test_lora_before_and_after_attach_decide_alike(family, compile, backend):
    target = ["qkv_proj"] if family == "phi3" else ["q_proj"]
    config = LoraConfig(target_modules=target, r=4, init_lora_weights=False)

    def wrapped(model):
        torch.manual_seed(1)
        return get_peft_model(model, config)

    before, after = tiny_model(family), tiny_model(family)
    routing = randomize(attach(after, CONFIG, compile=compile))
    first = wrapped(before)
    other = attach(before, CONFIG, compile=compile)
    other.routers.load_state_dict(routing.routers.state_dict())
    expected = decided(first, other)
    plain = decided(after, routing)
    second = wrapped(after)
    for a, b in zip(decided(second, routing), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected[1], plain[1], atol=1e-3)
    unloaded = second.unload()
    for a, b in zip(decided(unloaded, routing), plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    routing.detach()
    assert hooks(unloaded) == 0
    assert bool(backend.frame_count) == compile


@pytest.mark.parametrize("then", ["keep", "unload", "merge"])
def test_detach_finishes_whatever_lora_did(then):
    model = tiny_model("llama")
    with torch.no_grad():
        stock = model(ids(2, 30)).logits
        routing = attach(model, CONFIG)
        wrapped = lora(model)
        with_lora = wrapped(ids(2, 30)).logits
        left = {"keep": lambda: wrapped, "unload": wrapped.unload, "merge": wrapped.merge_and_unload}[then]()
        routing.detach()
        routing.detach()
        expected = stock if then == "unload" else with_lora
        torch.testing.assert_close(left(ids(2, 30)).logits, expected, atol=1e-4, rtol=1e-3)
    assert hooks(model) == 0 and not any(hasattr(module, "flux_layer") for module in model.modules())
    assert model.config._attn_implementation == "sdpa" and type(model) is type(tiny_model("llama"))
    attach(model, CONFIG).detach()


def test_a_quantiser_that_swaps_modules():
    """PyTorch's own dynamic quantisation, in place, puts other modules where the linear ones were."""
    model = tiny_model("llama")
    routing = randomize(attach(model, CONFIG))
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    found = decided(model, routing)
    routing.detach()
    other = attach(model, CONFIG)
    other.routers.load_state_dict(routing.routers.state_dict())
    for a, b in zip(found, decided(model, other), strict=True):
        torch.testing.assert_close(a, b)


def test_a_query_module_that_is_taken_away_is_named():
    model = tiny_model("llama")
    routing = attach(model, CONFIG)
    model.model.layers[1].self_attn.q_proj = None
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="query module of layer 1 was taken away"):
        model(ids(1, 20))
    routing.detach()


def test_an_attention_module_that_is_replaced_is_named():
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    routing = attach(model, CONFIG)
    model.model.layers[1].self_attn = other.model.layers[1].self_attn
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=r"layer 1 did not show|layers \[1\] did not call"):
        model(ids(1, 20))
    routing.detach()


def test_a_wrapper_around_an_mlp_stays():
    model = tiny_model("llama")
    with torch.no_grad():
        stock = model(ids(1, 20)).logits
        routing = attach(model, CONFIG)
        mlp, calls = model.model.layers[0].mlp, []
        inner = mlp.forward
        mlp.forward = lambda states: calls.append(1) or inner(states)
        torch.testing.assert_close(model(ids(1, 20)).logits, stock, atol=2e-5, rtol=1e-4)
        routing.detach()
        torch.testing.assert_close(model(ids(1, 20)).logits, stock)
        assert len(calls) == 2
        attach(model, CONFIG)
        torch.testing.assert_close(model(ids(1, 20)).logits, stock, atol=2e-5, rtol=1e-4)
        assert len(calls) == 3


def test_a_copied_mlp_runs_on_its_own_weights():
    model = tiny_model("llama")
    attach(model, CONFIG)
    mlp = model.model.layers[0].mlp
    twin = copy.deepcopy(mlp)
    states = torch.randn(1, 5, model.config.hidden_size)
    with torch.no_grad():
        twin.down_proj.weight.zero_()
        assert not twin(states).any() and mlp(states).any()


def test_accelerates_hooks_after_attach():
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("qwen3")
    routing = randomize(attach(model, CONFIG))
    expected = decided(model, routing)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    for a, b in zip(decided(model, routing), expected, strict=True):
        torch.testing.assert_close(a, b)
    routing.detach()
    accelerate.hooks.remove_hook_from_submodules(model)
    with torch.no_grad():
        torch.testing.assert_close(model(ids(3, 40)).logits, tiny_model("qwen3")(ids(3, 40)).logits)


def test_replicas_are_refused():
    """``nn.DataParallel`` makes such copies, which share hooks and routers."""
    model = tiny_model("llama")
    attach(model, CONFIG)
    replica = model.model._replicate_for_data_parallel()
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=r"nn\.DataParallel"):
        replica(ids(1, 20))
    with torch.no_grad():
        assert model(ids(1, 20)).logits.isfinite().all()


def test_a_config_copied_from_an_attached_model_is_a_config():
    first = tiny_model("llama")
    routing = attach(first, CONFIG)
    second = AutoModelForCausalLM.from_config(copy.deepcopy(first.config)).eval()
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        expected = second(ids(2, 30)).logits
        other = attach(second, CONFIG)
        with routing.force("sparse"):
            torch.testing.assert_close(second(ids(2, 30)).logits, expected, atol=2e-5, rtol=1e-4)
        with other.force("sparse"):
            assert not torch.allclose(second(ids(2, 30)).logits, expected, atol=1e-3)
        other.detach()
        torch.testing.assert_close(second(ids(2, 30)).logits, expected)
    assert first.config._attn_implementation == "flux" and second.config._attn_implementation == "sdpa"


def test_a_models_generate_within_peft_knows_the_prompt():
    model = tiny_model("llama")
    wrapped = lora(model)
    routing = randomize(attach(wrapped, CONFIG))
    prompt = ids(1, 40)
    with pytest.raises(UnsupportedModelError, match="prefill_chunk_size is 7"):
        wrapped.generate(input_ids=prompt, max_new_tokens=2, do_sample=False, prefill_chunk_size=7)
    wrapped.generate(input_ids=prompt, routes="sparse", max_new_tokens=2, do_sample=False)
    assert routing.routes.msr == [1.0]
    routing.detach()
    assert type(model) is type(tiny_model("llama"))


def test_layers_copied_while_attached_run_elsewhere_and_afterwards():
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    with torch.no_grad():
        routing = attach(model, CONFIG)
        other.model.layers[1] = copy.deepcopy(model.model.layers[1])
        other(ids(1, 20))
        model.model.layers[1] = copy.deepcopy(model.model.layers[1])
        routing.detach()
        torch.testing.assert_close(model(ids(1, 20)).logits, tiny_model("llama")(ids(1, 20)).logits)


def test_another_model_of_the_attached_ones_class_is_its_own():
    model = tiny_model("llama")
    attach(model, CONFIG)
    other = type(model)(copy.deepcopy(model.config)).eval()
    with pytest.raises(ValueError, match="no routers attached"):
        other.generate(ids(1, 8), routes="sparse", max_new_tokens=2, do_sample=False)
    twin = copy.deepcopy(other)
    assert torch.equal(*(each.generate(ids(1, 8), max_new_tokens=3, do_sample=False) for each in (other, twin)))


def test_a_users_hook_on_the_query_comes_before_the_router():
    models = [tiny_model("llama") for _ in range(2)]

    def steer(module, args, output):
        return output + 3.0

    routings = []
    for model, first in zip(models, (True, False), strict=True):
        if first:
            model.model.layers[1].self_attn.q_proj.register_forward_hook(steer)
        routings.append(randomize(attach(model, CONFIG)))
        if not first:
            model.model.layers[1].self_attn.q_proj.register_forward_hook(steer)
    routings[1].routers.load_state_dict(routings[0].routers.state_dict())
    found = [decided(model, routing) for model, routing in zip(models, routings, strict=True)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_routers_are_made_in_float32_whatever_the_defaults():
    model = tiny_model("llama")
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            routing = attach(model, CONFIG)
    finally:
        torch.set_default_dtype(before)
    assert decided(model, routing)[1].dtype == torch.float32
