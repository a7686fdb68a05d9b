"""Chunked MLPs: a long prompt takes them some tokens at a time, so that their activations do not grow with it."""

from __future__ import annotations

import functools

import torch
from torch import nn

#: Tokens that an MLP takes at a time in prefill: enough to keep a GPU busy.
CHUNK_TOKENS = 16_384
#: Where layers are compiled, each number of chunks is a graph of its own: a prompt longer than so many of
#: ``CHUNK_TOKENS`` is cut into so many, whatever its length, of a multiple of so many tokens each but for the last one.
COMPILED_CHUNKS, ALIGNMENT = 4, 128


def mlps(decoder: nn.Module) -> list[nn.Module]:
    """List the modules whose activations are largest, and which treat every token alike."""
    modules = [getattr(layer, "mlp", None) for layer in decoder.layers]
    return [module for module in modules if isinstance(module, nn.Module)]


def in_chunks(stock):
    """Make the forward of a position-wise module on some tokens at a time, where no gradient is asked for."""

    @functools.wraps(stock)
    def forward(module, states, *args, **kwargs):
        if states.ndim != 3 or torch.is_grad_enabled() or args or kwargs:
            return stock(module, states, *args, **kwargs)
        batch, length = states.shape[:2]
        if torch.compiler.is_compiling():
            whole = batch * length <= COMPILED_CHUNKS * CHUNK_TOKENS or length < COMPILED_CHUNKS * ALIGNMENT
            size = length // (COMPILED_CHUNKS * ALIGNMENT) * ALIGNMENT
            sizes = [size] * (COMPILED_CHUNKS - 1) + [length - (COMPILED_CHUNKS - 1) * size]
        else:
            sizes = max(1, CHUNK_TOKENS // batch)
            whole = length <= sizes
        if whole:
            return stock(module, states)
        results = []
        for chunk in states.split(sizes, dim=1):
            results.append(stock(module, chunk.contiguous()))
            if not isinstance(results[-1], torch.Tensor):  # a mixture of experts that gives its router's logits too
                return stock(module, states)
        return torch.cat(results, dim=1)

    return forward
