"""Triton kernels over keys and values in pages, as vLLM keeps them: prefill of sparse rows, and decode of all rows.

Which keys a row sees is read on the device: whether it is full, how long it is, and where its pages lie. So launches do
not depend on routes, and a CUDA graph of them serves all.

Shape suffixes: B rows (sequences), T tokens of all rows, M pages of a row, N pages in all, P tokens of a page, H query
heads, K KV heads, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flux_attention.kernels.device import on_device, sm_count

#: Programs that share a row's head at most.
MAX_SPLITS = 64
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _pages(table_ptr, row, stride_tb, position, real, P: tl.constexpr):
    """Return where tokens of a row lie: their pages, and their places in these."""
    page = tl.load(table_ptr + row * stride_tb + position // P, mask=real, other=0).to(tl.int64)
    return page, position % P


@triton.jit
def _attend(
    q, top, total, acc, key_ptr, value_ptr, page, place, head, seen, keys_real,
    stride_kn, stride_kp, stride_kk, stride_kd, stride_vn, stride_vp, stride_vk, stride_vd,
    scale_log2, D: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the attention states of some queries."""
    dims = tl.arange(0, D)
    key_at = page * stride_kn + place * stride_kp + head * stride_kk
    key = tl.load(key_ptr + key_at[None, :] + dims[:, None] * stride_kd, mask=keys_real[None, :], other=0.0)
    value_at = page * stride_vn + place * stride_vp + head * stride_vk
    value = tl.load(value_ptr + value_at[:, None] + dims[None, :] * stride_vd, mask=keys_real[:, None], other=0.0)
    scores = tl.where(seen, tl.dot(q, key) * scale_log2, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp2(top - safe)
    weights = tl.exp2(scores - safe[:, None])
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None] + tl.dot(weights.to(value.dtype), value)
    return new_top, total, acc


@triton.jit(do_not_specialize=["rows", "stride_tb"])
def _sparse_prefill(
    query_ptr, key_ptr, value_ptr, output_ptr, table_ptr, starts_ptr, lengths_ptr, routes_ptr, rows,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_tb,
    stride_kn, stride_kp, stride_kk, stride_kd, stride_vn, stride_vp, stride_vk, stride_vd,
    sink, window, scale_log2,
    G: tl.constexpr, D: tl.constexpr, P: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    # The row of this block: row r has the blocks from starts[r] // M + r on.
    low, high = 0, rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) // M + middle <= block:
            low = middle
        else:
            high = middle
    row = low
    start = tl.load(starts_ptr + row)
    queries = tl.load(starts_ptr + row + 1) - start
    first = (block - (start // M + row)) * M
    if first < queries:
        length = tl.load(lengths_ptr + row)
        if tl.load(routes_ptr + tl.load(table_ptr + row * stride_tb).to(tl.int64)) == 0:
            before = length - queries
            slot = first + tl.arange(0, M)
            real = slot < queries
            position = before + slot
            dims = tl.arange(0, D)
            q = tl.load(
                query_ptr + (start + slot).to(tl.int64)[:, None] * stride_qt + head * stride_qh + dims[None, :],
                mask=real[:, None], other=0.0,
            )  # fmt: skip
            top = tl.full([M], float("-inf"), tl.float32)
            total = tl.zeros([M], tl.float32)
            acc = tl.zeros([M, D], tl.float32)
            end = tl.minimum(before + first + M, length)
            for tile in range(0, tl.minimum(sink, end), N):
                j = tile + tl.arange(0, N)
                there = j < tl.minimum(sink, end)
                page, place = _pages(table_ptr, row, stride_tb, j, there, P)
                seen = there[None, :] & (j[None, :] <= position[:, None])
                top, total, acc = _attend(
                    q, top, total, acc, key_ptr, value_ptr, page, place, head // G, seen, there,
                    stride_kn, stride_kp, stride_kk, stride_kd, stride_vn, stride_vp, stride_vk, stride_vd,
                    scale_log2, D,
                )  # fmt: skip
            oldest = tl.maximum(sink, before + first - window + 1)
            for tile in range(oldest, end, N):
                j = tile + tl.arange(0, N)
                there = j < end
                page, place = _pages(table_ptr, row, stride_tb, j, there, P)
                away = position[:, None] - j[None, :]
                seen = there[None, :] & (away >= 0) & (away < window)
                top, total, acc = _attend(
                    q, top, total, acc, key_ptr, value_ptr, page, place, head // G, seen, there,
                    stride_kn, stride_kp, stride_kk, stride_kd, stride_vn, stride_vp, stride_vk, stride_vd,
                    scale_log2, D,
                )  # fmt: skip
            tl.store(
                output_ptr + (start + slot).to(tl.int64)[:, None] * stride_ot + head * stride_oh + dims[None, :],
                (acc / total[:, None]).to(output_ptr.dtype.element_ty), mask=real[:, None],
            )  # fmt: skip


def prefill_tile(dim: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return the sizes of ``sparse_prefill``'s blocks for heads of this dimension, and how they are compiled."""
    return dict(M=128 if dim <= 128 else 64, N=64 if dim <= 128 else 32), dict(
        num_warps=8 if dim >= 128 else 4, num_stages=2
    )


def decode_tile(dim: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return the sizes of ``decode``'s blocks for heads of this dimension, and how they are compiled."""
    return dict(N=64 if dim <= 128 else 32), dict(num_warps=4, num_stages=3)


def sparse_prefill(
    query_THD: torch.Tensor,
    key_NPKD: torch.Tensor,
    value_NPKD: torch.Tensor,
    output_THD: torch.Tensor,
    table_BM: torch.Tensor,
    starts: torch.Tensor,
    lengths_B: torch.Tensor,
    routes_N: torch.Tensor,
    sink: int,
    window: int,
    scale: float,
) -> None:
    """
    Attend to the first ``sink`` and the latest ``window`` keys in the rows that are sparse; leave the others' output.

    Parameters
    ----------
    query_THD : torch.Tensor
        The rows' new tokens behind one another; bf16 or fp16.
    key_NPKD, value_NPKD : torch.Tensor
        The pages of all rows, with the new tokens in them.
    output_THD : torch.Tensor
        Written to.
    table_BM : torch.Tensor
        int32, each row's pages in order; those between sink and window are not looked at.
    starts : torch.Tensor
        int32 (B + 1), where each row's new tokens start.
    lengths_B : torch.Tensor
        int32, tokens of each row, the new ones included.
    routes_N : torch.Tensor
        uint8, at a row's first page whether the row is full (1) or sparse (0).
    sink, window : int
        Tokens; the window includes the query's own.
    scale : float
    """
    tokens, heads, dim = query_THD.shape
    rows = len(lengths_B)
    sizes, options = prefill_tile(dim)
    with on_device(query_THD):
        _sparse_prefill[(tokens // sizes["M"] + rows, heads)](
            query_THD, key_NPKD, value_NPKD, output_THD, table_BM, starts, lengths_B, routes_N, rows,
            *query_THD.stride()[:2], *output_THD.stride()[:2], table_BM.stride(0),
            *key_NPKD.stride(), *value_NPKD.stride(),
            sink, window, scale * LOG2E.value,
            G=heads // key_NPKD.shape[2], D=dim, P=key_NPKD.shape[1], **sizes, **options,
        )  # fmt: skip


@triton.jit
def _decode(
    query_ptr, key_ptr, value_ptr, output_ptr, table_ptr, lengths_ptr, routes_ptr,
    state_ptr, top_ptr, total_ptr, count_ptr,
    stride_qb, stride_qh, stride_ob, stride_oh, stride_tb,
    stride_kn, stride_kp, stride_kk, stride_kd, stride_vn, stride_vp, stride_vk, stride_vd,
    sink, window, scale_log2,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, P: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    # long: one launch does it all, as a step is bound by launches and reads
    head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + row)
    full = tl.load(routes_ptr + tl.load(table_ptr + row * stride_tb).to(tl.int64)) != 0
    seen = tl.where(full, length, tl.minimum(length, sink + window))
    # A split has two tiles at least: fewer would cost more to merge than to read.
    share = tl.maximum(tl.cdiv(tl.cdiv(seen, N), SPLITS), 2) * N
    splits = tl.maximum(tl.cdiv(seen, share), 1)
    if split < splits:
        group, dims = tl.arange(0, GROUP), tl.arange(0, D)
        real = (group < G)[:, None]
        q = tl.load(
            query_ptr + row.to(tl.int64) * stride_qb + (head * G + group)[:, None] * stride_qh + dims[None, :],
            mask=real, other=0.0,
        )  # fmt: skip
        top = tl.full([GROUP], float("-inf"), tl.float32)
        total = tl.zeros([GROUP], tl.float32)
        acc = tl.zeros([GROUP, D], tl.float32)
        for tile in range(split * share, tl.minimum((split + 1) * share, seen), N):
            slot = tile + tl.arange(0, N)
            there = slot < seen
            # What a sparse row sees lies in two pieces.
            j = tl.where(slot < sink, slot, slot + length - seen)
            page, place = _pages(table_ptr, row, stride_tb, j, there, P)
            top, total, acc = _attend(
                q, top, total, acc, key_ptr, value_ptr, page, place, head, there[None, :], there,
                stride_kn, stride_kp, stride_kk, stride_kd, stride_vn, stride_vp, stride_vk, stride_vd,
                scale_log2, D,
            )  # fmt: skip
        output = output_ptr + row.to(tl.int64) * stride_ob + (head * G + group)[:, None] * stride_oh + dims[None, :]
        if splits == 1:
            safe = tl.where(total == 0.0, 1.0, total)  # a row of padding has no keys
            tl.store(output, (acc / safe[:, None]).to(output_ptr.dtype.element_ty), mask=real)
        else:
            place = row * tl.num_programs(0) + head
            mine = (place * SPLITS + split) * GROUP + group
            tl.store(state_ptr + mine.to(tl.int64)[:, None] * D + dims[None, :], acc, mask=real)
            tl.store(top_ptr + mine, top)
            tl.store(total_ptr + mine, total)
            tl.debug_barrier()
            # The program that comes last merges the splits; it sees what the others stored before they counted.
            if tl.atomic_add(count_ptr + place, 1, sem="acq_rel") == splits - 1:
                tl.debug_barrier()
                others = tl.arange(0, SPLITS)
                theirs = (place * SPLITS + others)[:, None] * GROUP + group[None, :]
                there = (others < splits)[:, None]
                tops = tl.load(top_ptr + theirs, mask=there, other=float("-inf"), cache_modifier=".cg")
                best = tl.max(tops, 0)
                totals = tl.load(total_ptr + theirs, mask=there, other=0.0, cache_modifier=".cg")
                total = tl.sum(totals * tl.exp2(tops - best[None, :]), 0)
                acc = tl.zeros([GROUP, D], tl.float32)
                # Some at a time, so that the next ones are on their way while the first are added.
                for start in range(0, splits, AHEAD):
                    for other in tl.static_range(AHEAD):
                        at = (place * SPLITS + start + other) * GROUP + group
                        more = (start + other + tl.zeros([GROUP], tl.int32) < splits) & (group < G)
                        weight = tl.load(top_ptr + at, mask=more, other=float("-inf"), cache_modifier=".cg")
                        acc += tl.exp2(weight - best)[:, None] * tl.load(
                            state_ptr + at.to(tl.int64)[:, None] * D + dims[None, :],
                            mask=more[:, None], other=0.0, cache_modifier=".cg",
                        )  # fmt: skip
                tl.store(output, (acc / total[:, None]).to(output_ptr.dtype.element_ty), mask=real)
                tl.store(count_ptr + place, 0)


class PagedWorkspace:
    """
    Holds scratch memory that launches of ``decode`` share: programs leave their splits' attention states in it.

    Parameters
    ----------
    batch, heads, kv_heads, dim : int
        B at most, H, K, D.
    device : torch.device
    """

    def __init__(self, batch: int, heads: int, kv_heads: int, dim: int, device: torch.device):
        self.group = max(16, triton.next_power_of_2(heads // kv_heads))
        self.programs = 4 * sm_count(device)
        most = max(self.splits(rows, kv_heads) * rows for rows in range(1, batch + 1)) * kv_heads
        self.state = torch.empty(most, self.group, dim, dtype=torch.float32, device=device)
        self.top, self.total = (torch.empty(most, self.group, dtype=torch.float32, device=device) for _ in range(2))
        self.count = torch.zeros(batch, kv_heads, dtype=torch.int32, device=device)

    def splits(self, rows: int, kv_heads: int) -> int:
        """Count the programs that may share a row's head, so that all together fill the GPU."""
        return max(1, min(MAX_SPLITS, triton.next_power_of_2(self.programs // (rows * kv_heads) + 1) // 2))


def decode(
    query_BHD: torch.Tensor,
    key_NPKD: torch.Tensor,
    value_NPKD: torch.Tensor,
    output_BHD: torch.Tensor,
    table_BM: torch.Tensor,
    lengths_B: torch.Tensor,
    routes_N: torch.Tensor,
    workspace: PagedWorkspace,
    sink: int,
    window: int,
    scale: float,
) -> None:
    """
    Attend with one new token of each row: full rows to all their keys, sparse ones to sink + window.

    Parameters
    ----------
    query_BHD : torch.Tensor
        bf16 or fp16.
    output_BHD : torch.Tensor
        Written to; zeros for rows of no tokens.
    workspace : PagedWorkspace
    key_NPKD, value_NPKD, table_BM, lengths_B, routes_N, sink, window, scale
        As in ``sparse_prefill``.
    """
    rows, heads, dim = query_BHD.shape
    kv_heads = key_NPKD.shape[2]
    splits = workspace.splits(rows, kv_heads)
    sizes, options = decode_tile(dim)
    with on_device(query_BHD):
        _decode[(kv_heads, rows, splits)](
            query_BHD, key_NPKD, value_NPKD, output_BHD, table_BM, lengths_B, routes_N,
            workspace.state, workspace.top, workspace.total, workspace.count,
            *query_BHD.stride()[:2], *output_BHD.stride()[:2], table_BM.stride(0),
            *key_NPKD.stride(), *value_NPKD.stride(),
            sink, window, scale * LOG2E.value,
            G=heads // kv_heads, GROUP=workspace.group, D=dim, P=key_NPKD.shape[1],
            SPLITS=splits, AHEAD=8, **sizes, **options,
        )  # fmt: skip
