"""Makes what an engine is started with where there are no weights: a model's folder, and adapters for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flux_attention import adapters
from flux_attention.config import BaseModel, FluxConfig
from flux_attention.patterns import BlockSparse, Full, Pattern
from flux_attention.router import LayerRouter
from flux_attention.routes import parse_routes
from flux_attention.sizes import SHAPES

TINY = SHAPES["qwen3-4b"] | dict(
    vocab_size=1024, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32,
)  # fmt: skip
#: ``SHAPES``, one for a CPU, and one with as many layers as a large model.
EVERY_SHAPE: dict[str, dict[str, Any]] = {**SHAPES, "tiny": TINY, "deep": TINY | {"num_hidden_layers": 36}}

#: Of random weights, by which no key stands out, a selection by mass takes a share of the blocks that grows with this.
BLOCKS_OF_ALL = BlockSparse(0.3, "mass")


def make_model(folder: Path, shape: str, longest: int, dtype: str) -> BaseModel:
    """Write the configuration of a model of ``shape`` for contexts of ``longest`` tokens, and describe the model."""
    config = AutoConfig.for_model(**EVERY_SHAPE[shape], max_position_embeddings=longest)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = dtype
    config.save_pretrained(folder)
    heads = config.num_attention_heads
    return BaseModel(
        name=shape,
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        routed_layers=tuple(range(config.num_hidden_layers)),
    )


def make_routers(
    folder: Path, base: BaseModel, sparsity: float, sink: int, window: int, prompts: Pattern | None = None
) -> float:
    """
    Write an adapter whose routers read prompts as any others do, and decide the same for each.

    ``prompts`` is the pattern by which full layers read them; fully unless it is given.

    Returns
    -------
    float
        The share of layers that run sparse.
    """
    routes = parse_routes(float(sparsity), 1, base.routed_layers)[0].tolist()
    routers = nn.ModuleDict()
    for layer, full in zip(base.routed_layers, routes, strict=True):
        router = LayerRouter(base.head_dim)  # its last weights are zero: the bias alone decides
        with torch.no_grad():
            router.head[-1].bias.copy_(torch.tensor([0.0, 1.0] if full else [1.0, 0.0]))
        routers[str(layer)] = router
    pattern = (prompts or Full()).to_dict()
    config = FluxConfig(sink=sink, window=window, full=pattern, decide="ends", base_model=base)
    adapters.save(folder, config, routers)
    return 1 - sum(routes) / len(routes)


def make_ranking(folder: Path, base: BaseModel, sparsity: float, sink: int, window: int) -> float:
    """Write an adapter that runs the same layers full, without routers; return as ``make_routers`` does."""
    routes = parse_routes(float(sparsity), 1, base.routed_layers)[0].tolist()
    ranking = sorted(base.routed_layers, key=lambda layer: not routes[base.routed_layers.index(layer)])
    config = FluxConfig(
        sink=sink, window=window, ranking=tuple(ranking), budget=float(sparsity), base_model=base
    )  # fmt: skip
    adapters.save(folder, config, nn.ModuleDict())
    return 1 - sum(routes) / len(routes)
