"""The subclass of a model's class whose ``generate`` has the decode loop, knows the prompt, and takes routes."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from flux_attention.errors import UnsupportedModelError
from flux_attention.hf.context import AttachedModel, GeneratedPrompt, generated_prompt
from flux_attention.hf.generation import loop
from flux_attention.hf.generation.progress import Progress
from flux_attention.hf.report import make_report

#: The methods that ``generate`` decodes with, which first of all compute the prompt.
DECODING_METHODS = ("_sample", "_beam_search", "_assisted_decoding")


def install_generation(model: PreTrainedModel, routing: AttachedModel) -> Callable[[], None]:
    """
    Make a model's class a subclass, of the same name, that generates with routes.

    ``generate`` looks its decoding methods up on the model's class. Everything around them (arguments, other ways of
    decoding, ``pipeline``) stays the stock one.

    Returns
    -------
    callable
        Undoes it, unless the class was changed again meanwhile.
    """
    stock = type(model)

    def is_ours(self) -> bool:  # not another object of the class, nor after ``detach``
        return self is model and routing.is_attached

    def __reduce_ex__(self, protocol):  # by which both copy and pickle take an object apart
        return routing.__reduce__() if is_ours(self) else stock.__reduce_ex__(self, protocol)

    names: dict[str, Any] = {"__reduce_ex__": __reduce_ex__, "__module__": stock.__module__, "__doc__": stock.__doc__}
    if isinstance(model, GenerationMixin):
        names["generate"] = _generate(stock.generate, routing, is_ours)  # ty: ignore[missing-attribute]
        for name in DECODING_METHODS:
            method = getattr(stock, name, None)
            if method is not None:
                names[name] = _decoding_method(method, routing, is_ours)
    ours = model.__class__ = type(stock.__name__, (stock,), names)

    def undo() -> None:
        if type(model) is ours:
            model.__class__ = stock

    return undo


def _generate(stock: Callable, routing: AttachedModel, is_ours: Callable) -> Callable:
    @functools.wraps(stock)
    def generate(self, *args, routes=None, **kwargs):
        if not is_ours(self):
            if routes is not None:
                raise ValueError("routes were given, but this model has no routers attached; attach them, or again")
            return stock(self, *args, **kwargs)
        config = kwargs.get("generation_config") or self.generation_config
        early_exit = kwargs.get("assistant_early_exit", getattr(config, "assistant_early_exit", None))
        if early_exit is not None:  # refused before it changes the model's configuration
            raise UnsupportedModelError(
                f"assistant_early_exit={early_exit} runs some of the layers, which routing does not support; leave it "
                "out, or call detach()"
            )
        with contextlib.nullcontext() if routes is None else routing.force(routes):
            return stock(self, *args, **kwargs)

    return generate


def _decoding_method(stock: Callable, routing: AttachedModel, is_ours: Callable) -> Callable:
    has_loop = stock is GenerationMixin._sample  # a model with a decode loop of its own keeps it

    @functools.wraps(stock)
    def decode(self, input_ids, *args, **kwargs):
        if not is_ours(self):
            return stock(self, input_ids, *args, **kwargs)
        columns = _prompt_columns(input_ids, **kwargs)
        _check_chunks(routing, input_ids, columns, **kwargs)
        cache, progress = kwargs.get("past_key_values"), Progress()
        prompt = GeneratedPrompt(cache, columns, input_ids, kwargs.get("attention_mask"), progress)
        token = generated_prompt.set(prompt)
        try:
            if has_loop:
                result = loop.sample(routing, functools.partial(stock, self), input_ids, *args, **kwargs)
            else:
                result = stock(self, input_ids, *args, **kwargs)
        finally:
            generated_prompt.reset(token)
        ended = time.perf_counter()
        if progress.began is not None:
            sequences = result if isinstance(result, torch.Tensor) else result.sequences
            new_tokens = sequences.shape[1] - input_ids.shape[1]
            times = progress.times(ended, new_tokens)
            routing.publish_report(make_report(routing, cache, progress.past, progress.lengths, new_tokens, *times))
        return result

    return decode


def _prompt_columns(input_ids: torch.Tensor, attention_mask=None, inputs_embeds=None, **kwargs) -> int:
    """Count the columns of the prompt, those that are cached already included."""
    widths = [input_ids.shape[1]]
    if isinstance(attention_mask, torch.Tensor):
        widths.append(attention_mask.shape[1])  # of new tokens alone, the mask is longer
    if inputs_embeds is not None:
        widths.append(inputs_embeds.shape[1])
    return max(widths)


def _check_chunks(
    routing: AttachedModel,
    input_ids,
    columns: int,
    generation_config=None,
    past_key_values=None,
    attention_mask=None,
    **kwargs,
) -> None:
    """Refuse to cut a prompt into chunks that has to be read whole; of a cache that decides anew, the new tokens."""
    size = getattr(generation_config, "prefill_chunk_size", None)
    seen = 0 if past_key_values is None else past_key_values.get_seq_length()
    again = seen and any(getattr(layer, "is_undecided", False) for layer in past_key_values.layers)
    if size is None or columns - seen <= size or (seen and not again):
        return
    is_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
    lengths = attention_mask.sum(1).tolist() if is_mask else [columns] * len(input_ids)
    if reason := routing.needs_whole_prompt(lengths, bool(again)):
        raise UnsupportedModelError(
            f"prefill_chunk_size is {size}, but the prompt's {columns - seen} tokens have to come in one call: "
            f"{reason}; or leave prefill_chunk_size out"
        )
