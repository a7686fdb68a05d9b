"""What caches hold, in bytes."""

import pytest
import torch
from helpers.models import CONFIG, ids, tiny_model

from flux_attention import attach
from flux_attention.hf.cache.size import dense_kv_bytes, kv_bytes


@torch.no_grad()
def test_dense_bytes_are_the_stock_models(family):
    model = tiny_model(family)
    stock = kv_bytes(model(ids(2, 30)).past_key_values)
    routing = attach(model, CONFIG)
    for spec in ("full", "sparse"):
        with routing.force(spec):
            assert dense_kv_bytes(model(ids(2, 30)).past_key_values) == stock


@torch.no_grad()
def test_bytes_of_what_a_model_and_generate_return():
    model = tiny_model("qwen3")
    attach(model, CONFIG)
    output = model(ids(2, 30))
    assert kv_bytes(output) == kv_bytes(output.past_key_values) > 0
    generated = model.generate(ids(2, 30), max_new_tokens=3, return_dict_in_generate=True)
    assert kv_bytes(generated) == kv_bytes(generated.past_key_values) > kv_bytes(output)
    for wrong in (model.generate(ids(2, 30), max_new_tokens=3), model(ids(2, 30), use_cache=False), None):
        with pytest.raises(TypeError, match=f"{type(wrong).__name__} holds no KV cache.*return_dict_in_generate"):
            kv_bytes(wrong)
