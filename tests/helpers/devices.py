"""Where tests of Triton kernels run: by Triton's interpreter on a CPU (see conftest), compiled on a GPU."""

import dataclasses
import functools
import importlib.util
import math

import pytest
import torch

#: Triton's interpreter is on for the whole process or off.
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here, as there is a GPU")
DEVICES = [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]


def make_the_interpreter_faster():
    """
    Take out what Triton's interpreter does for nothing, which is most of its time.

    - It replaces the members of ``triton.language`` by interpreted ones at each launch, and again at each call of a
      device function: here, at the first such call of a module in a launch.
    - It computes whether each integer operation overflows, and looks at that in debug mode only.
    - It makes the shape of each tensor, with its type, its name and a list of all dtypes for each look-up: here, once.
    """
    from triton.language import core
    from triton.runtime import interpreter

    launch, call = interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__
    patched = set()

    def launch_once(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def call_patched(self, *args, **kwargs):
        module = self.fn.__module__
        if module in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(module)
        return call(self, *args, **kwargs)

    @functools.cache
    def shape_of(sizes):
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))

    def make_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_of(type.shape if type.is_block() else ())

    numpy_dtype, pointer = functools.cache(interpreter._get_np_dtype), core.uint64  # pointers cannot be hashed

    interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__ = launch_once, call_patched
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    core.tensor.__init__ = make_tensor
    interpreter._get_np_dtype = lambda type: numpy_dtype(pointer if type.scalar.is_ptr() else type.scalar)


if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    make_the_interpreter_faster()
