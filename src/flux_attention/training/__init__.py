"""Trains routers on a frozen model: the method's objective, data, and transformers' Trainer around them."""

from flux_attention.errors import RecipeError
from flux_attention.training.objective import SparsityObjective, temperature

__all__ = ["Recipe", "RecipeError", "RouterTrainer", "SparsityObjective", "load_data", "temperature", "train"]

_HOMES = {"Recipe": "recipe", "RouterTrainer": "trainer", "load_data": "data", "train": "run"}


def __getattr__(name: str):
    # Late, as transformers' Trainer takes seconds to import.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
