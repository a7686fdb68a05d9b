"""Decides the routes of requests: runs the model over their prompts' two ends, and keeps routes where kernels look.

Shape suffixes: R requests, W tokens of the longest pair of ends, N pooled tokens, H query heads, D head dim, L routed
layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from flux_attention.errors import ServingError
from flux_attention.kernels import to_device
from flux_attention.router import LayerRouter, hard_route, pooled_slots


class Unrotation:
    """
    Undoes a layer's rotary position embedding.

    Parameters
    ----------
    rotary : torch.nn.Module or None
        vLLM's; None for layers without.

    Raises
    ------
    ServingError
        For an embedding whose angles cannot be read.
    """

    def __init__(self, rotary: nn.Module | None):
        self.rotary = rotary
        if rotary is None:
            return
        facts = ("cos_sin_cache", "rotary_dim", "is_neox_style")
        if not all(hasattr(rotary, fact) for fact in facts) or "MRotary" in type(rotary).__name__:
            raise ServingError(
                f"the queries' rotary embedding is a {type(rotary).__name__}, whose rotation cannot be undone: this "
                "model cannot be routed here"
            )

    def __call__(self, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return float32 ``states`` (…, D) as they were before they were rotated to ``positions`` (…)."""
        if self.rotary is None:
            return states
        dim = self.rotary.rotary_dim
        cos, sin = self.rotary.cos_sin_cache[positions].float().chunk(2, dim=-1)
        rotated, rest = states[..., :dim], states[..., dim:]
        if self.rotary.is_neox_style:
            one, two = rotated.chunk(2, dim=-1)
        else:
            one, two = rotated[..., ::2], rotated[..., 1::2]
        scale = cos * cos + sin * sin  # one, but for embeddings that are scaled
        one, two = (one * cos + two * sin) / scale, (two * cos - one * sin) / scale
        if self.rotary.is_neox_style:
            back = torch.cat([one, two], dim=-1)
        else:
            back = torch.stack([one, two], dim=-1).flatten(-2)
        return torch.cat([back, rest], dim=-1)


@dataclass
class Ends:
    """
    Stands for attention metadata while the model runs over the ends of some prompts, all layers full.

    Attributes
    ----------
    rows, width : int
        R and W: the flat tokens are so many prompts' ends, padded on the right.
    slots_RN, weights_RN : torch.Tensor
        Which tokens routers read, int64, and their weights, float32.
    picked : dict of int to torch.Tensor
        float32 (R, N, D): each layer's rotated queries at the slots, the mean over heads.
    """

    rows: int
    width: int
    slots_RN: torch.Tensor
    weights_RN: torch.Tensor
    picked: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self):
        self.rows_R1 = torch.arange(self.rows, device=self.slots_RN.device)[:, None]

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """Compute causal attention within each pair of ends; flat tokens (R × W, heads, D)."""
        q, k, v = (states.unflatten(0, (self.rows, self.width)).transpose(1, 2) for states in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).flatten(0, 1)

    def read(self, layer: int, query: torch.Tensor) -> None:
        """Keep of a layer's rotated queries what its router will read."""
        query_RWHD = query.unflatten(0, (self.rows, self.width))
        self.picked[layer] = query_RWHD[self.rows_R1, self.slots_RN].mean(2, dtype=torch.float32)

    def pooled(self, unrotations: Sequence[Unrotation]) -> torch.Tensor:
        """
        Return what routers read, float32 (L, R, D): the mean over the tokens at both ends, before rotation.

        Of all layers at once, if they share their rotary embedding: small operations in each layer take the host
        longer than the device.
        """
        picked = [self.picked[place] for place in range(len(unrotations))]
        if len({id(unrotate.rotary) for unrotate in unrotations}) == 1:
            back_LRND = unrotations[0](torch.stack(picked), self.slots_RN)
        else:
            back = [unrotate(some, self.slots_RN) for unrotate, some in zip(unrotations, picked, strict=True)]
            back_LRND = torch.stack(back)
        return (self.weights_RN[:, None] @ back_LRND)[:, :, 0]


def take_ends(prompt: Sequence[int], end_tokens: int) -> list[int]:
    """Take the first and the last ``end_tokens`` tokens of a prompt; of one of up to twice as many, all."""
    prompt = list(prompt)
    return prompt if len(prompt) <= 2 * end_tokens else prompt[:end_tokens] + prompt[-end_tokens:]


def lay_out(
    ends: Sequence[Sequence[int]], pool_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, Ends]:
    """
    Lay the ends of prompts out for one forward pass.

    Returns
    -------
    tokens, positions : torch.Tensor
        int32 and int64, as vLLM compiles models for, (R × W), padded by zeros behind each pair of ends.
    ends : Ends
    """
    width = max(map(len, ends))
    tokens = torch.tensor([[*some, *[0] * (width - len(some))] for some in ends], dtype=torch.int32)
    slots, weights = pooled_slots(torch.tensor([len(some) for some in ends]), pool_size)
    positions = torch.arange(width).repeat(len(ends))
    ready = Ends(len(ends), width, to_device(slots, device), to_device(weights, device))
    return to_device(tokens.flatten(), device), to_device(positions, device), ready


class Routers(nn.Module):
    """
    Runs the routers of all layers at once.

    Parameters
    ----------
    routers : sequence of LayerRouter
        In the layers' order.
    """

    def __init__(self, routers: Sequence[LayerRouter]):
        super().__init__()
        parameters, _ = torch.func.stack_module_state(list(routers))
        self.stacked = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(value, requires_grad=False) for name, value in parameters.items()}
        )
        self.takes_budget = routers[0].takes_budget
        self.one = [copy.deepcopy(routers[0]).to("meta")]  # in a list, so that it is no part of this module

    def forward(self, pooled_LRD: torch.Tensor, budget: float | None = None) -> torch.Tensor:
        """
        Return bool ``routes_RL``, True = full attention, from what the routers read, float32.

        Where a router's output is not finite the layer is full: a server should not fail for one prompt.
        """
        parameters = {name.replace("/", "."): value for name, value in self.stacked.items()}
        told = (pooled_LRD.new_full(pooled_LRD.shape[1:2], budget),) if self.takes_budget else ()
        logits_LR2 = torch.vmap(
            lambda mine, x: torch.func.functional_call(self.one[0], mine, (x, *told)),
        )(parameters, pooled_LRD)
        return (hard_route(logits_LR2) | ~logits_LR2.isfinite().all(-1)).T


class InPrefill:
    """
    Decides routes in each layer, in the step that computes a whole prompt, without a word to the host.

    Parameters
    ----------
    routers : sequence of LayerRouter
        In the layers' order, on the device.
    pool_size : int
        P, tokens that routers read at each end.
    mean : callable
        Takes the mean of a tensor over all ranks.
    asked_N : torch.Tensor
        uint8: at a request's first page in any layer whether its routes are to be decided.
    budgets_N : torch.Tensor
        float32, there as well: the budget that its routers are told.
    """

    def __init__(
        self,
        routers: Sequence[LayerRouter],
        pool_size: int,
        mean: Callable[[torch.Tensor], torch.Tensor],
        asked_N: torch.Tensor,
        budgets_N: torch.Tensor,
    ):
        self.routers, self.pool_size, self.mean = routers, pool_size, mean
        self.asked_N, self.budgets_N = asked_N, budgets_N

    def decide(
        self,
        place: int,
        query_THD: torch.Tensor,
        starts: torch.Tensor,
        first_R: torch.Tensor,
        unrotate: Unrotation,
        routes_N: torch.Tensor,
    ) -> None:
        """
        Write the routes of the requests that are to be decided.

        Parameters
        ----------
        place : int
            Of the layer among the routed ones.
        query_THD : torch.Tensor
            Rotated queries of all rows.
        starts : torch.Tensor
            int32 (R + 1), where each row's tokens start.
        first_R : torch.Tensor
            int64, the first page of each row in this layer.
        unrotate : Unrotation
        routes_N : torch.Tensor
            uint8, written to.
        """
        starts = starts.long()
        lengths = starts[1:] - starts[:-1]
        slots_RN, weights_RN = pooled_slots(lengths, self.pool_size, self.pool_size)
        picked_RND = query_THD[starts[:-1, None] + slots_RN].mean(2, dtype=torch.float32)
        pooled_RD = self.mean((weights_RN[:, None] @ unrotate(picked_RND, slots_RN))[:, 0])
        logits = self.routers[place](pooled_RD, self.budgets_N[first_R])
        full = hard_route(logits) | ~logits.isfinite().all(-1)
        routes_N[first_R] = torch.where(self.asked_N[first_R] != 0, full.to(torch.uint8), routes_N[first_R])
