"""Computes a layer's decode step by one Triton kernel, for NVIDIA GPUs: stores a token, attends over what is kept.

Rows differ in length, in what they keep and in where it lies, and all of that is read from device memory: a CUDA graph
of the launch serves every step, every generation and every mix of full and sparse rows. Keys are split over programs
(split-KV), and a row gets programs by how much it has to read, so that a long one beside short ones has most of the
device; the query heads of a KV head share one tile, so each key is read once; the last program of a row's head to
finish merges the splits' attention states.

Shape suffixes: B batch, H query heads, K KV heads, G = H / K, D head dim, N keys of a tile, W programs a KV head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flux_attention.kernels.device import on_device, shared_memory, sm_count
from flux_attention.kernels.split_table import MAX_SPLITS
from flux_attention.kernels.triton_attention import LOG2E


@triton.jit
def _decode(
    query_ptr, key_ptr, value_ptr, output_ptr, table_ptr, lengths_ptr, state_ptr, top_ptr, total_ptr, count_ptr,
    query_b, query_h, key_b, key_h, value_b, value_h, output_b, output_h,
    sink, window, scale_log2,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    # long: one launch does it all, as a step is bound by launches and reads
    kv_head, program = tl.program_id(0), tl.program_id(1)
    element = key_ptr.dtype.element_ty
    table_ptr += program * 7
    batch = tl.load(table_ptr + 4).to(tl.int32)
    split = tl.load(table_ptr + 5).to(tl.int32)
    splits = tl.load(table_ptr + 6).to(tl.int32)
    key_base = tl.load(table_ptr).to(tl.pointer_type(element))
    value_base = tl.load(table_ptr + 1).to(tl.pointer_type(element))
    head = tl.load(table_ptr + 2) * kv_head
    kind = tl.load(table_ptr + 3)
    key_base = tl.multiple_of(key_base + head, 16)
    value_base = tl.multiple_of(value_base + head, 16)

    position = tl.load(lengths_ptr + batch)  # of the new token
    seen = tl.where(kind == 0, position + 1, tl.minimum(position + 1, sink + window))
    # Entry n of what is read: the sink, then the latest tokens; a ring holds them in whatever order.
    gap = tl.where(kind == 2, 0, position + 1 - seen)  # 0 FULL, 1 KEPT, 2 RING
    slot = tl.where((kind == 2) & (position >= sink), sink + (position - sink) % window, position)

    blocks = tl.cdiv(seen, N)
    # A split of one block costs more to merge than to compute. Programs without work have zero splits.
    share = tl.maximum(tl.cdiv(blocks, tl.maximum(splits, 1)), 2)
    active = tl.where(splits == 0, 0, tl.cdiv(blocks, share))
    if split < active:
        groups, columns = tl.arange(0, GROUP), tl.arange(0, D)
        query = tl.load(
            query_ptr + batch * query_b + (kv_head * G + groups)[:, None] * query_h + columns[None, :],
            mask=(groups < G)[:, None],
            other=0.0,
        )
        begin = split * share * N
        end = tl.minimum(begin + share * N, seen)
        # The one program that reads the new token's place stores it first.
        entry = tl.where(slot < sink, slot, slot - gap)
        if (entry >= begin) & (entry < end):
            new_key = tl.load(key_ptr + batch * key_b + kv_head * key_h + columns)
            new_value = tl.load(value_ptr + batch * value_b + kv_head * value_h + columns)
            tl.store(key_base + slot.to(tl.int64) * D + columns, new_key)
            tl.store(value_base + slot.to(tl.int64) * D + columns, new_value)
        tl.debug_barrier()  # stored before any thread reads it
        acc = tl.zeros([GROUP, D], tl.float32)
        top = tl.full([GROUP], -1e30, tl.float32)
        total = tl.zeros([GROUP], tl.float32)
        for start in tl.range(begin, end, N):
            entry_N = start + tl.arange(0, N)
            slot_N = tl.where(entry_N < sink, entry_N, entry_N + gap)
            real_N = entry_N < end
            offsets = slot_N.to(tl.int64)[:, None] * D + columns[None, :]
            key = tl.load(key_base + offsets, mask=real_N[:, None], other=0.0)
            score = tl.dot(query, key.T) * scale_log2
            score = tl.where(real_N[None, :], score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp2(score - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(weight, 1)
            value = tl.load(value_base + offsets, mask=real_N[:, None], other=0.0)
            acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None])
            top = new_top
        output = output_ptr + batch * output_b + (kv_head * G + groups)[:, None] * output_h + columns[None, :]
        real = (groups < G)[:, None]
        if active == 1:
            tl.store(output, (acc / total[:, None]).to(output_ptr.dtype.element_ty), mask=real)
        else:
            place = batch * tl.num_programs(0) + kv_head
            first = program - split  # the row's programs are neighbours
            row = (program * tl.num_programs(0) + kv_head) * GROUP + groups
            tl.store(state_ptr + row[:, None] * D + columns[None, :], acc, mask=real)
            tl.store(top_ptr + row, top)
            tl.store(total_ptr + row, total)
            tl.debug_barrier()  # the states of all threads are written before the count says so
            done = tl.atomic_add(count_ptr + place, 1, sem="acq_rel", scope="gpu")
            if done == active - 1:
                tl.debug_barrier()
                others = tl.arange(0, SPLITS)
                rows = ((first + others) * tl.num_programs(0) + kv_head)[:, None] * GROUP + groups[None, :]
                mask = (others < active)[:, None]
                tops = tl.load(top_ptr + rows, mask=mask, other=-1e30, cache_modifier=".cg")
                totals = tl.load(total_ptr + rows, mask=mask, other=0.0, cache_modifier=".cg")
                best = tl.max(tops, 0)
                total = tl.sum(totals * tl.exp2(tops - best[None, :]), 0)
                acc = tl.zeros([GROUP, D], tl.float32)
                for other in tl.range(0, active):
                    row = ((first + other) * tl.num_programs(0) + kv_head) * GROUP + groups
                    share_G = tl.exp2(tl.load(top_ptr + row, cache_modifier=".cg") - best)
                    state = tl.load(
                        state_ptr + row[:, None] * D + columns[None, :], mask=real, other=0.0, cache_modifier=".cg"
                    )
                    acc += state * share_G[:, None]
                tl.store(output, (acc / total[:, None]).to(output_ptr.dtype.element_ty), mask=real)
                tl.store(count_ptr + place, 0)


class DecodeWorkspace:
    """
    Holds scratch memory that launches of the decode kernel share: programs leave their splits' attention states in it.

    Parameters
    ----------
    batch, heads, kv_heads, dim : int
        B, H, K, D.
    device : torch.device
    """

    def __init__(self, batch: int, heads: int, kv_heads: int, dim: int, device: torch.device):
        self.group = max(16, triton.next_power_of_2(heads // kv_heads))
        self.programs = max(batch, min(batch * MAX_SPLITS, decode_programs(kv_heads, device)))
        shape = self.programs, kv_heads, self.group
        self.state = torch.empty(*shape, dim, dtype=torch.float32, device=device)
        self.top, self.total = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
        self.count = torch.zeros(batch, kv_heads, dtype=torch.int32, device=device)


def decode_programs(kv_heads: int, device: torch.device) -> int:
    """Count the programs of a KV head: two an SM in all."""
    if device.type != "cuda":  # the interpreter
        return 5
    return 2 * sm_count(device) // kv_heads


def attend(
    query_BHD: torch.Tensor,
    key_BKD: torch.Tensor,
    value_BKD: torch.Tensor,
    table_W7: torch.Tensor,
    lengths_B: torch.Tensor,
    workspace: DecodeWorkspace,
    sink: int,
    window: int,
    scale: float,
) -> torch.Tensor:
    """
    Store each row's new token and attend to what the row keeps, the new token included.

    Parameters
    ----------
    query_BHD, key_BKD, value_BKD : torch.Tensor
        The new token's states, after rotary embedding; bf16 or fp16, the last dimension contiguous.
    table_W7 : torch.Tensor
        int64, see ``split_table``.
    lengths_B : torch.Tensor
        int32, tokens before the new one.
    workspace : DecodeWorkspace
    sink, window : int
        Tokens, of the rows that are not ``FULL``.
    scale : float

    Returns
    -------
    torch.Tensor
        ``output_BHD``.
    """
    batch, heads, dim = query_BHD.shape
    kv_heads = key_BKD.shape[1]
    output = torch.empty(batch, heads, dim, dtype=query_BHD.dtype, device=query_BHD.device)
    with on_device(query_BHD):
        _decode[(kv_heads, workspace.programs)](
            query_BHD, key_BKD, value_BKD, output, table_W7, lengths_B,
            workspace.state, workspace.top, workspace.total, workspace.count,
            *query_BHD.stride()[:2], *key_BKD.stride()[:2], *value_BKD.stride()[:2], *output.stride()[:2],
            sink, window, scale * LOG2E.value,
            G=heads // kv_heads, GROUP=workspace.group, D=dim,
            SPLITS=triton.next_power_of_2(min(MAX_SPLITS, workspace.programs)),
            **decode_tile(dim, shared_memory(query_BHD.device)),
        )  # fmt: skip
    return output


def decode_tile(dim: int, shared: int) -> dict[str, int]:
    """Choose the kernel's tile, for thread blocks that may use ``shared`` bytes of shared memory."""
    # Three stages of 64 keys and values of 256 dimensions take 170 KiB.
    return dict(N=64 if dim <= 128 or shared >= 180_000 else 32, num_warps=4, num_stages=3)
