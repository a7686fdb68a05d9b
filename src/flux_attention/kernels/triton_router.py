"""The layer router at inference, in Triton: pooling and the small networks in six launches.

In PyTorch the same takes some fifteen, five of them matrix products with one row, which libraries of large products
serve badly; a layer's attention waits for all of them. Rows are computed independently: a batch routes as its sequences
do alone, up to the rounding of prompts shorter than ``pool_size``.

Shape suffixes: B batch, S query length, H query heads, D head dim, N pooled tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import nn

from flux_attention.kernels import on_device

#: Tokens that a program of the pooling sums.
TOKENS = 8
#: Weights that a program of a linear layer reads.
WEIGHTS = 4096


@triton.jit
def _pool(
    query_ptr, columns_ptr, weights_ptr, part_ptr, query_b, query_s, query_h, N,
    H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Weighted sum of some tokens' query states, mean over heads."""
    batch, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    heads, dims = tl.arange(0, HEADS), tl.arange(0, D)
    places = heads.to(tl.int64)[:, None] * query_h + dims[None, :]
    acc = tl.zeros([D], tl.float32)
    for n in range(part * COUNT, tl.minimum(part * COUNT + COUNT, N)):
        column = tl.load(columns_ptr + batch * N + n)
        weight = tl.load(weights_ptr + batch * N + n)
        states = tl.load(query_ptr + batch * query_b + column * query_s + places, mask=heads[:, None] < H, other=0.0)
        acc += weight * tl.sum(states.to(tl.float32), 0)
    tl.store(part_ptr + (batch * tl.num_programs(0) + part) * D + dims, acc / H)


@triton.jit
def _linear(
    x_ptr, weight_ptr, bias_ptr, y_ptr, parts, width,
    INPUTS: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Some of a linear layer's ``width`` outputs for the sum of ``parts`` inputs, through SiLU or not."""
    batch, inputs = tl.program_id(1).to(tl.int64), tl.arange(0, INPUTS)
    outputs = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = outputs < width
    weight = tl.load(weight_ptr + outputs[:, None] * INPUTS + inputs[None, :], mask=real[:, None], other=0.0)
    x = tl.zeros([INPUTS], tl.float32)
    for part in range(parts):
        x += tl.load(x_ptr + (batch * parts + part) * INPUTS + inputs)
    y = tl.sum(weight * x[None, :], 1) + tl.load(bias_ptr + outputs, mask=real, other=0.0)
    if SILU:
        y *= tl.sigmoid(y)
    tl.store(y_ptr + batch * width + outputs, y, mask=real)


def logits(
    query_BSHD: torch.Tensor, columns_BN: torch.Tensor, weights_BN: torch.Tensor, layers: list[nn.Module]
) -> torch.Tensor:
    """
    A router's logits, without gradients.

    Parameters
    ----------
    query_BSHD : torch.Tensor
        Query states before rotary embedding; the last dimension contiguous, D a power of two.
    columns_BN, weights_BN
        As in ``router.pool_query``.
    layers : list of torch.nn.Module
        The router's, in order: ``Linear`` with float32 weights, widths powers of two but for the last, and ``SiLU``.

    Returns
    -------
    torch.Tensor
        float32 (B, 2).
    """
    batch, _, heads, dim = query_BSHD.shape
    count = columns_BN.shape[1]
    parts = triton.cdiv(count, TOKENS)
    with on_device(query_BSHD):
        x = torch.empty(batch, parts, dim, dtype=torch.float32, device=query_BSHD.device)
        _pool[(parts, batch)](
            query_BSHD, columns_BN, weights_BN, x, *query_BSHD.stride()[:3], count,
            H=heads, HEADS=triton.next_power_of_2(heads), D=dim, COUNT=TOKENS,
        )  # fmt: skip
        for place, layer in enumerate(layers):
            if isinstance(layer, nn.SiLU):
                continue
            rows = max(1, WEIGHTS // layer.in_features)
            y = torch.empty(batch, layer.out_features, dtype=torch.float32, device=query_BSHD.device)
            _linear[(triton.cdiv(layer.out_features, rows), batch)](
                x, layer.weight, layer.bias, y, parts, layer.out_features,
                INPUTS=layer.in_features, ROWS=rows, SILU=isinstance(layers[min(place + 1, len(layers) - 1)], nn.SiLU),
            )  # fmt: skip
            x, parts = y, 1
    return x
