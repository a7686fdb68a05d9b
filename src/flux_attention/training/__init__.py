"""Training routers of a frozen model."""

from flux_attention.training.objective import SparsityObjective, temperature

__all__ = ["SparsityObjective", "temperature"]
