"""Where tests of Triton kernels run: by Triton's interpreter on a CPU (see conftest), compiled on a GPU."""

import importlib.util

import pytest
import torch

#: Triton's interpreter is on for the whole process or off.
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here, as there is a GPU")
DEVICES = [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]


def patch_language_once_a_launch():
    """
    Make Triton's interpreter faster.

    It replaces the members of ``triton.language`` by interpreted ones at each launch, and, for nothing, again at each
    call of a device function, which takes a third of its time: here, at the first such call of a module in a launch.
    """
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction

    launch, call, patched = GridExecutor.__call__, InterpretedFunction.__call__, set()

    def launch_once(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def call_patched(self, *args, **kwargs):
        module = self.fn.__module__
        if module in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(module)
        return call(self, *args, **kwargs)

    GridExecutor.__call__, InterpretedFunction.__call__ = launch_once, call_patched


if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    patch_language_once_a_launch()
