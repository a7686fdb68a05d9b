"""Routes by the prompt's two ends: what a stock model and the routers say of them, in whatever call a prompt comes."""

import warnings
from pathlib import Path

import pytest
import torch
from helpers.models import CONFIG, FAMILIES, IS_OLD, TRIANGLE, VOCAB, ids, packed, randomize, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from flux_attention import FluxConfig, UnsupportedModelError, attach
from flux_attention.errors import FluxConfigError
from flux_attention.hf.ends import take_ends
from flux_attention.hf.inputs import Prompt
from flux_attention.hf.layout import BatchLayout
from flux_attention.hf.support import find_decoder, full_attention_layers, query_module

E = 7
ENDS = FluxConfig(sink=4, window=9, pool_size=6, decide="ends", end_tokens=E)


def expected_logits(model, routers, prompt):
    """What routers say of a prompt's ends: the stock model runs over them, and its queries are pooled here."""
    ends = prompt if len(prompt) <= 2 * E else torch.cat([prompt[:E], prompt[-E:]])
    decoder, outputs = find_decoder(model), {}
    attentions = full_attention_layers(model, decoder)
    hooks = [
        query_module(attention).register_forward_hook(
            lambda module, args, output, layer=layer: outputs.__setitem__(layer, (output, args[0]))
        )
        for layer, attention in attentions.items()
    ]
    with torch.no_grad():
        model(ends[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    logits = []
    for layer, (output, _) in outputs.items():
        dim = attentions[layer].head_dim
        heads = decoder.config.num_attention_heads
        if output.ndim == 3:
            states = output[0, :, : heads * dim].view(len(ends), heads, dim)
        else:
            states = output[0] if output.shape[1] == len(ends) else output[0].transpose(0, 1)
        size = min(CONFIG.pool_size, len(ends))
        pooled = states[[*range(size), *range(len(ends) - size, len(ends))]].mean((0, 1))
        logits.append(routers[str(layer)](pooled[None])[0])
    return torch.stack(logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_routes_are_those_of_the_ends_alone(family, side):
    model = tiny_model(family)
    lengths = [40, 2 * E, 5, 2 * E + 1]
    prompts = [ids(1, length, seed)[0] for seed, length in enumerate(lengths)]
    stock = tiny_model(family)
    routing = randomize(attach(model, ENDS))
    batch, mask = torch.zeros(4, 40, dtype=torch.long), torch.zeros(4, 40, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(-len(prompt), None) if side == "left" else slice(0, len(prompt))
        batch[row, place], mask[row, place] = prompt, 1
    with torch.no_grad():
        model(batch, attention_mask=mask)
        routes = routing.routes
        for row, prompt in enumerate(prompts):
            expected = expected_logits(stock, routing.routers, prompt)
            torch.testing.assert_close(routes.logits_BL2[row], expected, atol=2e-4, rtol=2e-4)
            assert routes.routes_BL[row].tolist() == (expected[:, 1] > expected[:, 0]).tolist()
            model(prompt[None])
            assert torch.equal(routing.routes.routes_BL[0], routes.routes_BL[row])
    assert routes.lengths == tuple(lengths) and 0 < routes.routes_BL.float().mean() < 1


def test_the_prompt_then_runs_with_these_routes():
    model = tiny_model("qwen3")
    routing = randomize(attach(model, ENDS))
    with torch.no_grad():
        logits = model(ids(2, 40)).logits
        routes = routing.routes.routes_BL
        with routing.force(routes):
            assert torch.equal(model(ids(2, 40)).logits, logits)
    assert routes.any() and not routes.all()


@pytest.mark.parametrize("chunk", [1, 3, E, 2 * E, 39])
def test_chunks_change_neither_routes_nor_tokens(chunk):
    model = tiny_model("llama")
    routing = randomize(attach(model, ENDS))
    prompt = ids(2, 40)
    arguments = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0)
    whole = model.generate(prompt, **arguments)
    routes = routing.routes
    assert routes.routes_BL.any() and not routes.routes_BL.all()
    assert torch.equal(model.generate(prompt, prefill_chunk_size=chunk, **arguments), whole)
    assert torch.equal(routing.routes.routes_BL, routes.routes_BL) and routing.routes.lengths == routes.lengths
    assert torch.equal(routing.routes.logits_BL2, routes.logits_BL2)


def test_chunks_of_a_batch_that_is_padded_on_the_right():
    model = tiny_model("llama")
    routing = randomize(attach(model, ENDS))
    prompt, mask = ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, 30:] = 0
    with torch.no_grad():
        model(prompt, attention_mask=mask)
    expected = routing.routes
    model.generate(prompt, attention_mask=mask, max_new_tokens=2, prefill_chunk_size=16, pad_token_id=0)
    assert torch.equal(routing.routes.routes_BL, expected.routes_BL) and routing.routes.lengths == (40, 30)


def test_drafted_tokens_and_beams_are_no_prompt():
    model = tiny_model("llama")
    model.generation_config.eos_token_id = VOCAB - 1  # transformers 5.5 needs one here
    routing = randomize(attach(model, ENDS, keep_full_kv=True))
    prompt = torch.tensor([[5, 6, 7, 8] * 10])
    arguments = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = model.generate(prompt, **arguments)
    routes = routing.routes.routes_BL
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **arguments), expected)
    assert torch.equal(routing.routes.routes_BL, routes) and routing.routes.lengths == (40,)
    model.generate(prompt, num_beams=2, **arguments)
    assert torch.equal(routing.routes.routes_BL, routes.expand(2, -1))


def test_later_turns_keep_the_routes():
    model = tiny_model("llama")
    routing = randomize(attach(model, ENDS))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids(1, 40), past_key_values=cache)
        routes = routing.routes
        model(ids(1, 20, seed=5), past_key_values=cache)
    assert routing.routes is routes
    assert [layer.routes for layer in cache.layers] == routes.routes_BL.T.tolist()


def test_embeddings_are_read_as_tokens_are():
    model = tiny_model("llama")
    routing = randomize(attach(model, ENDS))
    with torch.no_grad():
        model(ids(2, 40))
        expected = routing.routes
        model(inputs_embeds=model.get_input_embeddings()(ids(2, 40)))
    torch.testing.assert_close(routing.routes.logits_BL2, expected.logits_BL2)


def test_short_prompts_run_full():
    model = tiny_model("llama")
    routing = randomize(attach(model, ENDS, min_tokens=30))
    batch, mask = ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, 29:] = 0
    with torch.no_grad():
        model(batch, attention_mask=mask)
    assert routing.routes.routes_BL[1].all() and not routing.routes.routes_BL[0].all()


def test_a_call_that_is_traced_is_not_taken_for_packed(monkeypatch):
    """While a graph is captured, transformers cannot tell, and takes every call without a mask for packed."""
    model = tiny_model("llama")
    routing = randomize(attach(model, ENDS))
    with torch.no_grad():
        model(ids(2, 40))
        expected = routing.routes.logits_BL2
        monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *arguments: True)
        found = routing._ends.read(Prompt(ids(2, 40), BatchLayout.all_real(2, 40), [40, 40]), by_graph=False)
    assert torch.equal(found, expected)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 20), st.booleans())
@settings(deadline=None)
def test_ends_are_the_first_and_last_tokens(first, second, end_tokens, left):
    width = max(first, second)
    real = torch.zeros(2, width, dtype=torch.bool)
    for row, length in enumerate((first, second)):
        real[row, width - length if left else 0 : width if left else length] = True
    tokens = torch.arange(2 * width).view(2, -1)
    taken, lengths = take_ends(Prompt(tokens, BatchLayout.from_mask(real), [first, second]), end_tokens)
    for row, length in enumerate((first, second)):
        text = tokens[row][real[row]].tolist()
        expected = text if length <= 2 * end_tokens else text[:end_tokens] + text[-end_tokens:]
        assert taken[row, : lengths[row]].tolist() == expected


@pytest.mark.parametrize("is_packed", [False, True])
def test_gradients_reach_routers_as_by_the_formula(is_packed):
    model = tiny_model("qwen3").requires_grad_(False)
    routing = randomize(attach(model, ENDS))
    rows = [ids(1, length, seed)[0] for seed, length in enumerate((40, 25))]
    prompts = [30, 20]
    noise = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(3))
    if is_packed:
        call = {**packed(rows), "use_cache": False, "prompt_lengths": prompts}
    else:
        batch, mask = torch.zeros(2, 40, dtype=torch.long), torch.zeros(2, 40, dtype=torch.long)
        for row, text in enumerate(rows):
            batch[row, : len(text)], mask[row, : len(text)] = text, 1
        call = dict(input_ids=batch, attention_mask=mask, use_cache=False, prompt_lengths=prompts)
    with routing.soft(1.3, noise):
        model(**call)
    gates = routing.gates
    weights = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    (gates * weights).sum().backward()
    found = [parameter.grad.clone() for parameter in routing.routers.parameters()]
    routing.routers.zero_grad()
    stock = tiny_model("qwen3")
    logits = torch.stack(
        [expected_logits(stock, routing.routers, row[:length]) for row, length in zip(rows, prompts, strict=True)]
    )
    soft = ((logits + noise) / 1.3).softmax(-1)[..., 1]
    assert torch.equal(gates.detach(), (soft > 0.5).float())
    (soft * weights).sum().backward()
    for gradient, parameter in zip(found, routing.routers.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=2e-4, rtol=2e-3)


def test_the_adapter_remembers_when_its_routers_read(tmp_path):
    model = tiny_model("llama")
    routing = randomize(attach(model, FluxConfig(sink=4, window=9, pool_size=6, end_tokens=E), decide="ends"))
    assert routing.config == FluxConfig(**{**vars(ENDS), "base_model": routing.config.base_model})
    with torch.no_grad():
        model(ids(1, 40))
    routes = routing.routes
    routing.save_pretrained(tmp_path)
    routing.detach()
    again = attach(model, tmp_path)
    with torch.no_grad():
        model(ids(1, 40))
    assert again.config.decide == "ends" and torch.equal(again.routes.logits_BL2, routes.logits_BL2)


def test_what_cannot_be_is_refused():
    model = tiny_model("llama")
    with pytest.raises(FluxConfigError, match="end_tokens is 5, but routers read 6 tokens at each end"):
        FluxConfig(pool_size=6, end_tokens=5, decide="ends")
    with pytest.raises(FluxConfigError, match="decide is 'middle', expected one of"):
        attach(model, CONFIG, decide="middle")
    routing = attach(model, TRIANGLE, decide=None)
    routing.detach()
    config = FluxConfig(pattern="triangle", sink=4, window=9, last_n=5, pool_size=6, decide="ends", end_tokens=E)
    attach(model, config)
    with pytest.raises(UnsupportedModelError, match="have to come in one call"):
        model.generate(ids(1, 40), max_new_tokens=2, prefill_chunk_size=16)


def test_what_decides_anew_comes_in_one_call():
    """Routers would read the ends of its first chunk."""
    model = tiny_model("llama")
    routing = randomize(attach(model, ENDS, keep_full_kv=True))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids(1, 30), past_key_values=cache)
    routing.reroute(cache)
    call = dict(attention_mask=torch.ones(1, 90, dtype=torch.long), past_key_values=cache, max_new_tokens=2)
    with pytest.raises(UnsupportedModelError, match=r"60 tokens have to come in one call: .* what re-routes"):
        model.generate(ids(1, 90), prefill_chunk_size=16, **call)
    if IS_OLD:
        pytest.skip("transformers 5.5 forgets the cache's tokens in chunked prefill, without routers too")
    model.generate(ids(1, 90), prefill_chunk_size=60, **call)
    assert routing.routes.lengths == (90,)


def test_a_pass_that_cannot_be_captured_runs_without_a_graph(monkeypatch, caplog):
    model = tiny_model("llama")
    routing = randomize(attach(model, ENDS))
    with torch.no_grad():
        model(ids(2, 40))
        expected, tries = routing.routes.logits_BL2, []
        monkeypatch.setattr("flux_attention.hf.handle.unsupported", lambda routing: None)

        def fail(*arguments):
            tries.append(arguments)
            raise torch.OutOfMemoryError("no memory left")

        monkeypatch.setattr("flux_attention.hf.ends._EndsGraph", fail)
        for _ in range(2):
            model(ids(2, 40))
            assert torch.equal(routing.routes.logits_BL2, expected)
    assert len(tries) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_gates_gradients(reentrant):
    grads = []
    for checkpoints in (False, True):
        model = tiny_model("qwen3").requires_grad_(False)
        routing = randomize(attach(model, ENDS))
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.train()
            model.get_input_embeddings().requires_grad_(reentrant)
        with routing.soft(1.3, torch.zeros(2, 3, 2)):
            if checkpoints and reentrant:
                with pytest.raises(ValueError, match="reentrant gradient checkpointing runs layers without one"):
                    model(ids(2, 40), use_cache=False)
                return
            logits = model(ids(2, 40), use_cache=False).logits
        logits.square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in routing.routers.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(again, plain)


def test_ends_are_at_least_as_long_as_what_routers_read():
    model = tiny_model("llama")
    routing = attach(model, FluxConfig(pool_size=150), decide="ends")
    assert routing.config.end_tokens == 150


def test_images_are_refused(monkeypatch):
    model = tiny_model("qwen2_vl")
    attach(model, ENDS)
    types = torch.zeros(1, 40, dtype=torch.long)
    types[0, 3] = 1
    with pytest.raises(UnsupportedModelError, match="not for prompts with images"):
        model(ids(1, 40), mm_token_type_ids=types)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_the_pass_as_a_graph_says_what_it_says_without(compile):
    model = tiny_model("qwen3").to(torch.bfloat16)
    routing = randomize(attach(model, ENDS, compile=compile))
    model.cuda()
    prompts = [ids(2, 40, seed).cuda() for seed in range(3)]
    found = {}
    with torch.no_grad():
        for graphs in (False, True):
            routing.cuda_graphs = graphs
            logits = []
            for prompt in prompts:
                model(prompt)
                logits.append(routing.routes.logits_BL2)
            found[graphs] = torch.stack(logits)
        ((_, graph),) = routing._ends._graphs.values()
        assert graph is not None
        torch.testing.assert_close(found[True], found[False], atol=0.05, rtol=0.02)
        assert not torch.equal(found[True][0], found[True][1])
        routing.routers["0"].head[-1].bias.add_(3.0)  # in place: the graph reads what is there now
        model(prompts[0])
        assert (routing.routes.logits_BL2[:, 0] - found[True][0][:, 0]).sub(3.0).abs().max() < 1e-3
        model(prompts[0][:, :5])  # not long enough for two ends: no graph
        assert len(routing._ends._graphs) == 1


@pytest.mark.gpu
def test_a_prefill_by_ends_waits_for_the_device_before_its_first_layer_only():
    model = tiny_model("qwen3").to(torch.bfloat16)
    routing = randomize(attach(model, ENDS))
    model.cuda()
    prompt = ids(1, 300).cuda()

    def waits(routes):
        with torch.no_grad(), routing.force(routes), warnings.catch_warnings(record=True) as caught:
            model(prompt)  # captures
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            model(prompt)
            torch.cuda.set_sync_debug_mode("default")
        return [
            f"{Path(warning.filename).name}:{warning.lineno}"
            for warning in caught
            if "called a synchroniz" in str(warning.message)
        ]

    forced, routed = waits([1]), waits(None)
    # Once to see whether the prompt is padded, once for what the routers say of its ends.
    assert len(routed) <= len(forced) + 2, (forced, routed)
