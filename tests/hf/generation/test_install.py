"""Stock transformers entry points, with routes mixed over layers and sequences."""

import threading

import pytest
import torch
from helpers.models import CONFIG, FAMILIES, IS_OLD, PATTERNS, TRIANGLE, VOCAB, ids, randomize, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LogitsProcessorList, PreTrainedTokenizerFast, TextStreamer, pipeline

from flux_attention import UnsupportedModelError, attach, kv_bytes
from flux_attention.shipped import load_shipped


def greedy(model, prompt, tokens, **kwargs):
    """Greedy decoding by hand: one forward a token through the cache."""
    cache, out = None, prompt
    step = prompt
    for _ in range(tokens):
        with torch.no_grad():
            result = model(step, past_key_values=cache, use_cache=True)
        cache, step = result.past_key_values, result.logits[:, -1].argmax(-1, keepdim=True)
        out = torch.cat([out, step], 1)
    return out


@pytest.fixture
def routed(family):
    model = tiny_model(family)
    return model, randomize(attach(model, CONFIG))


@pytest.fixture
def qwen():
    model = tiny_model("qwen3")
    return model, randomize(attach(model, CONFIG))


def word_tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>", padding_side="left"
    )


def test_greedy(routed):
    model, routing = routed
    prompt = ids(3, 30)
    expected = greedy(model, prompt, 12)
    assert torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False), expected)


def test_left_padded_batch_equals_each_alone(routed):
    model, routing = routed
    prompts = [ids(1, n, n) for n in (30, 18, 5)]
    batch = torch.cat([torch.nn.functional.pad(p, (30 - p.shape[1], 0)) for p in prompts])
    mask = (torch.arange(30) >= torch.tensor([[0], [12], [25]])).long()
    together = model.generate(batch, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, max_new_tokens=8, do_sample=False)
        assert torch.equal(together[row, 30:], alone[0, prompt.shape[1] :])


def test_a_model_whose_decoder_is_deeper_down(monkeypatch):
    """Llama 4's ``get_decoder`` gives a causal LM, whose ``model`` is the decoder."""
    sizes = dict(num_local_experts=2, intermediate_size_mlp=48, interleave_moe_layer_step=1, head_dim=16)
    layout = dict(layer_types=["full_attention"] * 3, no_rope_layers=[0, 0, 0])
    monkeypatch.setitem(FAMILIES, "llama4_text", ("llama4_text", {**sizes, **layout}))
    model = tiny_model("llama4_text", hidden_size=64)
    stock = model.generate(ids(2, 30), max_new_tokens=5, do_sample=False)
    attach(model, CONFIG)
    assert torch.equal(model.generate(ids(2, 30), max_new_tokens=5, do_sample=False), stock)


@pytest.mark.parametrize("keep_full", [False, True])
def test_beam_search_and_several_returns(keep_full):
    """Against the stock model where all is full, and without a cache (no reordering) where layers are sparse."""
    model = tiny_model("qwen3")
    beams = dict(max_new_tokens=10, num_beams=4, num_return_sequences=3, do_sample=False)
    stock = model.generate(ids(2, 30), **beams)
    routing = attach(model, CONFIG, keep_full_kv=keep_full)
    routed = model.generate(ids(2, 30), **beams)
    assert stock.shape == (6, 40)
    assert torch.equal(routed, stock)
    with routing.force(torch.tensor([[0, 0, 1], [1, 0, 0]])):
        routed = model.generate(ids(2, 30), **beams)
        assert torch.equal(routed, model.generate(ids(2, 30), use_cache=False, **beams))
    assert not torch.equal(routed, stock)


def test_sampling_with_several_returns_is_seeded(qwen):
    model, _ = qwen
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(model.generate(ids(2, 30), max_new_tokens=8, do_sample=True, num_return_sequences=2, top_k=20))
    assert torch.equal(*draws) and draws[0].shape == (4, 38)


def test_streamer_and_stop_strings(capsys):
    """With the shipped model's byte-level tokenizer."""
    model, tokenizer, routing = load_shipped()
    prompt = tokenizer("import os\nimport sys\n\n\ndef main(", return_tensors="pt").input_ids
    with routing.force(0.8):
        streamer = TextStreamer(tokenizer, skip_prompt=True)
        tokens = model.generate(prompt, max_new_tokens=20, do_sample=False, streamer=streamer)
        text = tokenizer.decode(tokens[0, prompt.shape[1] :])
        assert capsys.readouterr().out.strip("\n") == text.strip("\n")
        stop = text[6:9]
        stopped = model.generate(prompt, max_new_tokens=20, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    short = tokenizer.decode(stopped[0, prompt.shape[1] :])
    assert stop in short
    assert len(short) < len(text)
    assert text.startswith(short)


def test_pipeline(qwen):
    model, _ = qwen
    pipe = pipeline("text-generation", model=model, tokenizer=word_tokenizer())
    prompts = ["w5 w9 w20 w31 w7", "w8 w3"]
    outputs = pipe(prompts, max_new_tokens=6, do_sample=False, batch_size=2)
    for prompt, output in zip(prompts, outputs, strict=True):
        alone = pipe(prompt, max_new_tokens=6, do_sample=False)
        assert output[0]["generated_text"] == alone[0]["generated_text"]


def test_prompts_that_routers_read_do_not_come_in_chunks(qwen):
    model, routing = qwen
    prompt = ids(1, 60)
    chunked = dict(max_new_tokens=8, do_sample=False, prefill_chunk_size=16)
    with pytest.raises(UnsupportedModelError, match="60 tokens have to come in one call"):
        model.generate(prompt, **chunked)
    whole = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(prompt, **{**chunked, "prefill_chunk_size": 60}), whole)
    with routing.force([1]):
        expected = model.generate(prompt, max_new_tokens=8, do_sample=False)
        assert torch.equal(model.generate(prompt, **chunked), expected)
    routing.min_tokens = 61  # no router would read it
    assert model.generate(prompt, **chunked).shape == (1, 68) and routing.routes.msr == [0.0]


@pytest.mark.parametrize("config", [TRIANGLE, PATTERNS["streaming, blocks"]], ids=["triangle", "blocks"])
def test_prompts_that_see_otherwise_than_what_follows_do_not_come_in_chunks(config):
    model = tiny_model("qwen3")
    routing = attach(model, config)
    chunked = dict(max_new_tokens=4, do_sample=False, prefill_chunk_size=16)
    for spec in ("sparse", 0.5):
        with routing.force(spec), pytest.raises(UnsupportedModelError, match="prefill_chunk_size is 16"):
            model.generate(ids(1, 40), **chunked)
    full = model.generate(ids(1, 40), routes="full", max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ids(1, 40), routes="full", **chunked), full)


def test_routes_of_one_call(qwen):
    """As a server streams: generate runs in a thread of its own, into which no ``with`` block reaches."""
    model, routing = qwen
    prompt, greedy = ids(1, 40), dict(max_new_tokens=6, do_sample=False)
    found = {}
    for spec in ("full", "sparse", [1]):
        with routing.force(spec):
            expected = model.generate(prompt, **greedy)
        thread = threading.Thread(
            target=lambda spec=spec: found.update({str(spec): model.generate(prompt, routes=spec, **greedy)})
        )
        with routing.force("full"):
            thread.start()
            thread.join()
        assert torch.equal(found[str(spec)], expected)
    assert routing.settings.forced is None
    with pytest.raises(ValueError, match="cannot force"):
        model.generate(prompt, routes="dense", **greedy)
    pipe = pipeline("text-generation", model=model, tokenizer=word_tokenizer())
    pipe("w5 w9 w20 w31 w7", routes="sparse", max_new_tokens=2, do_sample=False)
    assert routing.routes.msr == routing.report().routes.msr == [1.0]
    assert routing.report().routes.lengths == routing.routes.lengths and routing.report().new_tokens == 2


@pytest.mark.parametrize("config", PATTERNS.values(), ids=PATTERNS)
def test_drafted_tokens_are_no_prompt(config):
    """Prompt lookup leaves routes, least lengths and greedy texts as they are."""
    model = tiny_model("qwen3")
    model.generation_config.eos_token_id = VOCAB - 1  # transformers 5.5 needs one here
    routing = randomize(attach(model, config, keep_full_kv=True))
    drafted = 0
    for seed in range(6):
        prompt = ids(1, 10, seed).repeat(1, 4)
        found = []
        for more in ({}, {"prompt_lookup_num_tokens": 3}):
            routing.min_tokens = 42 if seed == 0 else 0
            widths = []

            def note(module, args, kwargs, widths=widths):
                widths.append(kwargs["input_ids"].shape[1])

            hook = model.model.register_forward_pre_hook(note, with_kwargs=True)
            tokens = model.generate(prompt, max_new_tokens=12, do_sample=False, **more)
            hook.remove()
            drafted += widths[0] > 40
            if IS_OLD:  # with drafts transformers 5.5 may generate one token more than asked for, without routers too
                tokens = tokens[:, : 40 + 12]
            found.append((tokens.tolist(), routing.routes.lengths, routing.routes.routes_BL.tolist()))
        assert found[0] == found[1] and found[0][1] == (40,)
    assert drafted  # so that the first call held more than the prompt


def test_early_exit_is_refused_before_it_changes_the_model():
    model = tiny_model("qwen3")
    model.generation_config.eos_token_id = VOCAB - 1
    attach(model, CONFIG, keep_full_kv=True)
    greedy = dict(max_new_tokens=4, do_sample=False)
    expected = model.generate(ids(1, 20), **greedy)
    with pytest.raises(UnsupportedModelError, match="assistant_early_exit=2"):
        model.generate(ids(1, 20), assistant_early_exit=2, **greedy)
    assert torch.equal(model.generate(ids(1, 20), **greedy), expected)


@pytest.mark.parametrize("keep_full", [False, True])
def test_a_second_turn_of_answers_of_unlike_lengths(keep_full):
    """Behind its end a sequence is filled with pad tokens, which the next turn's mask hides: as in the stock model."""
    model = tiny_model("qwen3")
    prompts, question = ids(2, 20), ids(2, 5, 7)
    answers = model.generate(prompts, max_new_tokens=10, do_sample=False)[:, 20:].tolist()
    model.generation_config.eos_token_id = next(token for token in answers[0][1:5] if token not in answers[1])

    def turns(routes=None):
        first = model.generate(
            prompts, max_new_tokens=10, do_sample=False, return_dict_in_generate=True, **(routes or {})
        )
        longer = torch.cat([first.sequences, question], 1)
        assert (first.sequences[0] == 0).sum() > 4 and not (first.sequences[1] == 0).any()
        second = dict(past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False)
        by_mask = model.generate(longer, attention_mask=(longer != 0).long(), return_dict_in_generate=True, **second)
        third = torch.cat([by_mask.sequences, ids(2, 3, 9)], 1)
        return by_mask.sequences, model.generate(
            third, past_key_values=by_mask.past_key_values, max_new_tokens=3, do_sample=False
        )

    expected = turns()
    attach(model, CONFIG, keep_full_kv=keep_full)
    for stock, ours in zip(expected, turns(), strict=True):
        assert torch.equal(stock, ours)
    if not keep_full:
        first = model.generate(
            prompts, routes="sparse", max_new_tokens=10, do_sample=False, return_dict_in_generate=True
        )
        longer, mask = torch.cat([first.sequences, question], 1), torch.ones(2, 35, dtype=torch.long)
        mask[0, 25:30] = 0
        second = dict(attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False)
        with pytest.raises(ValueError, match=r"cannot mask 4 tokens: .* have dropped what would be needed"):
            model.generate(longer, **second)


def test_multi_turn_keeps_the_first_turns_routes(qwen):
    model, routing = qwen
    first = model.generate(ids(1, 30), max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    decided = routing.routes
    longer = torch.cat([first.sequences, ids(1, 10, 8)], 1)
    second = model.generate(longer, past_key_values=first.past_key_values, max_new_tokens=5, do_sample=False)
    assert routing.routes is decided
    with routing.force(decided.routes_BL):
        assert torch.equal(second, model.generate(longer, max_new_tokens=5, do_sample=False))


def test_assisted_decoding_is_refused_or_right():
    prompt = torch.cat([ids(1, 10)] * 4, 1)  # repeats itself, so that looked-up candidates come up
    model = tiny_model("qwen3")
    model.generation_config.eos_token_id = VOCAB - 1  # transformers 5.5 needs one here
    routing = attach(model, CONFIG)
    with routing.force([1]):
        expected = model.generate(prompt, max_new_tokens=12, do_sample=False)
        with pytest.raises(ValueError, match="keep_full_kv=True"):
            model.generate(prompt, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    routing.detach()
    routing = attach(model, CONFIG, keep_full_kv=True)
    with routing.force([1]):
        assert torch.equal(
            model.generate(prompt, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3), expected
        )


def test_device_map():
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("qwen3")
    prompt = ids(1, 20)
    routing = attach(model, CONFIG)
    with routing.force(0.5):
        expected = model.generate(prompt, max_new_tokens=5, do_sample=False)
    routing.detach()
    model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    routing = attach(model, CONFIG)
    with routing.force(0.5):
        assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), expected)


def test_sparse_generation_holds_less(qwen):
    model, routing = qwen
    held = {}
    for spec in ("full", "sparse"):
        with routing.force(spec):
            out = model.generate(ids(1, 200), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        held[spec] = kv_bytes(out.past_key_values)
    assert held["sparse"] * 10 < held["full"]


def test_a_vision_language_model_sees_its_image():
    """Image tokens go through the routed text decoder; the vision tower keeps its own attention."""
    model = tiny_model("qwen2_vl")
    token = model.config.image_token_id = 5
    start, end = model.config.vision_start_token_id, model.config.vision_end_token_id = 6, 7
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    inputs = dict(
        input_ids=torch.tensor([[9, 10, start, *[token] * 4, end, *range(11, 40)]]),
        pixel_values=pixels,
        image_grid_thw=torch.tensor([[1, 4, 4]]),
    )
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == token).long()
    with torch.no_grad():
        expected = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        routing = attach(model, CONFIG)
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=1e-3)
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), tokens)
        assert model.model.visual.config._attn_implementation != "flux"
        with routing.force("sparse"):
            assert not torch.allclose(model(**inputs).logits, expected, atol=1e-3)


def test_another_prompt_within_a_generation_is_read_whole():
    """A negative prompt for guidance, and another model's prompt, called from a logits processor."""
    model, other = tiny_model("qwen3"), tiny_model("qwen3", seed=1)
    routing, second = randomize(attach(model, CONFIG)), randomize(attach(other, CONFIG))
    negative, seen = ids(1, 60, 3), []

    def ask(input_ids, scores):
        with torch.no_grad():
            other(ids(1, 50, 4))
        seen.append(second.routes.lengths)
        return scores

    published = []
    model.generate(ids(1, 20), max_new_tokens=2, do_sample=False, logits_processor=LogitsProcessorList([ask]))
    assert set(seen) == {(50,)}
    routing.detach()
    routing = randomize(attach(model, CONFIG))
    with torch.no_grad():
        model(negative)
    alone = routing.routes
    handle = routing._pass_type.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing._pass_type, "finish", lambda self: published.append(handle(self)) or published[-1])
        model.generate(ids(1, 20), negative_prompt_ids=negative, guidance_scale=1.5, max_new_tokens=2, do_sample=False)
    decided = [finished.routes for finished in published if finished is not None]
    assert [routes.lengths for routes in decided] == [(20,), (60,)]
    torch.testing.assert_close(decided[1].logits_BL2, alone.logits_BL2)


def test_routes_for_a_model_without_routers_are_refused():
    model = tiny_model("qwen3")
    routing = attach(model, CONFIG)
    model.__class__ = type("Other", (type(model),), {})  # as FSDP2 does
    routing.detach()
    with pytest.raises(ValueError, match="no routers attached"):
        model.generate(ids(1, 8), routes="sparse", max_new_tokens=2, do_sample=False)
    assert model.generate(ids(1, 8), max_new_tokens=2, do_sample=False).shape == (1, 10)
