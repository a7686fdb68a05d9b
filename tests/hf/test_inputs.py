"""The arguments of a call: what is prompt, what is padding, what is refused."""

import pytest
import torch
from helpers.models import CONFIG, PATTERNS, SMALL, VOCAB, ids, packed, randomize, tiny_model
from helpers.oracles import oracle_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from flux_attention import UnsupportedModelError, attach
from flux_attention.patterns import Full


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
    "packed in a batch": (
        dict(input_ids=ids(2, 8), position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2)),
        UnsupportedModelError,
        "packed into a single row",
    ),
    "positions that jump": (
        dict(input_ids=ids(1, 8), position_ids=torch.tensor([[0, 1, 2, 5, 6, 7, 8, 9]])),
        UnsupportedModelError,
        "neither consecutive",
    ),
    "packed behind a cache": (
        dict(
            input_ids=ids(1, 8), position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]), past_key_values=DynamicCache()
        ),
        UnsupportedModelError,
        "no past_key_values",
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


def test_a_mask_that_changes_the_past_is_refused():
    model = tiny_model("llama")
    attach(model, CONFIG)
    with torch.no_grad():
        cache = model(ids(1, 8), attention_mask=torch.ones(1, 8)).past_key_values
        with pytest.raises(ValueError, match="already in the KV cache"):
            model(ids(1, 1), attention_mask=torch.tensor([[0] + [1] * 8]), past_key_values=cache)


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
        (dict(attention_mask=torch.tensor([[0] + [1] * 11])), "no attention_mask"),
        (dict(past_key_values=DynamicCache()), "no past_key_values"),
        (dict(prompt_lengths=[5]), "prompt_lengths"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{**good, **wrong})
    with routing.soft(1.0, torch.zeros(1, 3, 2)), pytest.raises(ValueError, match=r"noise has shape \(1, 3, 2\)"):
        model(**good)


@pytest.mark.parametrize("config", PATTERNS.values(), ids=PATTERNS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_padding_anywhere_in_any_call(config, data):
    """Calls of any width with padding anywhere: each sequence gets what it would get alone, under its own mask."""
    model = tiny_model("qwen3")
    batch, calls = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    routing = attach(model, config, keep_full_kv=data.draw(st.booleans(), "keep_full"))
    bits = st.lists(st.booleans(), min_size=3, max_size=3)
    routes = torch.tensor([data.draw(bits) for _ in range(batch)])
    cache, mask, logits = DynamicCache(), torch.zeros(batch, 0, dtype=torch.long), []
    columns, first = [], None
    for call in range(calls):
        width = data.draw(st.sampled_from([1, 1, 2, 5, 20]), "width")
        real = torch.tensor([[data.draw(st.booleans()) for _ in range(width)] for _ in range(batch)]).long()
        if call == 0:
            real[:, data.draw(st.integers(0, width - 1))] = 1
            first = real.sum(1).tolist()
        tokens = ids(batch, width, call) * real
        positions = (mask.sum(1, keepdim=True) + real.cumsum(1) - 1).clamp(min=0)
        mask = torch.cat([mask, real], 1)
        columns.append(tokens)
        with torch.no_grad(), routing.force(routes):
            out = model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(out.logits)
    routing.detach()
    tokens, logits = torch.cat(columns, 1), torch.cat(logits, 1)
    for row in range(batch):
        real = mask[row].bool()
        masks = {
            layer: (Full() if full else routing.sparse).mask(int(real.sum()), prompt_length=first[row])
            for layer, full in enumerate(routes[row].tolist())
        }
        expected = oracle_logits(model, tokens[row : row + 1, real], masks)
        torch.testing.assert_close(logits[row, real], expected[0], atol=3e-4, rtol=1e-3)
