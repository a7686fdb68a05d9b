"""Block-sparse prefill in whole models: against stock transformers with attention by loops."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.blocks import BLOCK, expected_output, naive_mass, naive_scores
from helpers.models import ids, tiny_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flux_attention import FluxConfig, FluxConfigError, UnsupportedModelError, attach
from flux_attention.errors import RecipeError
from flux_attention.patterns import BlockSparse
from flux_attention.training.recipe import Recipe

SHARE, SINK, WINDOW = 0.4, 8, 40
BLOCKS = {"pattern": "block_sparse", "threshold": SHARE, "select": "mass"}
CONFIG = FluxConfig(full=BLOCKS, sparse={**BLOCKS, "threshold": 0.2, "sink": SINK, "window": WINDOW}, pool_size=6)


def by_loops(routes, shares):
    """An attention function of stock transformers: each layer's blocks, selected and attended to by loops."""

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        share = shares[module.layer_idx] if routes[module.layer_idx] else 0.2
        scale, keys, rows = scaling or query.shape[-1] ** -0.5, key.shape[2], -(-key.shape[2] // BLOCK)
        blocks = torch.zeros(query.shape[1], rows, rows, dtype=torch.bool)
        for head in range(query.shape[1]):
            scores = naive_scores(query[0, head], key[0, head // (query.shape[1] // key.shape[1])], 16, scale)
            for row in range(rows):
                blocks[head, row, list(naive_mass(scores[row], row, share))] = True
        output = expected_output(query[0], key[0], value[0], scale, blocks, False)
        assert not blocks.tril().equal(torch.ones_like(blocks).tril()) or keys <= 2 * BLOCK
        return output.float().transpose(0, 1)[None], None

    return attention


@pytest.mark.parametrize("lengths", [(420,), (420, 330)])
@pytest.mark.parametrize("threshold", [SHARE, {"0": SHARE, "2": 0.25}], ids=["one", "by layer"])
@torch.no_grad()
def test_prompts_against_stock_transformers(lengths, threshold):
    routes, shares = [1, 0, 1], [SHARE, 0.0, 0.25 if isinstance(threshold, dict) else SHARE]
    stock, tokens = tiny_model("llama"), ids(len(lengths), max(lengths))
    mask = torch.ones_like(tokens)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0  # padded on the left
    ALL_ATTENTION_FUNCTIONS.register("by_loops", by_loops(routes, shares))
    stock.config._attn_implementation = "by_loops"
    expected = [stock(tokens[row : row + 1, -length:], use_cache=False).logits for row, length in enumerate(lengths)]
    model = tiny_model("llama")
    with attach(model, replace(CONFIG, full={**BLOCKS, "threshold": threshold})).force([0, 2]):
        logits = model(tokens, attention_mask=mask, use_cache=False).logits
        cached = model(tokens, attention_mask=mask).logits
    for row, length in enumerate(lengths):
        torch.testing.assert_close(logits[row : row + 1, -length:], expected[row], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(cached, logits, atol=1e-5, rtol=1e-5)
    dense = tiny_model("llama")(tokens, attention_mask=mask).logits
    assert (dense[0] - logits[0]).abs().max() > 1e-2  # else all blocks were selected


def test_layers_may_have_thresholds_of_their_own():
    pattern = BlockSparse({"2": 0.5, 1: [0.1, 0.2]}, select="mass")
    assert [pattern.of_layer(layer).threshold for layer in (0, 1, 2)] == [0.95, (0.1, 0.2), 0.5]
    assert BlockSparse(**{key: value for key, value in pattern.to_dict().items() if key != "pattern"}) == pattern
    assert json.loads(json.dumps(pattern.to_dict()))["threshold"] == {"1": [0.1, 0.2], "2": 0.5}
    with pytest.raises(FluxConfigError, match=r"threshold names layers \[7\], expected some of \[0, 1, 2\]"):
        attach(tiny_model("llama"), FluxConfig(full={"pattern": "block_sparse", "threshold": {"7": 0.1}}))
    for wrong, message in (({"a": 0.1}, r"threshold names \['a'\]"), ({"0": 2}, "threshold is 2")):
        with pytest.raises(FluxConfigError, match=message):
            BlockSparse(wrong)


@torch.no_grad()
def test_steps_are_what_follows_the_prompt_in_one_call():
    tokens, model = ids(1, 304), tiny_model("llama")
    with attach(model, CONFIG).force([0, 2]):
        whole = model(tokens, prompt_lengths=[300], use_cache=False).logits[:, 299:]
        cache = model(tokens[:, :300]).past_key_values
        steps = [model(tokens[:, place : place + 1], past_key_values=cache).logits for place in range(300, 304)]
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 1:], atol=1e-4, rtol=1e-4)


def test_what_cannot_run_block_sparse_is_refused():
    model = tiny_model("llama")
    routing = attach(model, CONFIG)
    with routing.force("full"), pytest.raises(UnsupportedModelError, match=r"BlockSparse.*use full"):
        model.generate(ids(1, 300), max_new_tokens=2, prefill_chunk_size=128)
    with routing.soft(1.0), pytest.raises(UnsupportedModelError, match="gradients do not flow through block_sparse"):
        model(ids(1, 300))
    with pytest.raises(RecipeError, match="gradients do not flow through block_sparse"):
        Recipe.from_dict({"model": "m", "output": "o", "data": [{"path": "x"}], "targets": {"a": 0.5},
                          "routers": {"full": BLOCKS}})  # fmt: skip
