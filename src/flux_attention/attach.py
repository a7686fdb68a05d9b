"""Attach layer routers to a stock Hugging Face model, and detach them: the only file that knows transformers' insides.

No model code is copied and no library is patched: hooks on modules, an attention function and a mask function
registered under the name ``flux``, and cache layers of our own in the cache that the caller or ``generate`` made. On
the model object itself, and until ``detach``, the forward of MLPs (and of compiled layers) is wrapped, and its class is
a subclass with our decode loop.

One forward call of the decoder is a ``Call``. It travels to the layers as a keyword argument, so that gradient
checkpointing, which runs layers again, finds it; within a layer a context variable holds it, so that threads do not
mix.

Shape suffixes: B batch, S query length, H query heads, D head dim, L routed layers.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import threading
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from flux_attention import adapters
from flux_attention.cache import RoutedLayer, Tokens
from flux_attention.call import Call, UnsupportedModelError, current
from flux_attention.compiled import COMPILED, READERS, compiled_layer, settle_input
from flux_attention.config import BaseModel, FluxConfig
from flux_attention.patterns import sparse_pattern
from flux_attention.router import LayerRouter
from flux_attention.routes import Routes, RouteSpec, parse_routes

#: The name under which attention and mask functions are registered, and the keyword that carries the call.
NAME = "flux"
CALL = "flux_call"
#: Tokens that a position-wise module takes at a time in prefill: enough to keep a GPU busy.
PIECE = 16_384
#: Where layers are compiled, each number of pieces is a graph of its own: a prompt longer than so many of ``PIECE`` is
#: cut into so many, whatever its length, of a multiple of so many tokens each, but for the last one.
COMPILED_PIECES, ALIGNED = 4, 128
#: Arguments with which models ask their attention function for more than softmax attention.
EXTRAS = ("s_aux", "softcap", "position_bias", "sliding_window")


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """The registered attention function: routed layers by route, all others by SDPA."""
    call: Call | None = kwargs.pop(CALL, None)
    compiled = kwargs.pop(COMPILED, False)
    extras = [name for name in EXTRAS if kwargs.get(name) is not None]
    if not compiled and (call is None or module.layer_idx not in call.routing.layers):
        if "s_aux" in extras:
            raise UnsupportedModelError(
                f"{type(module).__name__} has learned attention sinks in sliding layers, which SDPA does not compute"
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if attention_mask is not None or kwargs.get("is_causal") is False:
        extras.append("a mask of its own")
    if extras:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks its attention function for {extras}, which routed layers do not compute"
        )
    if dropout:
        raise UnsupportedModelError(f"attention dropout is {dropout}; routed layers support none: set it to 0")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if compiled:
        return torch.ops.flux_attention.attend(query, key, value, scale, module.layer_idx), None
    try:
        return call.attend(module.layer_idx, query, key, value, scale), None
    finally:
        if call.finished:  # computed again, by checkpointing: no hook of the decoder comes to let go of the call
            current.set(None)


def _mask(*args, mask_function=causal_mask_function, local_size=None, **kwargs):
    """The registered mask function: none for routed layers, which know their tokens; SDPA's for all others."""
    if current.get() is None or local_size is not None:
        return sdpa_mask(*args, mask_function=mask_function, local_size=local_size, **kwargs)
    if mask_function is not causal_mask_function and current.get().tokens.starts is None:
        raise UnsupportedModelError(
            "the model asks for an attention mask that is not plainly causal (packed sequences told by position_ids, "
            "or bidirectional image tokens); routed layers support causal masks with padding only"
        )
    return None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


# --- The handle -------------------------------------------------------------------------------------------------


class Routing(adapters.AdapterMixin):
    """
    Routers attached to a model; made by ``attach``.

    Attributes
    ----------
    config : FluxConfig
        Pattern, sizes, and the base model's fingerprint.
    routers : torch.nn.ModuleDict
        One ``LayerRouter`` a routed layer, by the layer's index. Not part of the model: ``model.state_dict()``
        and ``model.parameters()`` are the stock ones.
    layers : tuple of int
        The routed layers' indices.
    pattern : Streaming
        What sparse layers compute in prefill.
    routes : Routes or None
        What the last prefill decided.
    forced : what ``force`` takes, or None
        Routes in force.
    temperature : float, torch.Tensor or None
        Of soft decisions, within ``soft``.
    noise : torch.Tensor or None
        Their Gumbel noise, within ``soft``; None draws it.
    cuda_graphs : bool
        Whether ``generate`` may decode by captured steps; may be set at any time.
    min_tokens : int
        Shorter prompts run full; may be set at any time.
    gates : torch.Tensor or None
        In training (``soft``): float32 (B, L) on the CPU, the last forward's straight-through decisions, through
        which gradients flow to the routers.
    """

    call_type = Call

    def __init__(
        self,
        model: PreTrainedModel,
        config: FluxConfig,
        routers: nn.ModuleDict,
        keep_full_kv: bool,
        cuda_graphs: bool,
        compile: bool,
        min_tokens: int,
    ):
        self.model, self.config, self.routers, self.keep_full_kv = model, config, routers, keep_full_kv
        self.cuda_graphs, self.compile, self.min_tokens = cuda_graphs, compile, min_tokens
        self.layers = config.base_model.routed_layers
        self.pattern = sparse_pattern(config)
        self.routes: Routes | None = None
        self.gates: torch.Tensor | None = None
        self.forced: RouteSpec | None = None
        self.temperature: float | torch.Tensor | None = None
        self.noise: torch.Tensor | None = None
        self.steps: dict[int, Any] = {}  # captured decode steps; see ``generation.decode_step``
        self.steps_lock = threading.Lock()
        self._handles: list[Any] = []
        self._stock_forwards: list[tuple[nn.Module, Any]] = []
        self._decoder: nn.Module | None = None
        self._stock_attention: str | None = None

    @property
    def units(self) -> tuple:
        """What is decided on, in the order of routes and gates: the routed layers."""
        return self.layers

    def router(self, unit) -> LayerRouter:
        """The router that decides on ``unit``."""
        return self.routers[str(unit)]

    def __repr__(self) -> str:
        return f"Routing({len(self.layers)} layers of {self.config.base_model.name}, {self.pattern})"

    @contextlib.contextmanager
    def force(self, routes: RouteSpec | None):
        """
        Force the routes of prefills within a ``with`` block; the routers are not run.

        Parameters
        ----------
        routes : str, float, sequence of int, torch.Tensor, or None
            ``"full"``, ``"sparse"``, a ratio Ω_MSR, the indices of the full layers, or (L,) or (B, L) bits; None lets
            the routers decide, also within another ``force``.
        """
        if routes is not None and not isinstance(routes, torch.Tensor):
            parse_routes(routes, 1, self.units)  # a wrong request fails here, not in the next forward
        before, self.forced = self.forced, routes
        try:
            yield self
        finally:
            self.forced = before

    @contextlib.contextmanager
    def soft(self, temperature: float | torch.Tensor, noise: torch.Tensor | None = None):
        """
        Decide by straight-through Gumbel-Softmax within a ``with`` block: for training, without a KV cache.

        Both branches run and gradients flow to the routers. Pass ``prompt_lengths`` (B real tokens each) to the
        model's forward where the sequences hold answers, which routers must not read.

        Parameters
        ----------
        temperature : float or torch.Tensor
            τ of the Gumbel-Softmax.
        noise : torch.Tensor, optional
            float32 (B, L, 2), the Gumbel noise, for decisions that can be repeated; drawn where it is not given.
        """
        before, (self.temperature, self.noise) = (self.temperature, self.noise), (temperature, noise)
        try:
            yield self
        finally:
            self.temperature, self.noise = before

    def reroute(self, cache: DynamicCache) -> None:
        """
        Let the next call with ``cache`` decide routes anew, from that call's tokens.

        Raises
        ------
        ValueError
            Unless attached with ``keep_full_kv=True``: sparse layers have dropped what a full one would need.
        """
        layers = [layer for layer in cache.layers if isinstance(layer, RoutedLayer)]
        if not layers:
            raise ValueError("this cache has no routed layers: it was not filled by a model with routers attached")
        for layer in layers:
            layer.reroute()

    def detach(self) -> None:
        """Restore the stock model exactly. Caches filled while attached cannot be read afterwards."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.steps.clear()
        if self._decoder is not None:
            self.model.__class__ = self._stock_class
            for module, forward in reversed(self._stock_forwards):
                if forward is None:
                    del module.forward
                else:  # accelerate puts one there
                    module.forward = forward
            self._stock_forwards.clear()
            for attention in self._attentions.values():
                del _query_module(attention).flux_layer
            self._decoder.config._attn_implementation = self._stock_attention
            del self._decoder.flux_routing
            self._decoder = None

    @property
    def hooks(self) -> int:
        """Hooks that are ours."""
        return len(self._handles)

    def __deepcopy__(self, memo):
        raise RuntimeError("a model with routers attached cannot be copied: detach, copy, attach to both")

    def __reduce__(self):
        raise RuntimeError("a model with routers attached cannot be pickled: detach first, save routers as an adapter")

    # Hooks.

    def _hook(self, decoder: nn.Module, attentions: dict[int, nn.Module]) -> None:
        self._decoder, self._stock_attention = decoder, decoder.config._attn_implementation
        self._attentions = attentions
        decoder.config._attn_implementation = NAME
        decoder.flux_routing = self
        for module in _position_wise(decoder):
            self._replace_forward(module, _in_pieces)
        for layer, attention in attentions.items():
            _query_module(attention).flux_layer = layer
            if self.compile:
                self._replace_forward(decoder.layers[layer], compiled_layer)
                for name, module in decoder.layers[layer].named_modules():
                    if name.rpartition(".")[2] in READERS:
                        self._handles.append(module.register_forward_pre_hook(settle_input))
        self._stock_class = type(self.model)
        # A model with a decode loop of its own keeps it.
        if getattr(self._stock_class, "_sample", None) is GenerationMixin._sample:
            self.model.__class__ = _with_decode_loop(self._stock_class, self)
        self._add_hooks()

    def _replace_forward(self, module: nn.Module, make) -> None:
        self._stock_forwards.append((module, vars(module).get("forward")))
        module.forward = make(module.forward)

    def _add_hooks(self) -> None:
        decoder = self._decoder
        names = list(inspect.signature(decoder.forward).parameters)

        def before_forward(module, args, kwargs):
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
            if CALL not in kwargs:  # a decode step brings its own
                kwargs[CALL] = self._begin(kwargs)
            current.set(kwargs[CALL])
            return (), kwargs

        def after_forward(module, args, output):
            call = current.get()
            current.set(None)
            if output is not None:  # None: the forward raised
                call.finish()

        self._handles.append(decoder.register_forward_pre_hook(before_forward, with_kwargs=True, prepend=True))
        self._handles.append(decoder.register_forward_hook(after_forward, always_call=True))
        for attention in self._attentions.values():
            self._hook_layer(attention)

    def observe(self, call: Call, layer: int, output: torch.Tensor, source: torch.Tensor) -> None:
        """Let the router of ``layer`` decide from the output and the input of its query module."""
        heads, dim = _query_shape(self._decoder.config, self._attentions[layer])
        call.decide(layer, _query_states(output, call.tokens.width, heads, dim, source))

    def _hook_layer(self, attention: nn.Module) -> None:
        def before_attention(module, args, kwargs):
            if kwargs.get(COMPILED):
                return
            if CALL not in kwargs:
                raise UnsupportedModelError(
                    f"{type(self._decoder).__name__} does not pass keyword arguments on to its attention layers, so "
                    "they cannot be routed; call detach() to use the model as it was"
                )
            current.set(kwargs[CALL])

        def after_query(module, args, output):
            # The layer's index comes from the module: compiled layers share one graph, and so this hook.
            if torch.compiler.is_compiling():
                torch.ops.flux_attention.decide(output, args[0], module.flux_layer)
                return
            call = current.get()
            if call is not None and call.decides:
                self.observe(call, module.flux_layer, output, args[0])

        self._handles.append(attention.register_forward_pre_hook(before_attention, with_kwargs=True))
        self._handles.append(_query_module(attention).register_forward_hook(after_query))

    def _begin(self, kwargs: dict[str, Any]) -> Call:
        """Check a forward call's arguments, put routed layers into its cache, and describe it."""
        implementation = self._decoder.config._attn_implementation
        if implementation != NAME:
            raise RuntimeError(
                f"the model's attention implementation was changed to {implementation!r} while routers were attached; "
                "detach first, and attach again after changing it"
            )
        if kwargs.get("output_attentions") or getattr(self._decoder.config, "output_attentions", False):
            raise UnsupportedModelError(
                "output_attentions=True: routed layers do not compute attention weights; call without it, or detach"
            )
        inputs = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
        if inputs is None:
            raise ValueError("the model was called without input_ids or inputs_embeds")
        batch, width = inputs.shape[:2]
        if batch == 0 or width == 0:
            raise ValueError(f"the input is empty: {batch} sequences of {width} tokens; expected at least one token")
        packed = kwargs.pop("sequence_lengths", None)
        if packed is not None:
            tokens, cache = self._packed_tokens(packed, kwargs, batch, width), None
        else:
            cache = self._cache(kwargs)
            seen = 0 if cache is None else cache.layers[self.layers[0]].seen
            tokens = self._tokens(kwargs.get("attention_mask"), batch, width, seen, cache)
        batch = len(tokens.lengths)
        prompt_lengths = kwargs.pop("prompt_lengths", None)
        if prompt_lengths is None:
            prompt_lengths = tokens.lengths
        else:
            prompt_lengths = [int(length) for length in prompt_lengths]
            if len(prompt_lengths) != batch or any(
                not 1 <= length <= most for length, most in zip(prompt_lengths, tokens.lengths, strict=False)
            ):
                raise ValueError(
                    f"prompt_lengths is {prompt_lengths}, expected {batch} numbers of tokens between 1 and the "
                    f"sequences' lengths {tokens.lengths}"
                )
        layers = {} if cache is None else {index: cache.layers[index] for index in self.layers}
        call = self.call_type(self, tokens, prompt_lengths, layers)
        if call.soft and cache is not None:
            raise ValueError("soft routing is for training and keeps no KV cache; pass use_cache=False")
        for cached in call.layers.values():
            cached.expect(tokens)
        return call

    def _cache(self, kwargs: dict[str, Any]) -> DynamicCache | None:
        cache = kwargs.get("past_key_values")
        config = self._decoder.config
        if cache is None:
            use_cache = kwargs.get("use_cache")
            use_cache = getattr(config, "use_cache", True) if use_cache is None else use_cache
            if self.temperature is not None or (self._decoder.training and self._checkpoints()):
                kwargs["use_cache"] = use_cache = False
            if not use_cache:
                return None
            cache = kwargs["past_key_values"] = DynamicCache(config=config)
        if type(cache) is not DynamicCache or cache.offloading:
            kind = f"offloaded {type(cache).__name__}" if getattr(cache, "offloading", False) else type(cache).__name__
            raise UnsupportedModelError(
                f"past_key_values is a {kind}; routed layers need a DynamicCache, which generate() makes by default "
                "(no cache_implementation)"
            )
        if config.num_hidden_layers != self.config.base_model.num_layers:
            raise UnsupportedModelError(
                f"the call runs {config.num_hidden_layers} of {self.config.base_model.num_layers} layers (early exit), "
                "which routing does not support"
            )
        missing = config.num_hidden_layers - len(cache.layers)
        cache.layers.extend(DynamicLayer() for _ in range(missing))
        for index in self.layers:
            layer = cache.layers[index]
            if isinstance(layer, RoutedLayer):
                if (layer.sink, layer.window) != (self.pattern.sink, self.pattern.window):
                    raise ValueError(
                        f"this KV cache was made with sink {layer.sink} and window {layer.window}, the attached "
                        f"routers use {self.pattern.sink} and {self.pattern.window}; start from a new cache"
                    )
            elif layer.get_seq_length():
                raise ValueError("past_key_values was filled before routers were attached; start from an empty cache")
            else:
                cache.layers[index] = RoutedLayer(self.pattern, self.keep_full_kv)
        layers = [cache.layers[index] for index in self.layers]
        if len({layer.seen for layer in layers}) > 1 or any(layer.unstored is not None for layer in layers):
            raise ValueError(
                "this KV cache was left half-filled by a call that failed or was interrupted; start from a new cache"
            )
        return cache

    def _checkpoints(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self._decoder.modules())

    def _packed_tokens(self, lengths: Any, kwargs: dict[str, Any], batch: int, width: int) -> Tokens:
        """Of a call with ``sequence_lengths``: one row of sequences, none of which sees another."""
        lengths = [int(length) for length in lengths]
        if batch != 1 or min(lengths, default=0) < 1 or sum(lengths) != width:
            raise ValueError(
                f"sequence_lengths is {lengths} for an input of {batch} rows of {width} tokens, expected one row that "
                "holds the sequences behind one another"
            )
        if kwargs.get("position_ids") is None:
            raise ValueError("packed sequences need position_ids that start at 0 in each")
        if kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
            raise UnsupportedModelError("packed sequences take no attention_mask and no past_key_values")
        types = getattr(self._decoder.config, "layer_types", None) or []
        if len(lengths) > 1 and set(types) - {"full_attention", "sliding_attention"}:
            raise UnsupportedModelError(
                f"{type(self._decoder).__name__} has layers of the kinds {sorted(set(types))}: those that are not "
                "attention would mix packed sequences; pass one sequence a row"
            )
        kwargs["use_cache"] = False
        return Tokens.packed(lengths)

    def _tokens(self, mask: Any, batch: int, width: int, seen: int, cache: DynamicCache | None) -> Tokens:
        lengths = cache.layers[self.layers[0]].lengths if seen else [0] * batch
        if len(lengths) != batch:
            raise ValueError(f"the KV cache holds {len(lengths)} sequences, the input {batch}")
        if mask is None:
            return Tokens.all_real(batch, width)
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            kind = f"a tensor of {mask.ndim} dimensions" if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise UnsupportedModelError(
                f"attention_mask is {kind}; routed layers support a padding mask (batch, tokens) only, 1 = real"
            )
        if mask.shape != (batch, seen + width):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, expected ({batch}, {seen + width}): a column for each "
                f"of the {seen} cached and {width} new tokens"
            )
        mask = mask != 0
        if seen and mask[:, :seen].sum(1).tolist() != lengths:
            raise ValueError(
                "attention_mask differs from the earlier calls' on tokens that are already in the KV cache; "
                "append columns to the mask, do not change it"
            )
        tokens = Tokens.from_mask(mask[:, seen:])
        if not seen and min(tokens.lengths) == 0:
            raise ValueError(
                f"attention_mask hides every token of sequence {tokens.lengths.index(0)} in the first call, so it "
                "cannot be routed; expected a real token in each (with chunked prefill of a left-padded batch, use a "
                "larger chunk, or pad on the right)"
            )
        return tokens


def _query_module(attention: nn.Module) -> nn.Module | None:
    """The last module that shapes the query before rotary embedding."""
    for name in ("q_norm", "q_proj", "qkv_proj"):
        module = getattr(attention, name, None)
        if isinstance(module, nn.Module):
            return module
    return None


def _query_shape(config, attention: nn.Module) -> tuple[int, int]:
    """(H, D) of a layer."""
    heads = config.num_attention_heads
    return heads, getattr(attention, "head_dim", None) or config.hidden_size // heads


def _query_states(output: torch.Tensor, length: int, heads: int, dim: int, source: torch.Tensor) -> torch.Tensor:
    """
    A query module's output as (B, S, H, D).

    Models differ: (B, S, ≥ H·D) with the query first, (B, S, H, D), or (B, H, S, D). Where S = H the last two look
    alike; the memory order of the module's input, a view of the projection, then tells them apart.
    """
    if output.ndim == 3:
        return output[..., : heads * dim].unflatten(-1, (heads, dim))
    if output.shape[1] == output.shape[2]:
        heads_first = source.stride(1) < source.stride(2)
    else:
        heads_first = output.shape[1] == heads and output.shape[2] == length
    return output.transpose(1, 2) if heads_first else output


def _position_wise(decoder: nn.Module) -> list[nn.Module]:
    """The modules whose activations are largest, and which treat every token alike: each layer's MLP."""
    modules = [getattr(layer, "mlp", None) for layer in decoder.layers]
    return [module for module in modules if isinstance(module, nn.Module)]


def _in_pieces(stock):
    """The forward of a position-wise module on some tokens at a time, so that its activations do not grow with S."""

    @functools.wraps(stock)
    def forward(states, *args, **kwargs):
        if states.ndim != 3 or torch.is_grad_enabled() or args or kwargs:
            return stock(states, *args, **kwargs)
        batch, length = states.shape[:2]
        if torch.compiler.is_compiling():
            whole = batch * length <= COMPILED_PIECES * PIECE or length < COMPILED_PIECES * ALIGNED
            size = length // (COMPILED_PIECES * ALIGNED) * ALIGNED
            sizes = [size] * (COMPILED_PIECES - 1) + [length - (COMPILED_PIECES - 1) * size]
        else:
            sizes = max(1, PIECE // batch)
            whole = length <= sizes
        if whole:
            return stock(states)
        results = []
        for piece in states.split(sizes, dim=1):
            results.append(stock(piece.contiguous()))
            if not isinstance(results[-1], torch.Tensor):  # a mixture of experts that gives its router's logits too
                return stock(states)
        return torch.cat(results, dim=1)

    return forward


def _with_decode_loop(stock: type, routing: Routing) -> type:
    """
    A subclass, of the same name, whose greedy and sampled decoding is ours.

    ``generate`` looks its loop up on the model's class. Everything around the loop (arguments, other ways of decoding,
    ``pipeline``) stays the stock one.
    """

    @functools.wraps(stock._sample)
    def _sample(self, *args, **kwargs):
        from flux_attention import generation  # which builds on this module

        return generation.sample(routing, functools.partial(stock._sample, self), *args, **kwargs)

    names = {
        "_sample": _sample,
        "__deepcopy__": lambda self, memo: routing.__deepcopy__(memo),
        "__reduce_ex__": lambda self, protocol: routing.__reduce__(),
        "__module__": stock.__module__,
        "__doc__": stock.__doc__,
    }
    return type(stock.__name__, (stock,), names)


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens that the model's positions reach to; None if its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


# --- Attach -----------------------------------------------------------------------------------------------------


def _find_decoder(model: nn.Module) -> nn.Module:
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


def _full_attention_layers(decoder: nn.Module) -> dict[int, nn.Module]:
    """The attention modules that see the whole context, by layer index."""
    config = decoder.config
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{config.model_type} uses multi-head latent attention (MLA), whose KV cache is compressed across heads; "
            "routers support ordinary and grouped-query attention"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise UnsupportedModelError(f"{config.model_type} caps attention logits, which routed layers do not compute")
    types = getattr(config, "layer_types", None)
    found = {}
    for index, layer in enumerate(decoder.layers):
        attention = getattr(layer, "self_attn", None)
        if attention is None or getattr(attention, "layer_idx", None) != index:
            continue
        if hasattr(layer, "encoder_attn"):
            raise UnsupportedModelError(f"{config.model_type} attends to an encoder; routers need a decoder-only model")
        if types is not None:
            full = types[index] == "full_attention"
        else:
            full = not (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))
        if full:
            found[index] = attention
    if not found:
        raise UnsupportedModelError(
            f"{config.model_type} has no layer with full softmax attention (all are sliding-window or linear), "
            "so there is nothing to route"
        )
    for index, attention in found.items():
        _check_attention(config, index, attention)
    return found


def _check_attention(config, index: int, attention: nn.Module) -> None:
    where = f"layer {index} of {config.model_type} ({type(attention).__name__})"
    if _query_module(attention) is None:
        raise UnsupportedModelError(f"{where} has none of q_norm, q_proj, qkv_proj, so its query cannot be read")
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(attention.forward).parameters.values()):
        raise UnsupportedModelError(f"{where} does not pass keyword arguments on to its attention function")
    if getattr(attention, "sinks", None) is not None:
        raise UnsupportedModelError(f"{where} has learned attention sinks, which routed layers do not compute")
    if getattr(attention, "is_kv_shared_layer", False):
        raise UnsupportedModelError(f"{where} reads another layer's KV cache, which routing per layer does not allow")
    heads, dim = _query_shape(config, attention)
    projection = getattr(attention, "q_proj", None)
    width = getattr(projection, "out_features", None)
    if getattr(attention, "q_norm", None) is None and width is not None and width != heads * dim:
        raise UnsupportedModelError(f"{where} projects {width} query features, expected {heads} heads × {dim}")


def _base_model(model: nn.Module, decoder: nn.Module, attentions: dict[int, nn.Module]) -> BaseModel:
    config = decoder.config
    heads, dim = _query_shape(config, next(iter(attentions.values())))
    return BaseModel(
        name=getattr(model.config, "_name_or_path", "") or type(model).__name__,
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=dim,
        vocab_size=config.vocab_size,
        routed_layers=tuple(attentions),
        sample=_sample(model),
    )


def _sample(model: nn.Module) -> tuple[float, ...] | None:
    """Four embedding weights of four rows, in four digits."""
    weight = model.get_input_embeddings().weight
    if weight.device.type == "meta" or not weight.is_floating_point() or weight.ndim != 2:
        return None
    rows = torch.linspace(0, len(weight) - 1, 6, device=weight.device).long()[1:-1]
    return tuple(float(f"{value:.4g}") for value in weight.detach()[rows, :4].float().flatten().tolist())


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
    forward call with an empty cache (the prompt, or its first chunk) and kept for the cache's life, further turns
    included.

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
        stay so for the cache's life, and of a prompt that comes in chunks the first one counts: keep this below
        ``prefill_chunk_size``. Training does not look at it.

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
    adapters.AdapterError
        If the adapter is missing, damaged, or made for another model.
    """
    decoder = _find_decoder(model)
    if hasattr(decoder, "flux_routing"):
        raise RuntimeError("routers are attached to this model already; call detach() on their handle first")
    if not isinstance(min_tokens, int) or min_tokens < 0:
        raise ValueError(f"min_tokens is {min_tokens!r}, expected a number of tokens, 0 or more")
    if decoder.config._attn_implementation == NAME:
        raise RuntimeError(
            "this model shares its config object with a model that has routers attached; detach those first, or give "
            "the model a config of its own (copy.deepcopy)"
        )
    attentions = _full_attention_layers(decoder)
    if not getattr(model, "_supports_sdpa", True):  # attention of a kind that SDPA, and so our kernels, cannot compute
        raise UnsupportedModelError(f"{type(model).__name__} does not support SDPA attention, so it cannot be routed")
    base = _base_model(model, decoder, attentions)
    if routers is None or isinstance(routers, FluxConfig):
        config = replace(routers or FluxConfig(), base_model=base)
        modules = nn.ModuleDict(
            {
                str(index): LayerRouter(_query_shape(decoder.config, attention)[1])
                for index, attention in attentions.items()
            }
        )
    else:
        config, modules = adapters.load(routers, base, revision)
    for index, attention in attentions.items():
        device = next(attention.parameters()).device
        if device.type != "meta":
            modules[str(index)].to(device)
    kind = Routing
    if config.granularity == "head":
        from flux_attention.heads import HeadRouting as kind  # which builds on this module
    routing = kind(model, config, modules, keep_full_kv, cuda_graphs, compile, min_tokens)
    routing._hook(decoder, attentions)
    return routing
