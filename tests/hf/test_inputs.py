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
    "narrow mask with positions": (
        dict(input_ids=ids(1, 8), attention_mask=torch.ones(1, 7), position_ids=torch.arange(8)[None]),
        ValueError,
        r"shape \(1, 7\), expected \(1, 8\)",
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
    "packed beside padding": (
        dict(
            input_ids=ids(1, 8),
            position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]),
            attention_mask=torch.tensor([[1] * 7 + [0]]),
        ),
        UnsupportedModelError,
        "without padding",
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


def test_padding_that_no_mask_announces_is_refused():
    model = tiny_model("qwen3")  # whose pad token is 0
    routing = randomize(attach(model, CONFIG))
    right, left, mask = ids(3, 20), ids(3, 20), torch.ones(3, 20, dtype=torch.long)
    right[1, 14:], left[1, :6], mask[1, 14:] = 0, 0, 0
    with torch.no_grad():
        for padded, side in ((right, "end"), (left, "begin")):
            with pytest.raises(ValueError, match=f"{side} in token 0, 6 of them in sequence 1.*attention_mask"):
                model(padded)
        model(right[1:2, :14])
        alone = routing.routes.logits_BL2
        model(right, attention_mask=mask)
        torch.testing.assert_close(routing.routes.logits_BL2[1:2], alone)
        model(right, prompt_lengths=[20, 14, 20])  # which says it, too
        torch.testing.assert_close(routing.routes.logits_BL2[1:2], alone)
        with routing.force("sparse"):  # where it does not matter
            model(right)
        for padded in (right[1:2], right[1:2].repeat(2, 1)):  # alone, or all padded alike
            with pytest.raises(ValueError, match="end in token 0"):
                model(padded)
        model(right[1:2, :15])  # a single one may be text
        model.config.eos_token_id = [0, 5]  # and so may several, where texts end in it
        model(right[1:2])
        model.config.eos_token_id = None
        model.config.pad_token_id = 7
        right[1, 14:] = 7
        with pytest.raises(ValueError, match="end in token 7"):
            model(right)


@pytest.mark.parametrize("how", ["sequence_lengths", "cu_seq_lens", "position_ids"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_packed_calls_are_kept_apart(family, how):
    """As TRL's padding_free and DataCollatorWithFlattening tell of them, with the default use_cache=True."""
    model = tiny_model(family)
    routing = randomize(attach(model, CONFIG))
    rows = [ids(1, length, length)[0] for length in (30, 1, 17)]
    call, ends = packed(rows), torch.tensor([0, 30, 31, 48], dtype=torch.int32)
    if how != "sequence_lengths":
        del call["sequence_lengths"]
    if how == "cu_seq_lens":
        call |= dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=30, max_length_k=30)
    with torch.no_grad():
        together, routes = model(**call), routing.routes
        assert together.past_key_values is None and routes.lengths == (30, 1, 17)
        for index, (row, logits) in enumerate(zip(rows, together.logits[0].split([30, 1, 17]), strict=True)):
            alone = model(row[None], use_cache=False).logits[0]
            torch.testing.assert_close(logits, alone, atol=2e-5, rtol=1e-4)
            assert torch.equal(routing.routes.routes_BL[0], routes.routes_BL[index])


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_the_last_tokens_of_any_row_can_be_masked_later(data):
    """A later turn's mask hides some of each row's last tokens: what follows is as if they had not been there."""
    model = tiny_model("qwen3")
    routing = attach(model, CONFIG, keep_full_kv=True)
    length, more = data.draw(st.integers(3, 30)), data.draw(st.integers(1, 6))
    steps = data.draw(st.integers(0, 3), "steps")
    routes = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=2, max_size=2)))
    hidden = [data.draw(st.integers(0, length - 1)) for _ in range(2)]
    tokens, cache = ids(2, length + more, 3), DynamicCache()
    mask = torch.ones(2, length + more, dtype=torch.long)
    for row, count in enumerate(hidden):
        mask[row, length - count : length] = 0
    positions = mask.cumsum(1)[:, length:] - 1
    with torch.no_grad(), routing.force(routes):
        model(tokens[:, : length - min(steps, length - 1)], past_key_values=cache)
        for column in range(length - min(steps, length - 1), length):
            model(tokens[:, column : column + 1], past_key_values=cache)
        later = dict(attention_mask=mask, position_ids=positions, past_key_values=cache)
        actual = model(tokens[:, length:], **later).logits
        for row, count in enumerate(hidden):
            kept = torch.cat([tokens[row : row + 1, : length - count], tokens[row : row + 1, length:]], 1)
            with routing.force(routes[row : row + 1]):
                expected = model(kept).logits[:, length - count :]
            torch.testing.assert_close(actual[row : row + 1], expected, atol=3e-4, rtol=1e-3)


def test_a_mask_hides_no_tokens_in_the_middle_later():
    model = tiny_model("qwen3")
    attach(model, CONFIG)
    with torch.no_grad():
        cache = model(ids(2, 10), attention_mask=torch.tensor([[1] * 10, [0] * 2 + [1] * 8])).past_key_values
        for changed in ([[1] * 4 + [0] + [1] * 5, [0] * 2 + [1] * 8], [[1] * 10, [0] + [1] * 9]):
            mask = torch.cat([torch.tensor(changed), torch.ones(2, 3, dtype=torch.long)], 1)
            with pytest.raises(ValueError, match=r"each sequence's last ones alone"):
                model(ids(2, 3), attention_mask=mask, past_key_values=cache)
        mask = torch.tensor([[1] * 13, [0] * 2 + [1] * 11])
        assert model(ids(2, 3), attention_mask=mask, past_key_values=cache).logits.isfinite().all()


def test_positions_behind_a_cache_go_on():
    model = tiny_model("llama")
    attach(model, CONFIG)
    with torch.no_grad():
        cache = model(ids(1, 8)).past_key_values
        with pytest.raises(UnsupportedModelError, match="neither consecutive"):
            model(ids(1, 4), position_ids=torch.tensor([[0, 1, 0, 1]]), past_key_values=cache)
        expected = model(torch.cat([ids(1, 8), ids(1, 4, 5)], 1)).logits[:, 8:]
        later = dict(position_ids=torch.arange(8, 12)[None], past_key_values=cache)
        torch.testing.assert_close(model(ids(1, 4, 5), **later).logits, expected, atol=1e-4, rtol=1e-3)


def test_a_call_that_is_refused_leaves_the_cache_as_it_was():
    model = tiny_model("qwen3")
    attach(model, CONFIG)
    mask = torch.ones(1, 12, dtype=torch.long)
    with torch.no_grad():
        cache = model(ids(1, 10)).past_key_values
        hiding = mask.clone()
        hiding[0, 7:10] = 0
        with pytest.raises(ValueError, match="prompt_lengths"):
            model(ids(1, 2), attention_mask=hiding, past_key_values=cache, prompt_lengths=[5])
        assert cache.layers[0].lengths == [10]
        expected = model(torch.cat([ids(1, 10), ids(1, 2)], 1)).logits[:, 10:]
        torch.testing.assert_close(
            model(ids(1, 2), attention_mask=mask, past_key_values=cache).logits, expected, atol=1e-4, rtol=1e-3
        )
