"""A model type is either routed exactly or refused in words, never computed wrongly."""

import contextlib

import pytest
import torch
import transformers
from helpers.models import CONFIG, SMALL, ids, randomize, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from flux_attention import UnsupportedModelError, attach


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


#: Sizes by whatever names a configuration has for them.
SIZES = dict(
    head_dim=8, num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_routed_experts=4,
    d_model=32, n_head=4, n_layer=3, num_layers=3, ffn_dim=48, word_embed_proj_dim=32, decoder_layers=3,
    decoder_attention_heads=4, decoder_ffn_dim=32, num_kv_shared_layers=0, hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=96, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
    linear_value_head_dim=8, shared_expert_intermediate_size=16,
)  # fmt: skip


HYBRID = dict(num_hidden_layers=4, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)


CHANGES = {
    "cohere2": HYBRID,
    "exaone4": HYBRID,
    "olmo3": HYBRID,
    "qwen3_next": dict(num_hidden_layers=4),
    "mimo_v2_flash": dict(HYBRID, v_head_dim=8, mlp_layer_types=["dense"] * 4),
}


EXACT = [
    "apertus", "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "glm", "granite", "granitemoe", "helium",
    "mixtral", "olmo", "olmo3", "olmoe", "opt", "phi", "phimoe", "qwen2_moe", "qwen3_next", "smollm3", "starcoder2",
]  # fmt: skip


REFUSED = {
    "bart": "attends to an encoder",
    "bert": "no decoder with `layers`",
    "bloom": "no decoder with `layers`",
    "deepseek_v3": "multi-head latent attention",
    "diffllama": "twice|queries|did not call",
    "doge": "a mask of its own",
    "gemma2": "caps attention logits",
    "gpt2": "no decoder with `layers`",
    "gpt_oss": "learned attention sinks",
    "mamba": "nothing to route",
    "mimo_v2_flash": "does not support SDPA|learned attention sinks",
    "nemotron": "does not pass keyword arguments",
    "xglm": "did not call the registered attention|does not support SDPA",
}


def build(model_type):
    try:
        known = set(AutoConfig.for_model(model_type).to_dict())
    except ValueError:
        pytest.skip("this version of transformers has no such model")
    sizes = {**SMALL, **{name: size for name, size in SIZES.items() if name in known}, **CHANGES.get(model_type, {})}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6.0 if any(part in name for part in ("q_proj", "k_proj", "qkv")) else 2.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("model_type", EXACT)
@torch.no_grad()
def test_routed_exactly(model_type):
    model = build(model_type)
    prompt = ids(2, 40)
    mask = torch.ones_like(prompt)
    mask[1, :7] = 0

    def outputs():
        logits = model(prompt).logits
        return logits, *(
            model.generate(prompt, attention_mask=m, max_new_tokens=5, do_sample=False, pad_token_id=0)
            for m in (torch.ones_like(mask), mask)
        )

    logits, greedy, padded = outputs()
    routing = attach(model, CONFIG)
    routed = outputs()
    scale = logits.abs().max()
    assert (routed[0] - logits).abs().max() < 1e-3 * scale
    assert torch.equal(routed[1], greedy)
    assert torch.equal(routed[2], padded)
    with routing.force("sparse"):
        sparse = model(prompt).logits
        assert (sparse - logits).abs().max() > 1e-3 * scale
        cache = model(prompt[:, :10]).past_key_values
        steps = torch.cat([model(prompt[:, i : i + 1], past_key_values=cache).logits for i in range(10, 40)], 1)
        assert (steps - sparse[:, 10:]).abs().max() < 1e-2 * scale


@pytest.mark.parametrize("model_type", REFUSED)
@torch.no_grad()
def test_refused_in_words(model_type):
    """At attach where the configuration tells, else at the first call; never a wrong result."""
    model = build(model_type)

    def use():
        attach(model, CONFIG)
        model(ids(2, 40))

    with pytest.raises(UnsupportedModelError, match=REFUSED[model_type]):
        use()


def test_encoder_decoders_are_refused():
    config = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder; routers need a decoder-only model"):
        attach(transformers.T5ForConditionalGeneration(config), CONFIG)
    with pytest.raises(UnsupportedModelError, match="is not a transformers model"):
        attach(torch.nn.Linear(2, 2), CONFIG)


def test_attention_dropout_is_refused():
    model = tiny_model("llama", attention_dropout=0.1).train()
    attach(model, CONFIG)
    with pytest.raises(UnsupportedModelError, match=r"attention dropout is 0\.1"):
        model(ids(1, 8))


def test_a_shared_config_is_refused():
    first = tiny_model("llama")
    second = AutoModelForCausalLM.from_config(first.config).eval()
    assert second.config is first.config or pytest.skip("from_config copies the configuration in this transformers")
    routing = attach(first, CONFIG)
    with pytest.raises(RuntimeError, match="shares its config object"):
        attach(second, CONFIG)
    with torch.no_grad():
        mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
        beside = second(ids(1, 6), attention_mask=mask).logits  # the unrouted model keeps working meanwhile
        routing.detach()
        torch.testing.assert_close(second(ids(1, 6), attention_mask=mask).logits, beside)


def test_changing_the_attention_implementation_while_attached_is_refused():
    model = tiny_model("llama")
    attach(model, CONFIG)
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="was changed to 'eager' while routers were attached"):
        model(ids(1, 8))


def test_early_exit_is_refused():
    model = tiny_model("llama")
    attach(model, CONFIG)
    model.config.num_hidden_layers = 2
    with pytest.raises(UnsupportedModelError, match="2 of 3 layers"):
        model(ids(1, 8))


def test_reentrant_checkpointing_is_refused_where_it_would_lose_gradients():
    model = tiny_model("llama").train()
    with contextlib.suppress(TypeError):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    routing = attach(model, CONFIG)
    with routing.soft(1.0), pytest.raises(ValueError, match="use_reentrant"):
        model(ids(1, 8), labels=ids(1, 8))


def published(name):
    """Models as they are published, with a window as long as the context or with encoders beside the text decoder."""
    text = {**SMALL, "head_dim": 16, "num_hidden_layers": 4, "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=4)
    torch.manual_seed(0)
    if name == "phi3.5":
        config = transformers.Phi3Config(**{**SMALL, "max_position_embeddings": 64}, sliding_window=128)
    elif name == "gemma3":
        config = transformers.Gemma3Config(
            text_config=text, vision_config={**vision, "image_size": 8}, image_token_index=5
        )
    else:
        if not hasattr(transformers, "Gemma4Config"):
            pytest.skip("this version of transformers has no Gemma 4")
        text |= dict(num_kv_shared_layers=0, hidden_size_per_layer_input=0, global_head_dim=16)
        config = transformers.Gemma4Config(
            text_config=text, vision_config={**vision, "head_dim": 16, "num_key_value_heads": 2}, audio_config=None,
            image_token_id=5, video_token_id=6, audio_token_id=7,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6.0 if any(part in name for part in ("q_proj", "k_proj", "qkv")) else 2.0)
    return model


@pytest.mark.parametrize("name", ["phi3.5", "gemma3", "gemma4"])
@torch.no_grad()
def test_models_as_published(name):
    model = published(name)
    prompt, mask = ids(2, 40).clamp(min=9), torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    greedy = dict(max_new_tokens=5, do_sample=False)

    def outputs():
        return (
            model(prompt).logits,
            model(prompt, attention_mask=mask).logits[:, -1],
            model.generate(prompt, attention_mask=mask, **greedy)[:, -5:],
        )

    expected = outputs()
    routing = attach(model, CONFIG)
    assert routing.layers == ((0, 1, 2) if name == "phi3.5" else (1, 3))
    for stock, ours in zip(expected, outputs(), strict=True):
        torch.testing.assert_close(ours, stock, atol=2e-4, rtol=1e-3)
    randomize(routing)
    model(prompt, attention_mask=mask)
    together = routing.routes.logits_BL2
    model(prompt[:1, 7:])
    torch.testing.assert_close(routing.routes.logits_BL2, together[:1], atol=1e-3, rtol=1e-3)
    with routing.force("sparse"):
        sparse = model(prompt).logits
        cache = model(prompt[:, :10]).past_key_values
        steps = torch.cat([model(prompt[:, i : i + 1], past_key_values=cache).logits for i in range(10, 40)], 1)
    torch.testing.assert_close(steps, sparse[:, 10:], atol=1e-3, rtol=1e-2)
    assert not torch.allclose(sparse, expected[0], atol=1e-2)


@torch.no_grad()
def test_image_tokens_that_attend_both_ways_are_refused():
    model = published("gemma3")
    attach(model, CONFIG)
    prompt = ids(1, 20).clamp(min=9)
    types = torch.zeros_like(prompt)
    expected = model(prompt).logits
    torch.testing.assert_close(model(prompt, token_type_ids=types).logits, expected)  # text alone
    greedy = dict(max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(prompt, token_type_ids=types, **greedy), model.generate(prompt, **greedy))
    types[0, 3:7] = 1
    with pytest.raises(UnsupportedModelError, match="not plainly causal"):
        model(prompt, token_type_ids=types)
    torch.testing.assert_close(model(prompt).logits, expected)


def test_a_prompt_beyond_a_window_that_was_none_is_refused():
    model = published("phi3.5")
    attach(model, CONFIG)
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedModelError, match="129 tokens, more than the model's slid"),
    ):
        model(ids(1, 129))


def test_sharding_that_cannot_be_told_from_the_weights_is_refused():
    """As of transformers 5.5: each process would decide by the heads that it has."""
    model = tiny_model("qwen3")
    model._tp_size = 2
    with pytest.raises(UnsupportedModelError, match=r"without DTensor.*update transformers"):
        attach(model)
    model._tp_size = None
    attach(model).detach()
