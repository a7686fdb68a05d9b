"""Looks at a model of vLLM's: its layers that can be routed, their rotary embeddings, and what it is."""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from flux_attention.config import BaseModel
from flux_attention.errors import ServingError
from flux_attention.serving.backend import RoutedAttention


def mean_over_ranks(states: torch.Tensor) -> torch.Tensor:
    """Take the mean over the ranks that share the heads, which have equally many."""
    ranks = get_tensor_model_parallel_world_size()
    return tensor_model_parallel_all_reduce(states) / ranks if ranks > 1 else states


def routed_attentions(vllm_config) -> dict[int, Attention]:
    """
    Find the layers that attend over the whole context, by index.

    Raises
    ------
    ServingError
        For layers whose attention is not plain causal softmax, or not by the backend that is routed.
    """
    found = {}
    for name, attention in get_layers_from_vllm_config(vllm_config, Attention).items():
        impl = attention.impl
        if attention.sliding_window is not None:
            raise ServingError(
                f"{name} has a sliding window: models that mix such layers with full ones are not served"
            )
        if not isinstance(impl, RoutedAttention):
            raise ServingError(
                f"{name} attends by {type(impl).__name__}, but on GPUs FlashAttention is what is routed: choose "
                "--attention-backend FLASH_ATTN, if the card and the dtype allow it"
            )
        if not impl.takes(attention.head_size, attention.dtype):
            raise ServingError(
                f"{name} has heads of {attention.head_size} {attention.dtype}, which no kernel here takes"
            )
        for what in ("logits_soft_cap", "alibi_slopes", "sinks", "kv_sharing_target_layer_name"):
            value = getattr(impl, what, None)
            if value is not None and not (isinstance(value, int | float) and value == 0):
                raise ServingError(f"{name} has {what}, which routed attention does not compute")
        found[extract_layer_index(name)] = attention
    if not found:
        raise ServingError("the model has no layer that attends over the whole context, so there is nothing to route")
    shapes = {(layer.num_heads, layer.num_kv_heads, layer.head_size) for layer in found.values()}
    if len(shapes) > 1:
        raise ServingError(f"the model's layers differ in heads, KV heads and head size: {sorted(shapes)}")
    return dict(sorted(found.items()))


def rotary_embeddings(model: nn.Module, attentions: dict[int, Attention]) -> dict[int, nn.Module | None]:
    """
    Find the rotary embedding beside each attention; None where there is none.

    Raises
    ------
    ServingError
        If attention is not a part of the model's layers, as in vLLM's backend of transformers models.
    """
    layers = {id(attention): layer for layer, attention in attentions.items()}
    found: dict[int, nn.Module | None] = {}
    for module in model.modules():
        for child in module.children():
            if id(child) in layers:
                found[layers[id(child)]] = getattr(module, "rotary_emb", None)
    if len(found) < len(attentions):
        raise ServingError(
            f"{type(model).__name__} keeps its attention apart from its layers: it cannot be routed here"
        )
    return found


def base_model(model: nn.Module, vllm_config, layers: tuple[int, ...]) -> BaseModel:
    """Describe a model, as adapters are checked against it."""
    model_config = vllm_config.model_config
    config = model_config.hf_text_config
    heads = config.num_attention_heads
    return BaseModel(
        name=model_config.model,
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=model_config.get_head_size(),
        vocab_size=config.vocab_size,
        routed_layers=layers,
        sample=_sample(model, config.vocab_size),
    )


def _sample(model: nn.Module, vocab_size: int) -> tuple[float, ...] | None:
    """Return the embedding weights that ``BaseModel.sample`` holds; those of other ranks come from there."""
    embedding = getattr(getattr(model, "model", None), "embed_tokens", None)
    weight = getattr(embedding, "weight", None)
    if weight is None or not weight.is_floating_point() or weight.ndim != 2:
        return None
    rows = torch.linspace(0, vocab_size - 1, 6, device=weight.device).long()[1:-1]
    shard = getattr(embedding, "shard_indices", None)
    first, end = (0, vocab_size) if shard is None else (shard.org_vocab_start_index, shard.org_vocab_end_index)
    mine = (rows >= first) & (rows < end)
    values = torch.zeros(4, 4, device=weight.device)
    values[mine] = weight[rows[mine] - first, :4].float()
    if get_tensor_model_parallel_world_size() > 1:
        values = tensor_model_parallel_all_reduce(values)
    return tuple(float(f"{value:.4g}") for value in values.flatten().tolist())
