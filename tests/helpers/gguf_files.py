"""Tiny random models in GGUF files, as llama.cpp's converter writes them, beside the transformers model they equal."""

import numpy as np
import torch
from helpers.models import tiny_model

NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "1 2", "3 4"]


def vocabulary():
    """Bytes as GPT-2 spells them, control tokens before and what merges make behind."""
    spelled = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in spelled]
    letters = [chr(byte) for byte in spelled] + [chr(256 + index) for index in range(len(others))]
    return CONTROL + letters + [merge.replace(" ", "") for merge in MERGES]


def llama(**changes):
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    return tiny_model("llama", vocab_size=len(vocabulary()), eos_token_id=2, **sizes, **changes)


def write_gguf(path, model, *, architecture="llama", quantised=("ffn_up",), facts=None, factors=None, pre="smollm"):
    """
    Write a Llama model to a GGUF file.

    The tensors named in ``quantised`` are rounded to Q8_0, in the file and in ``model``; ``facts`` are added as text.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize

    config, state = model.config, model.state_dict()
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary())
    writer.add_token_types([3] * len(CONTROL) + [1] * (config.vocab_size - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    for key, value in (facts or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)

    def add(name, key, kind=GGMLQuantizationType.Q8_0):
        weight = state[key].numpy()
        if name.split(".")[-2] in quantised:
            blocks = quantize(weight, kind)
            state[key].copy_(torch.from_numpy(dequantize(blocks, kind)))
            writer.add_tensor(name, blocks, raw_dtype=kind)
            return
        if "attn_q" in name or "attn_k" in name:  # llama.cpp pairs rotary dimensions (i, i + 1), others (i, i + D / 2)
            parts = weight.reshape(-1, 2, config.head_dim // 2, config.hidden_size)
            weight = np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(weight.shape)
        writer.add_tensor(name, weight)

    add("token_embd.weight", "model.embed_tokens.weight")
    add("output_norm.weight", "model.norm.weight")
    add("output.weight", "lm_head.weight")
    for layer in range(config.num_hidden_layers):
        for name, other in NAMES.items():
            add(f"blk.{layer}.{name}.weight", f"model.layers.{layer}.{other}.weight")
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
