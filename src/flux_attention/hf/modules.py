"""Changes to a model's modules that can be undone, whatever else happened to the modules meanwhile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType

from torch import nn


def replace_forward(module: nn.Module, make: Callable[[Callable], Callable]) -> Callable[[], None]:
    """
    Let another forward run instead of a module's.

    Parameters
    ----------
    module : torch.nn.Module
        The forward becomes an attribute of this object; a copy of it runs the new forward on its own weights.
    make : callable
        Makes the new forward of the one before; both take the module as their first argument.

    Returns
    -------
    callable
        Undoes it. Where yet another forward was put in front meanwhile, that one stays.
    """
    before = vars(module).get("forward")  # accelerate puts one there
    if before is None:
        stock = type(module).forward
    else:

        @functools.wraps(before)
        def stock(module, *args, **kwargs):
            return before(*args, **kwargs)

    ours = vars(module)["forward"] = MethodType(make(stock), module)

    def undo() -> None:
        if vars(module).get("forward") is not ours:
            return
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before

    return undo
