"""Computes a pack's objective in the one module that a Trainer wraps: a frozen model with routers and multipliers.

Shape suffixes: N sequences of a pack, S tokens of a pack, P labelled positions, L routed layers, D hidden size.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flux_attention.hf.handle import Routing
from flux_attention.hf.support import check_head
from flux_attention.training.objective import SparsityObjective

#: The operations that compute attention, dense and by our own kernels.
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "flux_attention::streaming",
    "flux_attention::packed",
}
#: Label positions whose logits are in memory at a time.
CHUNK = 2048


def keep_attention():
    """
    Return what makes gradient checkpointing keep the outputs of attention, both branches', and compute all else again.

    They take as little memory as the hidden states between layers, and of a long pack's work they are most.
    """

    def policy(context, operation, *args, **kwargs) -> CheckpointPolicy:
        kept = operation.name() in ATTENTION
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def label_losses(head: nn.Module, hidden_PD: torch.Tensor, targets_P: torch.Tensor) -> torch.Tensor:
    """
    Compute the loss in nats at the positions that carry a label: the head runs there only, some at a time.

    Parameters
    ----------
    head : torch.nn.Module
        From hidden states to logits.
    hidden_PD, targets_P : torch.Tensor
        Hidden states, and the tokens that come after them.

    Returns
    -------
    torch.Tensor
        float32 (P,).
    """

    def chunk(hidden, targets):
        return F.cross_entropy(head(hidden).float(), targets, reduction="none")

    parts = zip(hidden_PD.split(CHUNK), targets_P.split(CHUNK), strict=True)
    return torch.cat([checkpoint(chunk, hidden, targets, use_reentrant=False) for hidden, targets in parts])


class RoutedTraining(nn.Module):
    """
    Holds a frozen model with routers and multipliers, as the one module that a Trainer wraps.

    Parameters
    ----------
    routing : Routing
        Routers attached to the model.
    objective : SparsityObjective
        With a target for every task class.
    """

    def __init__(self, routing: Routing, objective: SparsityObjective):
        super().__init__()
        self.routing = routing
        self.backbone = routing.model.requires_grad_(False)
        self.routers, self.objective = routing.routers, objective
        self.names = list(objective.classes)
        check_head(routing)
        # Checkpointing needs training mode, in which a frozen model is to compute what it computes at inference.
        self._before = (self.backbone.training, self.backbone.config.use_cache, [])
        for module in self.backbone.modules():
            names = ["p"] if isinstance(module, nn.Dropout) else ["attention_dropout", "router_jitter_noise"]
            for name in names:
                if getattr(module, name, None):
                    self._before[2].append((module, name, getattr(module, name)))
                    setattr(module, name, 0.0)

    def release(self) -> None:
        """Leave the backbone as it was: its mode, its dropout, gradient checkpointing off."""
        mode, use_cache, dropouts = self._before
        self.backbone.train(mode)
        self.backbone.config.use_cache = use_cache
        if any(getattr(module, "gradient_checkpointing", False) for module in self.backbone.modules()):
            self.backbone.gradient_checkpointing_disable()
        for module, name, value in dropouts:
            setattr(module, name, value)

    @property
    def config(self):
        """The backbone's configuration."""
        return self.backbone.config

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        sequence_lengths: torch.Tensor,
        prompt_lengths: torch.Tensor,
        classes: torch.Tensor,
        temperature: float,
        noise: torch.Tensor,
        progress: float,
        budgets: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Compute the objective of one pack (see ``packing.collate``); ``budgets`` (N,) are the sequences' own targets.

        Returns
        -------
        dict
            ``loss``: the sequences' mean; ``lm_loss_N``: float32, nats a labelled token; ``gates_NL``.
        """
        with self.routing.soft(temperature, noise, budgets):
            hidden_SD = (
                self.backbone.get_decoder()(
                    input_ids=input_ids,
                    position_ids=position_ids,
                    use_cache=False,
                    sequence_lengths=sequence_lengths.tolist(),
                    prompt_lengths=prompt_lengths.tolist(),
                )
                .last_hidden_state[0]
                .contiguous()
            )
        # Position s predicts the token at s + 1; no label stands on a sequence's first token.
        places = (labels[0, 1:] != -100).nonzero()[:, 0]
        losses_P = label_losses(self.backbone.get_output_embeddings(), hidden_SD[places], labels[0, 1:][places])
        count = len(sequence_lengths)
        owner_S = torch.arange(count, device=places.device).repeat_interleave(
            sequence_lengths.to(places.device), output_size=labels.shape[1]
        )
        owner_P = owner_S[places + 1]
        total_N = torch.zeros(count, device=places.device).index_add(0, owner_P, losses_P)
        lm_loss_N = total_N / owner_P.bincount(minlength=count)
        gates_NL = self.routing.gates.to(lm_loss_N.device)
        names = [self.names[index] for index in classes.tolist()]
        loss = self.objective(lm_loss_N, gates_NL, names, progress, budgets)
        return {"loss": loss, "lm_loss_N": lm_loss_N.detach(), "gates_NL": gates_NL.detach()}


def noise_of(seed: int, step: int, numbers: list[int], layers: int) -> torch.Tensor:
    """Draw the Gumbel noise (N, L, 2) of these sequences in this step, whatever the pack or the process they are in."""
    noise = [_generator(f"{seed}-{step}-{number}").gumbel(size=(layers, 2)) for number in numbers]
    return torch.from_numpy(np.stack(noise).astype(np.float32))


def budgets_of(seed: int, step: int, numbers: list[int], low: float, high: float) -> torch.Tensor:
    """Draw the target (N,) of these sequences in this step, whatever the pack or the process they are in."""
    drawn = [_generator(f"budget-{seed}-{step}-{number}").uniform(low, high) for number in numbers]
    return torch.tensor(drawn, dtype=torch.float32)


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big"))
