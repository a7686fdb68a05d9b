"""Layers that ``torch.compile`` captures as for a user, and runs without code generation."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend


class Counter(CompileCounterWithBackend):
    def __call__(self, graph, inputs, options=None):
        return super().__call__(graph, inputs)


@pytest.fixture
def backend(monkeypatch):
    """What the compiler captures, run without code generation; counts graphs."""
    torch._dynamo.reset()
    counter = Counter("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    # The compiler remembers what it knows of each operator's result: while lengths are symbols, to look it up takes
    # longer than to find it out again. Tests of the real compiler have that as it is.
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield counter
    torch._dynamo.reset()
