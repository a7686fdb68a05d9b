"""Merges two attention states by their log-sum-exps: one Triton kernel reads and writes each once.

By PyTorch's operations it would take five, with float32 in memory between them.

Shape suffixes: B batch, S query length, H query heads, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flux_attention.kernels.device import on_device

#: Queries of a thread block.
ROWS = 16


@triton.jit
def _merge(
    one_ptr, one_lse_ptr, other_ptr, other_lse_ptr, output_ptr,
    one_b, one_h, one_s, other_b, other_h, other_s, output_b, output_h, output_s,
    length, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    heads, head, batch = tl.num_programs(0), tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)[None, :]
    real = rows < length
    mask = real[:, None] & (columns < D)
    lse = (batch * heads + head) * length + rows
    rows = rows.to(tl.int64)[:, None]
    difference = tl.load(other_lse_ptr + lse, mask=real, other=0.0) - tl.load(one_lse_ptr + lse, mask=real, other=0.0)
    share = tl.sigmoid(difference)[:, None]
    one = tl.load(one_ptr + batch * one_b + head * one_h + rows * one_s + columns, mask=mask).to(tl.float32)
    other = tl.load(other_ptr + batch * other_b + head * other_h + rows * other_s + columns, mask=mask).to(tl.float32)
    result = one + share * (other - one)
    output = output_ptr + batch * output_b + head * output_h + rows * output_s + columns
    tl.store(output, result.to(output_ptr.dtype.element_ty), mask=mask)


def merge_attention_states(
    one_BHSD: torch.Tensor,
    one_lse_BHS: torch.Tensor,
    other_BHSD: torch.Tensor,
    other_lse_BHS: torch.Tensor,
    output_BHSD: torch.Tensor,
) -> None:
    """
    Write attention over both sets of keys to ``output_BHSD``, computed in float32 and rounded once.

    Parameters
    ----------
    one_BHSD, other_BHSD, output_BHSD : torch.Tensor
        Any float dtype and strides, the last dimension contiguous.
    one_lse_BHS, other_lse_BHS : torch.Tensor
        float32, contiguous: log-sum-exps of the scores, natural logarithm.
    """
    batch, heads, length, dim = output_BHSD.shape
    states = (one_BHSD, other_BHSD, output_BHSD)
    with on_device(output_BHSD):
        _merge[(heads, triton.cdiv(length, ROWS), batch)](
            one_BHSD, one_lse_BHS, other_BHSD, other_lse_BHS, output_BHSD,
            *(stride for tensor in states for stride in tensor.stride()[:3]),
            length, D=dim, WIDTH=triton.next_power_of_2(dim), ROWS=ROWS, num_warps=4,
        )  # fmt: skip
