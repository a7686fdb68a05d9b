"""The objective of router training: it is the language-modelling loss under a sparsity target for each task class.

Shape suffixes: B batch, L routed layers, C task classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn


def temperature(progress: float, start: float = 1.5, end: float = 1.0, until: float = 0.6) -> float:
    """
    Return the Gumbel-Softmax temperature τ: a cosine from ``start`` to ``end`` over the first ``until`` of training.

    Parameters
    ----------
    progress : float
        Share of the optimiser steps done, 0 to 1.
    """
    share = min(1.0, progress / until)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


class SparsityObjective(nn.Module):
    """
    max over λ, min over θ of L_LM + λ1 · |Ω − t| + λ2 · (Ω − t)², with λ1, λ2 ≥ 0 for each task class.

    Minimise the returned loss over the routers and *maximise* it over this module's parameters
    (``torch.optim.AdamW(objective.parameters(), maximize=True)``), then call ``clamp``.

    Parameters
    ----------
    targets : mapping of str to float
        Target Ω_MSR t of each task class.
    initial : float
        Both multipliers' first value.
    warmup : float
        Share of training over which targets rise linearly from 0; 0 for none.
    """

    def __init__(self, targets: Mapping[str, float], initial: float = 0.0, warmup: float = 0.0):
        super().__init__()
        for name, target in targets.items():
            if not 0 <= target <= 1:
                raise ValueError(f"target of task class {name!r} is {target}, expected a ratio between 0 and 1")
        self.classes = {name: index for index, name in enumerate(targets)}
        self.warmup = warmup
        self.register_buffer("targets_C", torch.tensor(list(targets.values()), dtype=torch.float32))
        self.multipliers_C2 = nn.Parameter(torch.full((len(targets), 2), initial))

    def forward(
        self,
        lm_loss_B: torch.Tensor,
        gates_BL: torch.Tensor,
        classes: list[str],
        progress: float = 1.0,
        targets_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Compute the batch's mean loss.

        Parameters
        ----------
        lm_loss_B : torch.Tensor
            Language-modelling loss of each sequence, nats a token.
        gates_BL : torch.Tensor
            Straight-through decisions, 1 = full attention (``Routing.gates``).
        classes : list of str
            Task class of each sequence.
        progress : float
            Share of training done, for the targets' warm-up.
        targets_B : torch.Tensor, optional
            float32, each sequence's own target; default: that of its class.

        Raises
        ------
        KeyError
            For a task class without a target.
        """
        unknown = sorted(set(classes) - set(self.classes))
        if unknown:
            raise KeyError(f"task classes {unknown} have no target; known classes are {list(self.classes)}")
        index = torch.tensor([self.classes[name] for name in classes], device=lm_loss_B.device)
        rise = min(1.0, progress / self.warmup) if self.warmup > 0 else 1.0
        sparsity_B = 1 - gates_BL.to(lm_loss_B.device).mean(1)
        gap_B = sparsity_B - rise * (self.targets_C[index] if targets_B is None else targets_B.to(index.device))
        lambda_B2 = self.multipliers_C2[index]
        return (lm_loss_B + lambda_B2[:, 0] * gap_B.abs() + lambda_B2[:, 1] * gap_B.square()).mean()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the multipliers at zero or above."""
        self.multipliers_C2.clamp_(min=0)
