"""What can be routed: finds a model's decoder and its layers with full attention, and refuses in words what cannot be.

Shape suffixes: B batch, S query length, H query heads, D head dim.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import cast

import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

from flux_attention.config import BaseModel
from flux_attention.errors import UnsupportedModelError


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the tokens that a model's positions reach to; None if its configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def hides_nothing(config, window: int | None) -> bool:
    """Whether a sliding window is at least as long as the model's positions, so that no token is ever outside of it."""
    positions = getattr(config, "max_position_embeddings", None)
    return window is not None and positions is not None and window >= positions


def find_decoder(model: nn.Module) -> nn.Module:
    """
    Find the text decoder of a causal language model.

    Raises
    ------
    UnsupportedModelError
        If there is none in today's transformers layout.
    """
    if not hasattr(model, "config") or not hasattr(model, "get_decoder"):
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers model; expected a causal LM")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder-decoder; routers need a decoder-only model")
    decoder = model.get_decoder()
    if not hasattr(decoder, "layers"):
        decoder = getattr(decoder, "model", decoder)
    if not hasattr(decoder, "layers") or not hasattr(decoder, "config"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder with `layers`; routers need today's transformers layout"
        )
    return decoder


def check_sharding(model: nn.Module, decoder: nn.Module) -> None:
    """
    Refuse tensor parallelism whose processes cannot be told from the weights: each would decide by its own heads.

    Raises
    ------
    UnsupportedModelError
        With what to do.
    """
    if (getattr(model, "tp_size", None) or 1) > 1 and tensor_parallel_group(decoder) is None:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} shards weights without DTensor, so that the processes of tp_plan "
            "cannot decide alike; update transformers, or load the model without tp_plan"
        )


def full_attention_layers(model: nn.Module, decoder: nn.Module) -> dict[int, nn.Module]:
    """
    Find the attention modules of a model's decoder that see the whole context, by layer index.

    Raises
    ------
    UnsupportedModelError
        If there is none, or one computes something that routed layers do not.
    """
    config = decoder.config
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{config.model_type} uses multi-head latent attention (MLA), whose KV cache is compressed across heads; "
            "routers support ordinary and grouped-query attention"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise UnsupportedModelError(f"{config.model_type} caps attention logits, which routed layers do not compute")
    found = {}
    for index, layer in enumerate(decoder.layers):
        attention = getattr(layer, "self_attn", None)
        if attention is None or getattr(attention, "layer_idx", None) != index:
            continue
        if hasattr(layer, "encoder_attn"):
            raise UnsupportedModelError(f"{config.model_type} attends to an encoder; routers need a decoder-only model")
        if _sees_everything(config, index):
            found[index] = attention
    if not found:
        raise UnsupportedModelError(
            f"{config.model_type} has no layer with full softmax attention (all are sliding-window or linear), "
            "so there is nothing to route"
        )
    for index, attention in found.items():
        _check_attention(config, index, attention)
    if not getattr(model, "_supports_sdpa", True):  # attention of a kind that SDPA, and so our kernels, cannot compute
        raise UnsupportedModelError(f"{type(model).__name__} does not support SDPA attention, so it cannot be routed")
    return found


def _sees_everything(config, index: int) -> bool:
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    types = getattr(config, "layer_types", None)
    if types is None:
        return not window or hides_nothing(config, window)
    return types[index] == "full_attention" or (types[index] == "sliding_attention" and hides_nothing(config, window))


def _check_attention(config, index: int, attention: nn.Module) -> None:
    where = f"layer {index} of {config.model_type} ({type(attention).__name__})"
    if query_module(attention) is None:
        raise UnsupportedModelError(f"{where} has none of q_norm, q_proj, qkv_proj, so its query cannot be read")
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(attention.forward).parameters.values()):
        raise UnsupportedModelError(f"{where} does not pass keyword arguments on to its attention function")
    if getattr(attention, "sinks", None) is not None:
        raise UnsupportedModelError(f"{where} has learned attention sinks, which routed layers do not compute")
    if getattr(attention, "is_kv_shared_layer", False):
        raise UnsupportedModelError(f"{where} reads another layer's KV cache, which routing per layer does not allow")
    if getattr(attention, "is_causal", True) is False:
        raise UnsupportedModelError(f"{where} attends both ways; routed layers are causal")
    shape = QueryShape.of(config, attention)
    width = getattr(getattr(attention, "q_proj", None), "out_features", None)
    if getattr(attention, "q_norm", None) is None and width is not None and width != shape.heads * shape.dim:
        raise UnsupportedModelError(
            f"{where} projects {width} query features, expected {shape.heads} heads × {shape.dim}"
        )


def base_model(model: nn.Module, decoder: nn.Module, attentions: dict[int, nn.Module]) -> BaseModel:
    """Describe a model, as adapters are checked against it."""
    config = decoder.config
    shape = QueryShape.of(config, next(iter(attentions.values())))
    return BaseModel(
        name=getattr(model.config, "_name_or_path", "") or type(model).__name__,
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=shape.heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or shape.heads,
        head_dim=shape.dim,
        vocab_size=config.vocab_size,
        routed_layers=tuple(attentions),
        sample=_sample(model),
    )


def _sample(model: nn.Module) -> tuple[float, ...] | None:
    """Return four embedding weights of four rows, in four digits."""
    weight = model.get_input_embeddings().weight
    if weight.device.type == "meta" or not weight.is_floating_point() or weight.ndim != 2:
        return None
    rows = torch.linspace(0, len(weight) - 1, 6, device=weight.device).long()[1:-1]
    weight = weight.detach()
    if isinstance(weight, DTensor):  # sharded over processes, all of which take part
        weight = weight.full_tensor()
    return tuple(float(f"{value:.4g}") for value in weight[rows, :4].float().flatten().tolist())


def tensor_parallel_group(decoder: nn.Module) -> torch.distributed.ProcessGroup | None:
    """Return the processes that share the decoder's heads (``tp_plan``); None for a model of one process."""
    for layer in cast(nn.ModuleList, decoder.layers):
        for parameter in layer.self_attn.parameters() if hasattr(layer, "self_attn") else ():
            if isinstance(parameter, DTensor):
                mesh = parameter.device_mesh
                return mesh.get_group("tp" if "tp" in (mesh.mesh_dim_names or ()) else 0)
    return None


def query_module(attention: nn.Module) -> nn.Module | None:
    """Find the last module that shapes the query before rotary embedding."""
    for name in ("q_norm", "q_proj", "qkv_proj"):
        module = getattr(attention, name, None)
        if isinstance(module, nn.Module):
            return module
    return None


@dataclass(frozen=True)
class QueryShape:
    """A layer's query: ``heads`` H, of the whole model, and ``dim`` D."""

    heads: int
    dim: int

    @classmethod
    def of(cls, config, attention: nn.Module) -> QueryShape:
        """Read the shape of an attention module's query."""
        heads = config.num_attention_heads
        return cls(heads, getattr(attention, "head_dim", None) or config.hidden_size // heads)

    def states(self, output: torch.Tensor, length: int, source: torch.Tensor) -> torch.Tensor:
        """
        Bring a query module's output to (B, S, H, D); under tensor parallelism H may be this process's heads only.

        Models differ: (B, S, ≥ H·D) with the query first, (B, S, H, D), or (B, H, S, D). Where S = H the last two
        look alike; the memory order of the module's input, a view of the projection, then tells them apart.
        """
        if output.ndim == 3:
            return output[..., : self.heads * self.dim].unflatten(-1, (-1, self.dim))
        if output.shape[1] == output.shape[2]:
            heads_first = source.stride(1) < source.stride(2)
        else:
            heads_first = output.shape[2] == length
        return output.transpose(1, 2) if heads_first else output


@torch.no_grad()
def check_head(routing) -> None:
    """
    Check that the model's logits are its output embedding's, as scoring takes them.

    Raises
    ------
    UnsupportedModelError
        For models that scale or cap their logits afterwards, or whose logits are not finite.
    """
    model = routing.model
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    with routing.force("full"):
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    if not logits.isfinite().all():
        raise UnsupportedModelError(
            f"{type(model).__name__} gives NaN or infinite logits: its hidden states have overflowed (fp16?), or its "
            "weights are damaged"
        )
    if not torch.allclose(model.get_output_embeddings()(hidden), logits, atol=1e-2, rtol=1e-2):
        raise UnsupportedModelError(
            f"{type(model).__name__} scales or caps its logits after the output embedding, which training and scoring "
            "do not compute"
        )
