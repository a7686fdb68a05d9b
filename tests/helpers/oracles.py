"""Independent truths: attention in float64 under a dense mask, and the stock model under dense masks."""

import math

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def oracle(query, key, value, mask, scale):
    """Softmax attention by its formula, in float64."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = (
        query.double(),
        key.double().repeat_interleave(groups, 1),
        value.double().repeat_interleave(groups, 1),
    )
    scores = (query @ key.transpose(-1, -2)) * scale
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ value


def error(actual, expected):
    assert actual.shape == expected.shape and actual.isfinite().all()
    return ((actual.double() - expected).norm() / expected.norm()).item()


def oracle_logits(model, input_ids, masks):
    """The stock model with a dense bool mask for each layer: ``masks[layer]`` is (S, S)."""

    def masked(module, query, key, value, attention_mask, **kwargs):
        mask = masks.get(module.layer_idx)
        if mask is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return sdpa_attention_forward(module, query, key, value, mask[None, None], **kwargs)

    config = model.get_decoder().config
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register("oracle", masked)
    ALL_MASK_ATTENTION_FUNCTIONS.register("oracle", sdpa_mask)
    config._attn_implementation = "oracle"
    try:
        with torch.no_grad():
            return model(input_ids, use_cache=False).logits
    finally:
        config._attn_implementation = before
