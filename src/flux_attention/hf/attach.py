"""Attach layer routers to a stock Hugging Face model: find, check, install; ``detach`` undoes it.

No model code is copied and no library is patched: hooks on modules, functions registered under the name ``flux``, and
cache layers of our own in the cache that the caller or ``generate`` made. On the model object itself, and until
``detach``, the forwards of the decoder, of models around it, of MLPs and of compiled layers are wrapped, and its class
is a subclass.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from flux_attention import adapters
from flux_attention.config import BaseModel, FluxConfig, with_options
from flux_attention.errors import UnsupportedModelError
from flux_attention.hf.compiled import compiled_layer, materialize_input, readers
from flux_attention.hf.context import NAME, ForwardContext
from flux_attention.hf.generation.install import install_generation
from flux_attention.hf.handle import Routing
from flux_attention.hf.hooks import (
    QueryHooks,
    enter_attention,
    hook_attention,
    refuse_copies,
    routed_decoder,
    show_query,
    telling_model,
)
from flux_attention.hf.interface import register
from flux_attention.hf.mlp import in_chunks, mlps
from flux_attention.hf.modules import replace_forward
from flux_attention.hf.support import (
    base_model,
    check_sharding,
    find_decoder,
    full_attention_layers,
    tensor_parallel_group,
)
from flux_attention.patterns import full_pattern, sparse_pattern
from flux_attention.router import LayerRouter

#: Where the handle stands on an attached decoder.
HANDLE = "flux_routing"
#: The configurations of attached models: two models that share one cannot be told apart by transformers.
_attached_configs: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def attach(
    model: PreTrainedModel,
    routers: str | os.PathLike | FluxConfig | None = None,
    *,
    revision: str | None = None,
    budget: float | None = None,
    decide: str | None = None,
    keep_full_kv: bool = False,
    cuda_graphs: bool = True,
    compile: bool = False,
    min_tokens: int = 0,
) -> Routing:
    """
    Attach layer routers to a frozen causal language model.

    Every layer with full attention gets a router; sliding-window and linear layers are left alone. The model's own
    API stays as it is: ``forward``, ``generate``, ``pipeline``. Each sequence's routes are decided by its prompt (what
    ``generate`` is given; in a loop of one's own, the first forward call with an empty cache) and kept for the cache's
    life, further turns included.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder-only causal LM, or a vision-language model with such a text decoder. fp32, bf16 or fp16. The model
        that generates, not its decoder alone: ``generate`` knows what is prompt.
    routers : str, os.PathLike or FluxConfig, optional
        Trained routers, or a fixed set of layers, as a directory or a Hub id; or a configuration, which without a
        ``ranking`` makes fresh routers, that route everything to full attention. Default: ``FluxConfig()``.
    revision : str, optional
        Branch, tag or commit of a Hub repository.
    budget : float, optional
        The share of layers that run sparse, of a fixed set or of routers trained with budgets; default: as the adapter
        says.
    decide : {"prefill", "ends"}, optional
        When routers read a prompt, see ``FluxConfig``; default: as the adapter says.
    keep_full_kv : bool
        Keep the whole KV cache of sparse layers too, for ``Routing.reroute``, cropping and assisted decoding.
    cuda_graphs : bool
        Let ``generate`` decode (greedy or sampling) on an NVIDIA GPU by a CUDA graph of the whole step.
    compile : bool
        Fuse the small operations of each routed layer by ``torch.compile``, for inference. Takes a while at the first
        prompt, the first one of more than 65,536 tokens, and the first decode step.
    min_tokens : int
        Prompts of fewer tokens run full in all layers, without routers, as sparse layers do not make them faster. They
        stay so for the cache's life. Training does not look at it.

    Returns
    -------
    Routing
        The handle: routes, forcing, saving, detaching.

    Raises
    ------
    UnsupportedModelError
        For models that cannot be routed: MLA, encoder-decoders, no full-attention layer, unknown layouts.
    RuntimeError
        If routers are attached already.
    ValueError
        If ``min_tokens`` is not a number of tokens.
    FluxConfigError
        If the configuration names no pattern that there is, or sizes that it does not have; if ``budget`` or
        ``decide`` are not possible, or not with this adapter.
    AdapterError
        If the adapter is missing, damaged, or made for another model.
    """
    register()
    decoder = find_decoder(model)
    if hasattr(decoder, HANDLE):
        raise RuntimeError("routers are attached to this model already; call detach() on their handle first")
    if _attached_configs.get(id(decoder.config)) is decoder.config:
        raise RuntimeError(
            "this model shares its config object with a model that has routers attached; detach those first, or give "
            "the model a config of its own (copy.deepcopy)"
        )
    check_sharding(model, decoder)
    attentions = full_attention_layers(model, decoder)
    base = base_model(model, decoder, attentions)
    if routers is None or isinstance(routers, FluxConfig):
        source, (config, modules) = None, _fresh(routers or FluxConfig(), base)
    else:
        source = adapters.resolve(routers, revision)
        config, modules = adapters.load(source, base)
    config = with_options(config, budget, decide)
    if config.granularity == "head" and tensor_parallel_group(decoder) is not None:
        raise UnsupportedModelError("routers of granularity 'head' are not for tensor parallelism: use one process")
    for index, attention in attentions.items():
        weight = next(attention.parameters(), None)  # quantised layers may have none
        if str(index) in modules and weight is not None and weight.device.type != "meta":
            modules[str(index)].to(weight.device)
    routing = Routing(model, decoder, attentions, config, modules, keep_full_kv, cuda_graphs, compile, min_tokens)
    routing.source = source
    try:
        _install(routing, model, decoder, attentions)
    except BaseException:
        routing.detach()
        raise
    return routing


def _fresh(config: FluxConfig, base: BaseModel) -> tuple[FluxConfig, nn.ModuleDict]:
    """Make routers for a configuration, if it wants any."""
    sparse_pattern(config), full_pattern(config)  # a wrong one fails here
    if config.ranking is not None:
        adapters.check_base_model(config, base)
        return replace(config, base_model=base), nn.ModuleDict()
    routers = {str(index): LayerRouter(base.head_dim, config.budget is not None) for index in base.routed_layers}
    return replace(config, base_model=base), nn.ModuleDict(routers)


def _install(routing: Routing, model: nn.Module, decoder: nn.Module, attentions: dict[int, nn.Module]) -> None:
    """Change the model; every change is undone by ``routing.undo``, even if another one cannot be."""
    undo = routing.undo
    undo.callback(routing.release)
    setattr(decoder, HANDLE, routing)
    undo.callback(vars(decoder).pop, HANDLE, None)
    _use_attention(undo, decoder)
    for module in mlps(decoder):
        undo.callback(replace_forward(module, in_chunks))
    if routing.compile:
        for index in attentions:
            undo.callback(replace_forward(decoder.layers[index], compiled_layer))
            for module in readers(decoder.layers[index]):
                _hook(routing, module.register_forward_pre_hook, materialize_input)
    for module in model.modules():  # the model itself, and what generates within a wrapper such as PEFT's
        if module is model or (isinstance(module, GenerationMixin) and _holds(module, decoder)):
            undo.callback(install_generation(module, routing))
        if module is not decoder and isinstance(module, PreTrainedModel) and _is_around(module, decoder):
            undo.callback(replace_forward(module, telling_model))
    query_hooks = QueryHooks(attentions)
    undo.callback(query_hooks.remove)
    routing.own_hooks.add(show_query)

    def begin(kwargs: dict[str, Any]) -> ForwardContext:
        context = routing.begin(kwargs)
        if context.reads_queries:
            query_hooks.renew()
        return context

    undo.callback(replace_forward(decoder, routed_decoder(begin, routing.publish, lambda: routing.is_attached)))
    _hook(routing, decoder.register_forward_pre_hook, refuse_copies(decoder))
    routing.own_hooks.add(enter_attention)
    for attention in attentions.values():
        undo.callback(hook_attention(attention))


def _hook(routing: Routing, register: Callable, hook: Callable) -> None:
    """Register a hook that ``detach`` removes, and that is known as ours."""
    routing.own_hooks.add(hook)
    routing.undo.callback(register(hook).remove)


def _use_attention(undo, decoder: nn.Module) -> None:
    config = cast(PreTrainedConfig, decoder.config)
    before = config._attn_implementation
    if before == NAME:  # copied from an attached model's
        before = "sdpa"
    config._attn_implementation = NAME
    _attached_configs[id(config)] = config
    undo.callback(_attached_configs.pop, id(config), None)
    undo.callback(setattr, config, "_attn_implementation", before)


def _is_around(module: nn.Module, decoder: nn.Module) -> bool:
    """Whether a model holds the decoder beside encoders of other kinds of input, and so may make masks for it."""
    config = module.config
    return config.get_text_config() is not config and _holds(module, decoder)


def _holds(module: nn.Module, decoder: nn.Module) -> bool:
    return any(inner is decoder for inner in module.modules())
