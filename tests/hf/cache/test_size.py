"""What caches hold, in bytes."""

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
