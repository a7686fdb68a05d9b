"""Hooks and forwards that follow a model's forward calls, set and cleared in one place each.

A call of the decoder makes its context, which is this thread's until the call ends, however it ends. A model around the
decoder tells what it was given. Query modules show their outputs, whatever module stands in their place.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import nn

from flux_attention.errors import UnsupportedModelError
from flux_attention.hf.context import COMPILED, CONTEXT, EnclosingCall, ForwardContext, current, enclosing
from flux_attention.hf.support import query_module

#: Where a layer's index stands on its query module.
LAYER = "flux_layer"
#: Arguments of models around a decoder that tell which tokens are text, and inputs that are not.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
OTHER_INPUTS = ("pixel_values", "pixel_values_videos", "input_features", "mm_encoder_outputs")
#: The number of attention modules' hooks, none that PyTorch gives.
ENTERS = -1


def routed_decoder(
    begin: Callable[[dict], ForwardContext], publish: Callable, is_attached: Callable[[], bool]
) -> Callable[[Callable], Callable]:
    """
    Make what makes a decoder's forward, for ``replace_forward``.

    Parameters
    ----------
    begin : callable
        Makes the context of a call from its keyword arguments.
    publish : callable
        Takes what a context that decided came to.
    is_attached : callable
        Says whether routers are attached still: what was put around this forward may keep it for longer.
    """

    def make(stock: Callable) -> Callable:
        names = list(inspect.signature(stock).parameters)[1:]

        @functools.wraps(stock)
        @torch.compiler.disable(recursive=False)
        def forward(module, *args, **kwargs):
            if not is_attached():
                return stock(module, *args, **kwargs)
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
            if CONTEXT not in kwargs:  # a decode step brings its own
                kwargs[CONTEXT] = begin(kwargs)
            context = kwargs[CONTEXT]
            token = current.set(context)
            try:
                output = stock(module, **kwargs)
            finally:
                current.reset(token)
            finished = context.finish()
            if finished is not None:
                publish(finished)
            return output

        return forward

    return make


def telling_model(stock: Callable) -> Callable:
    """Make the forward of a model around a decoder, which tells what it was given; for ``replace_forward``."""
    names = list(inspect.signature(stock).parameters)[1:]

    @functools.wraps(stock)
    @torch.compiler.disable(recursive=False)
    def forward(module, *args, **kwargs):
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        types = {name: named[name] for name in TOKEN_TYPES if named.get(name) is not None}
        text_only = all(_is_empty(named.get(name)) for name in OTHER_INPUTS)
        text_only = text_only and not any(bool((kinds != 0).any()) for kinds in types.values())
        outer = enclosing.get()
        call = EnclosingCall(named.get("attention_mask"), named.get("input_ids"), text_only)
        if outer and call.input_ids is None:  # called by another model around the decoder, which has told
            call = EnclosingCall(call.attention_mask, outer[-1].input_ids, text_only and outer[-1].text_only)
        if text_only:  # types of which all are text would have masks made for images, in which windows cannot be told
            kwargs = {name: value for name, value in kwargs.items() if name not in types}
        token = enclosing.set((*outer, call))
        try:
            return stock(module, *args, **kwargs)
        finally:
            enclosing.reset(token)

    return forward


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, dict) and not value)


def refuse_copies(decoder: nn.Module) -> Callable:
    """Make a forward pre-hook of the decoder that refuses calls of copies of it, which have the same hooks."""

    def check(module: nn.Module, args: tuple) -> None:
        if module is not decoder:
            raise UnsupportedModelError(
                f"a copy of the {type(decoder).__name__} that has routers attached was called (nn.DataParallel makes "
                "such); attach to each copy, and use one process a GPU"
            )

    return check


def enter_attention(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Make the context that a layer was given this thread's, as gradient checkpointing may be computing it again."""
    if kwargs.get(COMPILED):
        return
    if CONTEXT not in kwargs:
        if current.get() is None:  # a layer that is called alone, or was copied to another model
            return
        raise UnsupportedModelError(
            f"the decoder does not pass keyword arguments on to its attention layers ({type(module).__name__}), so "
            "they cannot be routed; call detach() to use the model as it was"
        )
    current.set(kwargs[CONTEXT])


def hook_attention(module: nn.Module) -> Callable[[], None]:
    """
    Register ``enter_attention`` as a forward pre-hook, and return what removes it.

    PyTorch numbers hooks, and its release 2.10 compiles a layer anew for each number of a hook that takes keyword
    arguments. So all layers' hooks have one number here.
    """
    module._forward_pre_hooks[ENTERS] = enter_attention
    module._forward_pre_hooks_with_kwargs[ENTERS] = True

    def remove() -> None:
        module._forward_pre_hooks.pop(ENTERS, None)
        module._forward_pre_hooks_with_kwargs.pop(ENTERS, None)

    return remove


def show_query(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    """Show a query module's output to the context; a forward hook."""
    layer = getattr(module, LAYER)
    if torch.compiler.is_compiling():
        torch.ops.flux_attention.observe(output, args[0], layer)
        return
    context = current.get()
    if context is not None and context.reads_queries:
        context.observe(layer, output, args[0])


class QueryHooks:
    """
    The hooks on query modules, which go along when such a module is put around, taken away or replaced.

    PEFT does so when an adapter is added, merged or unloaded, and quantisers when they convert a model.

    Parameters
    ----------
    attentions : dict of int to torch.nn.Module
        The routed layers' attention modules.
    """

    def __init__(self, attentions: dict[int, nn.Module]):
        self.attentions = attentions
        self.hooked: dict[int, nn.Module] = {}
        self.renew()

    def renew(self) -> None:
        """
        Hook the modules that shape the queries now.

        Raises
        ------
        UnsupportedModelError
            If there is none.
        """
        for layer, attention in self.attentions.items():
            module = query_module(attention)
            # Behind a user's own hooks, which may change what attention gets.
            if self.hooked.get(layer) is module and next(reversed(module._forward_hooks.values()), None) is show_query:
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
            module.register_forward_hook(show_query)
            self.hooked[layer] = module

    def remove(self) -> None:
        """Remove all hooks."""
        for layer, attention in self.attentions.items():
            for module in (self.hooked.pop(layer, None), query_module(attention)):
                if module is not None:
                    _unhook(module)


def _unhook(module: nn.Module) -> None:
    for key in [key for key, hook in module._forward_hooks.items() if hook is show_query]:
        del module._forward_hooks[key]
    vars(module).pop(LAYER, None)
