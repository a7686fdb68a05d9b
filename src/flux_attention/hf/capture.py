"""Captures of CUDA graphs: what they depend on, and what must not disturb them."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterable

import torch
from torch import nn

#: One capture at a time: garbage collection is off for all of them.
_CAPTURE = threading.Lock()


@contextlib.contextmanager
def without_collection():
    """Keep Python's garbage collection off, and turn it on again afterwards if it was on."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextlib.contextmanager
def capturing():
    """Let nothing disturb a capture, and leave random numbers to be drawn if it fails."""
    with _CAPTURE:
        gc.collect()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        spare = generator.clone_state()
        with without_collection():  # an old graph, destroyed meanwhile, would end the capture
            try:
                yield
            except BaseException:
                generator.graphsafe_set_state(spare)  # the old state waits for the capture's end for ever
                raise


def captured_state(model: nn.Module, more: Iterable[nn.Module] = ()) -> tuple:
    """List what a graph of a model depends on besides its inputs: where weights lie, autocast, active adapters."""
    adapters = [
        (module.disable_adapters, tuple(module.active_adapters), tuple(module.merged_adapters))
        for module in model.modules()
        if hasattr(module, "merged_adapters")  # layers of PEFT
    ]
    tensors = tuple(
        tensor.data_ptr() for module in (model, *more) for tensor in (*module.parameters(), *module.buffers())
    )
    kind = next(model.parameters()).device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return tensors, autocast, tuple(adapters)
