"""Routing by KV head: exact per head, a dense KV cache, the same training and adapters."""

import pytest
import torch
from helpers.models import VOCAB, ids, packed, randomize, tiny_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flux_attention import FluxConfig, UnsupportedModelError, attach, decision
from flux_attention.evaluation.selection import liked_routes
from flux_attention.hf.cache.size import kv_bytes
from flux_attention.hf.generation.step import unsupported
from flux_attention.patterns import Full

CONFIG = FluxConfig(sink=4, window=9, last_n=5, pool_size=6, granularity="head")
FAMILIES = ["llama", "qwen3", "phi3", "olmo2", "glm4"]


def plain_attention(gates, layers, pattern):
    """O = z · FA + (1 − z) · SA with a gate a KV head, written out with dense masks: ``gates`` is (B, U)."""

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        length, heads, kv_heads = query.shape[2], query.shape[1], key.shape[1]
        place = layers.index(module.layer_idx) * kv_heads
        z = gates[:, place : place + kv_heads].repeat_interleave(heads // kv_heads, 1)[:, :, None, None]
        key, value = (states.repeat_interleave(heads // kv_heads, 1) for states in (key, value))
        scores = query @ key.transpose(-1, -2) * scaling
        masks = Full().mask(length), pattern.mask(length)
        full, sparse = (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value for mask in masks)
        return (z * full + (1 - z) * sparse).transpose(1, 2), None

    return attention


def plain_logits(model, routing, gates, **inputs):
    routing.detach()
    ALL_ATTENTION_FUNCTIONS.register("plain-heads", plain_attention(gates, routing.layers, routing.sparse))
    model.get_decoder().config._attn_implementation = "plain-heads"
    return model(use_cache=False, **inputs).logits


def test_fresh_routers_change_nothing():
    model = tiny_model("qwen3")
    with torch.no_grad():
        expected = model(ids(2, 40)).logits
        routing = attach(model, CONFIG)
        torch.testing.assert_close(model(ids(2, 40)).logits, expected, atol=1e-6, rtol=1e-5)
    assert routing.routes.routes_BL.shape == (2, 3 * 2) and routing.routes.routes_BL.all()
    assert routing.units[:3] == ((0, 0), (0, 1), (1, 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_head_attends_by_its_own_route(family):
    model = tiny_model(family)
    routing = randomize(attach(model, CONFIG))
    with torch.no_grad():
        logits = model(ids(3, 40)).logits
        routes = routing.routes.routes_BL
        assert 0 < routes.float().mean() < 1 and len(set(map(tuple, routes.tolist()))) > 1
        expected = plain_logits(model, routing, routes.float(), input_ids=ids(3, 40))
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


def test_forced_heads_and_sparsity():
    model = tiny_model("qwen3")
    routing = attach(model, CONFIG)
    spec = torch.tensor([1, 0, 0, 0, 1, 1])
    with torch.no_grad(), routing.force(spec):
        logits = model(ids(2, 40)).logits
    assert routing.routes.msr == [0.5, 0.5]
    expected = plain_logits(model, routing, spec.float().expand(2, 6), input_ids=ids(2, 40)).detach()
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


def test_gradients_are_those_of_the_plain_formula(monkeypatch):
    model, prompt = tiny_model("qwen3").double(), ids(2, 40)
    gates = [torch.tensor(z, dtype=torch.float64, requires_grad=True) for z in ([1.0, 0], [0.0, 0], [0.0, 1]) * 2]
    remaining = list(gates)
    embeds = model.get_input_embeddings()(prompt).detach().requires_grad_()
    weight = torch.randn(2, 40, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    routing = attach(model, CONFIG)
    monkeypatch.setattr(decision, "soft_route", lambda logits, temperature, noise: remaining.pop(0))
    with routing.soft(1.0):
        logits = model(inputs_embeds=embeds).logits
    actual = torch.autograd.grad((logits * weight).sum(), [embeds, *gates])
    plain = plain_logits(model, routing, torch.stack(gates, dim=1), inputs_embeds=embeds)
    expected = torch.autograd.grad((plain * weight).sum(), [embeds, *gates])
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)
    assert all(gradient.abs().max() > 0 for gradient in actual)


def test_packed_sequences_are_as_if_alone():
    model = tiny_model("qwen3")
    routing = randomize(attach(model, CONFIG))
    rows = [ids(1, length, length)[0] for length in (30, 12, 44)]
    with torch.no_grad():
        together = model(**packed(rows)).logits[0].split([len(row) for row in rows])
        routes = routing.routes.routes_BL
        for index, row in enumerate(rows):
            torch.testing.assert_close(together[index], model(row[None]).logits[0], atol=2e-5, rtol=1e-4)
            assert torch.equal(routing.routes.routes_BL[0], routes[index])


def test_adapters_keep_what_they_are(tmp_path):
    model = tiny_model("qwen3")
    routing = randomize(attach(model, CONFIG))
    with torch.no_grad():
        model(ids(2, 40))
        routes = routing.routes.routes_BL
        routing.save_pretrained(tmp_path)
        routing.detach()
        loaded = attach(model, tmp_path)
        model(ids(2, 40))
    assert loaded.config.granularity == "head" and torch.equal(loaded.routes.routes_BL, routes)


LENGTHS = (40, 17, 5, 31)


def left_padded(rows):
    """What ``generate`` takes for prompts of unlike lengths."""
    width = max(map(len, rows))
    padded = [torch.cat([row.new_zeros(width - len(row)), row]) for row in rows]
    mask = [torch.arange(width) >= width - len(row) for row in rows]
    return dict(input_ids=torch.stack(padded), attention_mask=torch.stack(mask).long())


def greedy(model, **inputs):
    """Greedy answers of 12 tokens, the logits of each, and the KV cache."""
    options = dict(max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True)
    output = model.generate(**inputs, **options)
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    return new, torch.stack(output.logits, dim=1), output.past_key_values


def recomputed(model, routing, rows, routes):
    """The same, each sequence alone and all of it anew for every token, without a KV cache."""
    answers, logits = [], []
    for row, route in zip(rows, routes, strict=True):
        sequence, found = row, []
        with routing.force(route):
            for _ in range(12):
                inputs = dict(input_ids=sequence[None], prompt_lengths=torch.tensor([len(row)]))
                found.append(model(**inputs, use_cache=False).logits[0, -1])
                sequence = torch.cat([sequence, found[-1].argmax()[None]])
        answers.append(sequence[len(row) :])
        logits.append(torch.stack(found))
    return torch.stack(answers), torch.stack(logits).float()  # as generate gives them


@pytest.mark.parametrize("pattern", ["streaming", "triangle"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_generation_is_as_if_recomputed_at_each_token(pattern, dtype, tolerance):
    model = tiny_model("qwen3").to(dtype)
    routing = attach(model, FluxConfig(pattern=pattern, sink=4, window=9, last_n=5, pool_size=6, granularity="head"))
    rows = [ids(1, length, length)[0] for length in LENGTHS]
    routes = torch.tensor([[1, 0, 0, 0, 1, 1], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 1]])
    with torch.no_grad():
        with routing.force(routes):
            answers, logits, cache = greedy(model, **left_padded(rows))
        assert torch.equal(routing.report().routes.routes_BL, routes.bool())
        expected, expected_logits = recomputed(model, routing, rows, routes)
    assert torch.equal(answers, expected)
    torch.testing.assert_close(logits, expected_logits, atol=tolerance, rtol=tolerance)
    assert not torch.equal(answers, greedy(model, **left_padded(rows))[0])  # routes matter here
    tokens = sum(LENGTHS) + 4 * 11
    assert kv_bytes(cache) == 2 * 3 * tokens * 2 * 16 * dtype.itemsize  # of 3 layers' 2 heads all


def test_routers_decide_once_a_prompt_and_the_report_claims_no_memory():
    model = tiny_model("qwen3").double()
    routing = randomize(attach(model, CONFIG))
    rows = [ids(1, length, length)[0] for length in LENGTHS]
    with torch.no_grad():
        answers, logits, _ = greedy(model, **left_padded(rows))
        routes = routing.routes.routes_BL
        assert 0 < routes.float().mean() < 1 and len(set(map(tuple, routes.tolist()))) > 1
        report = routing.report()
        expected, expected_logits = recomputed(model, routing, rows, routes)
    assert torch.equal(answers, expected)
    torch.testing.assert_close(logits, expected_logits, atol=1e-6, rtol=1e-6)
    assert torch.equal(report.routes.routes_BL, routes) and report.kv_bytes == report.baseline_kv_bytes
    assert "of 6 KV heads sparse" in str(report) and "KV 100 % of dense" in str(report)
    assert "/6 KV heads full" in str(report.routes)


def test_full_heads_generate_what_the_stock_model_does():
    model = tiny_model("llama").double()
    inputs = left_padded([ids(1, length, length)[0] for length in LENGTHS])
    beams = dict(max_new_tokens=12, num_beams=3, do_sample=False)
    with torch.no_grad():
        expected, expected_beams = greedy(model, **inputs), model.generate(**inputs, **beams)
        attach(model, CONFIG)
        actual, actual_beams = greedy(model, **inputs), model.generate(**inputs, **beams)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual_beams, expected_beams)
    torch.testing.assert_close(actual[1], expected[1], atol=1e-6, rtol=1e-6)


def test_chunks_turns_and_beams_keep_each_heads_route():
    model = tiny_model("qwen3").double()
    routing = attach(model, CONFIG)
    inputs, routes = dict(input_ids=ids(1, 40)), torch.tensor([1, 0, 0, 0, 1, 1])
    with torch.no_grad(), routing.force(routes):
        answers, logits, _ = greedy(model, **inputs)
        for chunk in (7, 16):
            torch.testing.assert_close(greedy(model, **inputs, prefill_chunk_size=chunk)[1], logits)
        cache = model(inputs["input_ids"][:, :20], use_cache=True).past_key_values
        again = greedy(model, **inputs, past_key_values=cache)
        torch.testing.assert_close(again[1], logits)
        assert routing.report().routes.routes_BL.tolist() == [routes.bool().tolist()]
    rows = [ids(1, length, length)[0] for length in LENGTHS]
    routing = randomize(routing)
    with torch.no_grad():
        beams = dict(max_new_tokens=8, num_beams=3, do_sample=False)
        together = model.generate(**left_padded(rows), **beams)[:, max(LENGTHS) :]
        for row, answer in zip(rows, together, strict=True):
            assert torch.equal(model.generate(row[None], **beams)[0, len(row) :], answer)


def test_routers_by_head_refuse_chunks_by_name_and_gradients_through_the_cache():
    model = tiny_model("qwen3")
    routing = randomize(attach(model, CONFIG))
    with pytest.raises(UnsupportedModelError, match="prefill_chunk_size is 7"):
        model.generate(ids(1, 20), max_new_tokens=2, prefill_chunk_size=7)
    cache = model(ids(1, 20), use_cache=True).past_key_values
    with pytest.raises(UnsupportedModelError, match="gradients do not flow"):
        model(ids(1, 2), past_key_values=cache).logits.sum().backward()
    assert unsupported(routing) == "its heads are routed one by one"


def test_liked_heads_are_those_of_the_highest_probability():
    model = tiny_model("qwen3")
    routing = randomize(attach(model, CONFIG))

    class One:
        input_ids = ids(1, 40)[0].numpy()
        answers = [(30, 40)]  # noqa: RUF012
        prompt_ids = input_ids[:30]

    liked = liked_routes(routing, [One], 2)
    with torch.no_grad():
        model(ids(1, 40), prompt_lengths=[30])
    probability = routing.routes.logits_BL2[0].softmax(-1)[:, 1]
    assert liked.sum() == 2 and probability[liked].min() >= probability[~liked].max()
