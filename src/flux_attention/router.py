"""The layer router reads the prompt's query states of one layer and decides full or sparse attention.

Shape suffixes: B batch, S query length, H query heads, D head dim, N pooled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn

#: Bias of the last layer for [SA, FA] at initialisation: full attention with probability 0.989.
INITIAL_BIAS = (0.0, 4.5)


def pool_query(query_BSHD: torch.Tensor, columns_BN: torch.Tensor, weights_BN: torch.Tensor) -> torch.Tensor:
    """
    Take the weighted mean over some tokens of the query states' mean over heads, a router's input.

    Parameters
    ----------
    query_BSHD : torch.Tensor
        Query states before rotary embedding, any float dtype.
    columns_BN : torch.Tensor
        int64, which tokens of each row to read.
    weights_BN : torch.Tensor
        float32, their weights; they sum to one in each row.

    Returns
    -------
    torch.Tensor
        ``x_BD`` in float32.
    """
    picked = query_BSHD[torch.arange(len(query_BSHD), device=query_BSHD.device)[:, None], columns_BN]
    return (weights_BN[:, None] @ picked.mean(2, dtype=torch.float32))[:, 0]


def pooled_slots(
    lengths_B: torch.Tensor, pool_size: int, longest: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    List the first and the last ``pool_size`` tokens of sequences of ``lengths_B`` tokens, with their weights.

    In a sequence shorter than ``pool_size`` both are the whole sequence; below twice that they overlap.

    Parameters
    ----------
    longest : int, optional
        What no length exceeds; default: the greatest, for which the host waits if lengths are on a GPU.

    Returns
    -------
    slots_BN : torch.Tensor
        int64, N = 2 × min(pool_size, longest); token numbers counted from the sequence's start.
    weights_BN : torch.Tensor
        float32, equal over the tokens read and zero in the unused places of shorter sequences.
    """
    size = min(pool_size, int(lengths_B.max()) if longest is None else longest)
    offset = torch.arange(size, device=lengths_B.device)
    count_B1 = lengths_B.clamp(max=size)[:, None]
    used = (offset < count_B1).float()
    first = offset.clamp(max=count_B1 - 1)
    last = (lengths_B[:, None] - 1 - offset).clamp(min=0)
    weights = torch.cat([used, used], dim=1)
    return torch.cat([first, last], dim=1), weights / weights.sum(1, keepdim=True)


class Pooling:
    """
    Reads one layer's query states of a batch of prompts into its router's input.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each prompt.
    pool_size : int
        P, tokens that are read at each end.
    columns : callable, optional
        From token numbers (B, N), counted from each prompt's start, to columns of the query states; default: they are
        the same.
    heads : int, optional
        Query heads of the whole model: with fewer in the query states, ``group`` has the others.
    group : torch.distributed.ProcessGroup, optional
        The processes that share the heads evenly (tensor parallelism): all of them read the mean of all heads.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        pool_size: int,
        columns: Callable[[torch.Tensor], torch.Tensor] | None = None,
        heads: int | None = None,
        group: torch.distributed.ProcessGroup | None = None,
    ):
        self.lengths, self.pool_size, self.columns = list(lengths), pool_size, columns
        self.heads, self.group = heads, group
        self._read: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, query_BSHD: torch.Tensor) -> torch.Tensor:
        """Return ``x_BD``, float32; see ``pool_query``."""
        device = query_BSHD.device
        if device not in self._read:
            slots, weights = pooled_slots(torch.tensor(self.lengths, device="cpu"), self.pool_size)
            columns = slots if self.columns is None else self.columns(slots)
            self._read[device] = columns.to(device), weights.to(device)
        x_BD = pool_query(query_BSHD, *self._read[device])
        if self.group is not None and query_BSHD.shape[2] != self.heads:
            torch.distributed.all_reduce(x_BD, group=self.group)
            x_BD /= self.group.size()
        return x_BD


class LayerRouter(nn.Module):
    """
    Decides full attention (1) or sparse attention (0) for one layer and each sequence.

    An encoder (D → 8D → 2D) and a head (2D → 4D → D → 2) with SiLU between; the last layer starts at zero
    weight and bias [0, 4.5], so a fresh router picks full attention for every input. Runs in float32.

    Parameters
    ----------
    head_dim : int
        D of the layer that it routes.
    takes_budget : bool
        Whether it is told the Ω_MSR that is asked for, as one more input.
    """

    def __init__(self, head_dim: int, takes_budget: bool = False):
        super().__init__()
        self.head_dim, self.takes_budget = head_dim, takes_budget
        linear = partial(nn.Linear, dtype=torch.float32, device="cpu")  # whatever PyTorch's defaults are
        inputs = head_dim + takes_budget
        self.encoder = nn.Sequential(linear(inputs, 8 * head_dim), nn.SiLU(), linear(8 * head_dim, 2 * head_dim))
        self.head = nn.Sequential(
            linear(2 * head_dim, 4 * head_dim),
            nn.SiLU(),
            linear(4 * head_dim, head_dim),
            nn.SiLU(),
            linear(head_dim, 2),
        )
        nn.init.zeros_(self.last.weight)
        with torch.no_grad():
            self.last.bias.copy_(torch.tensor(INITIAL_BIAS, device="cpu"))

    @property
    def last(self) -> nn.Linear:
        """The last linear layer, whose outputs are the logits."""
        return cast(nn.Linear, self.head[-1])

    def forward(self, pooled_BD: torch.Tensor, budget_B: torch.Tensor | None = None) -> torch.Tensor:
        """
        Return ``logits_B2`` in float32 from pooled query states; index 1 is full attention, index 0 sparse.

        ``budget_B`` is float32, for routers that take one.
        """
        x = pooled_BD.float()
        if self.takes_budget:
            assert budget_B is not None
            x = torch.cat([x, budget_B[:, None]], dim=1)
        return self.head(self.encoder(x))


@torch.no_grad()
def bias_by_rank(routers: Sequence[LayerRouter]) -> None:
    """
    Start routers from a ranking, the one of the layer that needs full attention most first.

    Before training they decide by rank alone: the first as surely full as a fresh one, the last as surely sparse, those
    in the middle by the noise.
    """
    for place, router in enumerate(routers):
        share = 1 - 2 * place / max(1, len(routers) - 1)
        router.last.bias.copy_(torch.tensor(INITIAL_BIAS, device="cpu") * share)


def hard_route(logits_B2: torch.Tensor) -> torch.Tensor:
    """Decide as at inference, deterministically: bool ``route_B``, True = full attention; more dimensions may lead."""
    return logits_B2[..., 1] > logits_B2[..., 0]


def soft_route(
    logits_B2: torch.Tensor, temperature: float | torch.Tensor, noise_B2: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Decide as in training, by straight-through Gumbel-Softmax.

    The value is 0 or 1, the gradient that of ``softmax((logits + Gumbel noise) / temperature)[1]``. More dimensions may
    lead.

    Parameters
    ----------
    noise_B2 : torch.Tensor, optional
        The Gumbel noise; drawn where it is not given.

    Returns
    -------
    torch.Tensor
        float32 ``gate_B``.
    """
    if noise_B2 is None:
        return F.gumbel_softmax(logits_B2.float(), tau=cast(float, temperature), hard=True)[..., 1]
    soft_B = torch.softmax((logits_B2.float() + noise_B2.to(logits_B2.device)) / temperature, dim=-1)[..., 1]
    return (soft_B > 0.5).float() - soft_B.detach() + soft_B
