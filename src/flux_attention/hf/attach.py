"""Attach layer routers to a stock Hugging Face model: find, check, install; ``detach`` undoes it.

No model code is copied and no library is patched: hooks on modules, functions registered under the name ``flux``, and
cache layers of our own in the cache that the caller or ``generate`` made. On the model object itself, and until
``detach``, the forward of MLPs (and of compiled layers) is wrapped, and its class is a subclass.
"""

from __future__ import annotations

import inspect
import os
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flux_attention import adapters
from flux_attention.config import FluxConfig
from flux_attention.errors import UnsupportedModelError
from flux_attention.hf.compiled import compiled_layer, materialize_input, readers
from flux_attention.hf.context import COMPILED, CONTEXT, NAME, EnclosingCall, current, enclosing
from flux_attention.hf.generation.install import install_generation
from flux_attention.hf.handle import Routing
from flux_attention.hf.interface import register
from flux_attention.hf.mlp import in_pieces, mlps
from flux_attention.hf.modules import replace_forward
from flux_attention.hf.support import (
    QueryShape,
    base_model,
    find_decoder,
    full_attention_layers,
    query_module,
)
from flux_attention.patterns import full_pattern, sparse_pattern
from flux_attention.router import LayerRouter

#: Where the handle stands on an attached decoder, and a layer's index on its query module.
HANDLE, LAYER = "flux_routing", "flux_layer"
#: Arguments of models around a decoder that tell which tokens are text, and inputs that are not.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
OTHER_INPUTS = ("pixel_values", "pixel_values_videos", "input_features", "mm_encoder_outputs")
#: The configurations of attached models: two models that share one cannot be told apart by transformers.
_attached_configs: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def attach(
    model: PreTrainedModel,
    routers: str | os.PathLike | FluxConfig | None = None,
    *,
    revision: str | None = None,
    keep_full_kv: bool = False,
    cuda_graphs: bool = True,
    compile: bool = False,
    min_tokens: int = 0,
) -> Routing:
    """
    Attach layer routers to a frozen causal language model.

    Every layer with full attention gets a router; sliding-window and linear layers are left alone. The model's own
    API stays as it is: ``forward``, ``generate``, ``pipeline``. Each sequence's routes are decided by the first
    forward call with an empty cache, the prompt, and kept for the cache's life, further turns included.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder-only causal LM, or a vision-language model with such a text decoder. fp32, bf16 or fp16.
    routers : str, os.PathLike or FluxConfig, optional
        Trained routers as a directory or a Hub id, or a configuration for fresh ones, which route everything to
        full attention. Default: ``FluxConfig()``.
    revision : str, optional
        Branch, tag or commit of a Hub repository.
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
        If the configuration names no pattern that there is, or sizes that it does not have.
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
    attentions = full_attention_layers(model, decoder)
    base = base_model(model, decoder, attentions)
    if routers is None or isinstance(routers, FluxConfig):
        config = replace(routers or FluxConfig(), base_model=base)
        sparse_pattern(config), full_pattern(config)  # a wrong one fails here
        modules = nn.ModuleDict(
            {
                str(index): LayerRouter(QueryShape.of(decoder.config, attention).dim)
                for index, attention in attentions.items()
            }
        )
    else:
        config, modules = adapters.load(routers, base, revision)
    for index, attention in attentions.items():
        weight = next(attention.parameters(), None)  # quantised layers may have none
        if weight is not None and weight.device.type != "meta":
            modules[str(index)].to(weight.device)
    routing = Routing(model, decoder, attentions, config, modules, keep_full_kv, cuda_graphs, compile, min_tokens)
    try:
        _install(routing, model, decoder, attentions)
    except BaseException:
        routing.detach()
        raise
    return routing


def _install(routing: Routing, model: nn.Module, decoder: nn.Module, attentions: dict[int, nn.Module]) -> None:
    """Change the model; every change is undone by ``routing.undo``, even if another one cannot be."""
    undo = routing.undo
    undo.callback(routing.release)
    setattr(decoder, HANDLE, routing)
    undo.callback(vars(decoder).pop, HANDLE, None)
    _use_attention(undo, decoder)
    for module in mlps(decoder):
        undo.callback(replace_forward(module, in_pieces))
    if routing.compile:
        for index in attentions:
            undo.callback(replace_forward(decoder.layers[index], compiled_layer))
            for module in readers(decoder.layers[index]):
                routing.add_hook(module.register_forward_pre_hook(materialize_input))
    undo.callback(install_generation(model, routing))
    for module in model.modules():
        if module is not decoder and isinstance(module, PreTrainedModel) and _is_around(module, decoder):
            routing.add_hook(module.register_forward_pre_hook(_enter_enclosing, with_kwargs=True))
            routing.add_hook(module.register_forward_hook(_leave_enclosing, always_call=True))
    query_hooks = QueryHooks(routing, attentions)
    routing.hooks += len(attentions)
    _hook_decoder(routing, decoder, query_hooks)
    for attention in attentions.values():
        routing.add_hook(attention.register_forward_pre_hook(_enter_attention, with_kwargs=True))


def _use_attention(undo, decoder: nn.Module) -> None:
    config, before = decoder.config, decoder.config._attn_implementation
    if before == NAME:  # copied from an attached model's
        before = "sdpa"
    config._attn_implementation = NAME
    _attached_configs[id(config)] = config
    undo.callback(_attached_configs.pop, id(config), None)
    undo.callback(setattr, config, "_attn_implementation", before)


def _is_around(module: nn.Module, decoder: nn.Module) -> bool:
    """Whether a model holds the decoder beside encoders of other kinds of input, and so may make masks for it."""
    config = module.config
    return config.get_text_config() is not config and any(inner is decoder for inner in module.modules())


# --- Hooks ----------------------------------------------------------------------------------------------------------


def _enter_enclosing(module, args, kwargs):
    named = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
    types = {name: named[name] for name in TOKEN_TYPES if named.get(name) is not None}
    text_only = all(named.get(name) is None for name in OTHER_INPUTS)
    text_only = text_only and not any(bool((kinds != 0).any()) for kinds in types.values())
    outer = enclosing.get()
    call = EnclosingCall(named.get("attention_mask"), named.get("input_ids"), text_only)
    if outer and call.input_ids is None:  # called by another enclosing model, which has told what it was given
        call = EnclosingCall(call.attention_mask, outer[-1].input_ids, text_only and outer[-1].text_only)
    enclosing.set((*outer, call))
    if text_only:  # types of which all are text would have masks made for images, in which windows cannot be told
        kwargs = {name: value for name, value in kwargs.items() if name not in types}
    return args, kwargs


def _leave_enclosing(module, args, output):
    enclosing.set(enclosing.get()[:-1])


def _enter_attention(module, args, kwargs):
    if kwargs.get(COMPILED):
        return
    if CONTEXT not in kwargs:
        raise UnsupportedModelError(
            f"the decoder does not pass keyword arguments on to its attention layers ({type(module).__name__}), so "
            "they cannot be routed; call detach() to use the model as it was"
        )
    current.set(kwargs[CONTEXT])


def _hook_decoder(routing: Routing, decoder: nn.Module, query_hooks: QueryHooks) -> None:
    names = list(inspect.signature(decoder.forward).parameters)

    def before_forward(module, args, kwargs):
        if module is not decoder:
            raise UnsupportedModelError(
                f"a copy of the {type(decoder).__name__} that has routers attached was called (nn.DataParallel makes "
                "such); attach to each copy, and use one process a GPU"
            )
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        if CONTEXT not in kwargs:  # a decode step brings its own
            kwargs[CONTEXT] = routing.begin(kwargs)
            if kwargs[CONTEXT].reads_queries:
                query_hooks.renew()
        current.set(kwargs[CONTEXT])
        return (), kwargs

    def after_forward(module, args, output):
        context = current.get()
        current.set(None)
        if output is not None and context is not None:  # None: the forward raised
            finished = context.finish()
            if finished is not None:
                routing.publish(finished)

    routing.add_hook(decoder.register_forward_pre_hook(before_forward, with_kwargs=True, prepend=True))
    routing.add_hook(decoder.register_forward_hook(after_forward, always_call=True))


class QueryHooks:
    """
    The hooks on query modules, which go along when such a module is put around, taken away or replaced.

    PEFT does so when an adapter is added, merged or unloaded, and quantisers when they convert a model.

    Parameters
    ----------
    routing : Routing
    attentions : dict of int to torch.nn.Module
        The routed layers' attention modules.
    """

    def __init__(self, routing: Routing, attentions: dict[int, nn.Module]):
        self.routing, self.attentions = routing, attentions
        self.hooked: dict[int, nn.Module] = {}
        routing.undo.callback(self.remove)
        self.renew()

    def renew(self) -> None:
        """Hook the modules that shape the queries now."""
        for layer, attention in self.attentions.items():
            module = query_module(attention)
            if self.hooked.get(layer) is module:
                continue
            if module is None:
                raise UnsupportedModelError(
                    f"the query module of layer {layer} was taken away while routers were attached; detach, and attach "
                    "again"
                )
            if layer in self.hooked:
                _unhook(self.hooked[layer])
            _unhook(module)  # a quantiser copies hooks to the module that it puts in another's place
            # The layer's index comes from the module: compiled layers share one graph, and so this hook.
            setattr(module, LAYER, layer)
            module.register_forward_hook(_after_query)
            self.hooked[layer] = module

    def remove(self) -> None:
        """Remove all hooks."""
        for layer, attention in self.attentions.items():
            for module in (self.hooked.pop(layer, None), query_module(attention)):
                if module is not None:
                    _unhook(module)


def _unhook(module: nn.Module) -> None:
    for key in [key for key, hook in module._forward_hooks.items() if hook is _after_query]:
        del module._forward_hooks[key]
    vars(module).pop(LAYER, None)


def _after_query(module, args, output):
    layer = getattr(module, LAYER)
    if torch.compiler.is_compiling():
        torch.ops.flux_attention.observe(output, args[0], layer)
        return
    context = current.get()
    if context is not None and context.reads_queries:
        context.observe(layer, output, args[0])
