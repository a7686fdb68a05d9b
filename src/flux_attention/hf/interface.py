"""The attention and mask functions that are registered with transformers under the name ``flux``."""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from flux_attention.errors import UnsupportedModelError
from flux_attention.hf import compiled
from flux_attention.hf.context import COMPILED, CONTEXT, NAME, ForwardContext, current, enclosing
from flux_attention.hf.support import hides_nothing

#: Arguments with which models ask their attention function for more than softmax attention.
EXTRAS = ("s_aux", "softcap", "position_bias", "sliding_window")


def attention_function(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Compute attention as models ask for it: routed layers by route, all others by SDPA."""
    context: ForwardContext | None = kwargs.pop(CONTEXT, None)
    is_compiled = kwargs.pop(COMPILED, False)
    extras = [name for name in EXTRAS if kwargs.get(name) is not None]
    if not is_compiled and (context is None or module.layer_idx not in context.routed):
        if "s_aux" in extras:
            raise UnsupportedModelError(
                f"{type(module).__name__} has learned attention sinks in sliding layers, which SDPA does not compute"
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if "sliding_window" in extras and hides_nothing(module.config, kwargs["sliding_window"]):
        extras.remove("sliding_window")
    if attention_mask is not None or kwargs.get("is_causal") is False:
        extras.append("a mask of its own")
    if extras:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks its attention function for {extras}, which routed layers do not compute"
        )
    if dropout:
        raise UnsupportedModelError(f"attention dropout is {dropout}; routed layers support none: set it to 0")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if is_compiled:
        return compiled.attend(query, key, value, scale, module.layer_idx), None
    try:
        return context.attend(module.layer_idx, query, key, value, scale), None
    finally:
        if context.finished:  # computed again, by checkpointing: no hook of the decoder comes to let go of the context
            current.set(None)


def make_mask(*args, mask_function=causal_mask_function, local_size=None, **kwargs):
    """Make no mask for routed layers, whose forward pass knows which tokens are real, and SDPA's for all others."""
    context, outer = current.get(), enclosing.get()
    is_local = local_size is not None and not hides_nothing(kwargs.get("config"), local_size)
    if (context is None and not outer) or is_local:
        return sdpa_mask(*args, mask_function=mask_function, local_size=local_size, **kwargs)
    is_packed = context is not None and context.is_packed  # of which the forward pass knows
    if mask_function is not causal_mask_function and local_size is None and not is_packed:
        raise UnsupportedModelError(
            "the model asks for an attention mask that is not plainly causal (image tokens that attend both ways, or "
            "packed sequences that the call does not tell of); routed layers support causal masks with padding only"
        )
    return None


def register() -> None:
    """Make both functions known to transformers."""
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, make_mask)
