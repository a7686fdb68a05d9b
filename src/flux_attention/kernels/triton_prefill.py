"""Computes sink + window attention by Triton kernels, forward and backward, for NVIDIA GPUs.

A program computes a tile of query rows: some positions of some heads that share a KV head. It visits only the blocks
of keys that the pattern needs, and masks only those at the pattern's edges; nothing is built ahead of a call. With a
window of all keys the same kernel is causal attention of the last S of T positions.

Shape suffixes: B batch, S query length, T key length, H query heads, K KV heads, G = H / K, D head dim, M query rows of
a tile, N keys of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from flux_attention.kernels.device import capability, on_device, shared_memory

LOG2E = tl.constexpr(1.4426950408889634)
#: Arguments that change from prompt to prompt: compiled once for all values.
SIZES = ["S", "T", "sink", "window"]
#: Queries of a call from which TMA loads keys and values.
MIN_TMA_QUERIES = 2**13


@triton.jit
def _mask(i_M, j_N, sink, window, T):
    """Whether query position i sees key j."""
    i, j = i_M[:, None], j_N[None, :]
    return (j <= i) & ((j < sink) | (i - j < window)) & (j < T)


@triton.jit
def _blocks(first, last, sink, window, N: tl.constexpr):
    """
    Return the key blocks of the queries at positions first … last − 1.

    They are ``sinks`` blocks from key 0 on, then others from key ``start`` on, ``count`` in all.
    """
    start = tl.maximum(first - window + 1, 0)
    apart = start > sink
    start = tl.where(apart, start, 0)
    sinks = tl.where(apart, tl.cdiv(sink, N), 0)
    return sinks, start, sinks + tl.cdiv(last - start, N)


@triton.jit
def _block(n, sinks, start, first, last, sink, window, N: tl.constexpr):
    """Return first key and end of the n-th block, and whether some of its keys are hidden from some of the queries."""
    is_sink = n < sinks
    begin = tl.where(is_sink, n * N, start + (n - sinks) * N)
    end = tl.where(is_sink, sink, last)
    inside = (begin + N <= first + 1) & ((begin >= last - window) | (begin + N <= sink))
    return begin, end, ~inside


@triton.jit
def _load(pointer, start, stride, T, N: tl.constexpr, D: tl.constexpr):
    """Load rows start … start + N − 1 of a (T, D) tensor whose rows are ``stride`` apart; zeros behind its end."""
    rows, columns = tl.arange(0, N), tl.arange(0, D)
    pointers = pointer + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    return tl.load(pointers, mask=(start + rows < T)[:, None], other=0.0)


@triton.jit
def _tile(S, T, G: tl.constexpr, M: tl.constexpr, PACK: tl.constexpr):
    """Return a program's batch and KV head, each row's head and position, and the first position and the end."""
    rows, pack = tl.arange(0, M), tl.program_id(1)
    first = T - S + tl.program_id(0) * (M // PACK)
    last = tl.minimum(first + M // PACK, T)
    batch, kv_head = tl.program_id(2).to(tl.int64), (pack // (G // PACK)).to(tl.int64)
    return batch, kv_head, pack * PACK + rows % PACK, first + rows // PACK, first, last


@triton.jit
def _rows(pointer, batch, head_M, row_M, stride_b, stride_h, stride_s, D: tl.constexpr):
    """Return the addresses of a tile's rows in a (B, H, S, D) tensor."""
    offsets = head_M.to(tl.int64) * stride_h + row_M.to(tl.int64) * stride_s
    return pointer + batch * stride_b + offsets[:, None] + tl.arange(0, D)[None, :]


@triton.jit(do_not_specialize=SIZES)
def _forward(
    query_ptr, key_ptr, value_ptr, output_ptr, lse_ptr,
    query_b, query_h, query_s, key_b, key_h, key_t, value_b, value_h, value_t, output_b, output_h, output_s,
    S, T, sink, window, scale_log2,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PACK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Compute a tile's output; with ``TMA`` keys and values are descriptors of blocks, else addresses."""
    batch, kv_head, head_M, i_M, first, last = _tile(S, T, G, M, PACK)
    row_M = i_M - (T - S)
    real_M = i_M < T
    mask = real_M[:, None]
    query = tl.load(_rows(query_ptr, batch, head_M, row_M, query_b, query_h, query_s, D), mask=mask, other=0.0)
    if not TMA:
        key_ptr += batch * key_b + kv_head * key_h
        value_ptr += batch * value_b + kv_head * value_h

    acc = tl.zeros([M, D], tl.float32)
    top = tl.full([M], -1e30, tl.float32)  # finite, so that a block without a visible key leaves no NaN
    total = tl.zeros([M], tl.float32)
    sinks, start, count = _blocks(first, last, sink, window, N)
    for n in tl.range(0, count):
        begin, end, masked = _block(n, sinks, start, first, last, sink, window, N)
        if TMA:
            key = key_ptr.load([batch.to(tl.int32), kv_head.to(tl.int32), begin, 0]).reshape([N, D])
        else:
            key = _load(key_ptr, begin, key_t, T, N, D)
        score = tl.dot(query, key.T)
        if masked:
            j_N = begin + tl.arange(0, N)
            score = tl.where(_mask(i_M, j_N, sink, window, end), score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1) * scale_log2)
        weight = tl.exp2(score * scale_log2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, 1)
        if TMA:
            value = value_ptr.load([batch.to(tl.int32), kv_head.to(tl.int32), begin, 0]).reshape([N, D])
        else:
            value = _load(value_ptr, begin, value_t, T, N, D)
        acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None])
        top = new_top

    output = (acc / total[:, None]).to(output_ptr.dtype.element_ty)
    tl.store(_rows(output_ptr, batch, head_M, row_M, output_b, output_h, output_s, D), output, mask=mask)
    if lse_ptr is not None:
        heads = tl.num_programs(1) * PACK
        tl.store(lse_ptr + (batch * heads + head_M) * S + row_M, (top + tl.log2(total)) / LOG2E, mask=real_M)


@triton.jit(do_not_specialize=SIZES)
def _query_gradient(
    query_ptr, key_ptr, value_ptr, grad_ptr, lse_ptr, delta_ptr, dquery_ptr,
    query_b, query_h, query_s, key_b, key_h, key_t, value_b, value_h, value_t, grad_b, grad_h, grad_s,
    dquery_b, dquery_h, dquery_s,
    S, T, sink, window, scale, scale_log2,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    batch, kv_head, head_M, i_M, first, last = _tile(S, T, G, M, PACK)
    row_M = i_M - (T - S)
    real_M = i_M < T
    mask = real_M[:, None]
    query = tl.load(_rows(query_ptr, batch, head_M, row_M, query_b, query_h, query_s, D), mask=mask, other=0.0)
    grad = tl.load(_rows(grad_ptr, batch, head_M, row_M, grad_b, grad_h, grad_s, D), mask=mask, other=0.0)
    statistics = (batch * tl.num_programs(1) * PACK + head_M) * S + row_M
    lse_M = tl.load(lse_ptr + statistics, mask=real_M, other=0.0) * LOG2E
    delta_M = tl.load(delta_ptr + statistics, mask=real_M, other=0.0)
    key_ptr += batch * key_b + kv_head * key_h
    value_ptr += batch * value_b + kv_head * value_h

    acc = tl.zeros([M, D], tl.float32)
    sinks, start, count = _blocks(first, last, sink, window, N)
    for n in tl.range(0, count):
        begin, end, masked = _block(n, sinks, start, first, last, sink, window, N)
        key = _load(key_ptr, begin, key_t, T, N, D)
        value = _load(value_ptr, begin, value_t, T, N, D)
        weight = tl.exp2(tl.dot(query, key.T) * scale_log2 - lse_M[:, None])
        if masked:
            j_N = begin + tl.arange(0, N)
            weight = tl.where(_mask(i_M, j_N, sink, window, end), weight, 0.0)
        score_grad = weight * (tl.dot(grad, value.T) - delta_M[:, None])
        acc = tl.dot(score_grad.to(key.dtype), key, acc)
    dquery = (acc * scale).to(dquery_ptr.dtype.element_ty)
    tl.store(_rows(dquery_ptr, batch, head_M, row_M, dquery_b, dquery_h, dquery_s, D), dquery, mask=mask)


@triton.jit(do_not_specialize=[*SIZES, "splits"])
def _key_gradient(
    query_ptr, key_ptr, value_ptr, grad_ptr, lse_ptr, delta_ptr, dkey_ptr, dvalue_ptr,
    query_b, query_h, query_s, key_b, key_h, key_t, value_b, value_h, value_t, grad_b, grad_h, grad_s,
    out_split, out_b, out_h, out_t,
    S, T, sink, window, scale, scale_log2, splits,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """
    Compute the gradients of a block of keys and values.

    They come from the queries whose window reaches it, or (``FAR``) from a split of the later queries, which only see
    its sink keys.
    """
    batch, kv_head = (tl.program_id(2) // splits).to(tl.int64), tl.program_id(1).to(tl.int64)
    split = tl.program_id(2) % splits
    start = tl.program_id(0) * N
    columns = tl.arange(0, D)
    j_N = start + tl.arange(0, N)
    key = _load(key_ptr + batch * key_b + kv_head * key_h, start, key_t, T, N, D)
    value = _load(value_ptr + batch * value_b + kv_head * value_h, start, value_t, T, N, D)

    begin, end = tl.maximum(start, T - S), tl.minimum(T, start + N - 1 + window)
    if FAR:
        begin = tl.maximum(end, T - S)
        share = tl.cdiv(tl.cdiv(tl.maximum(T - begin, 0), splits), M) * M
        begin += split * share
        end = tl.minimum(T, begin + share)

    dkey, dvalue = tl.zeros([N, D], tl.float32), tl.zeros([N, D], tl.float32)
    for group in range(G):
        head = kv_head * G + group
        statistics = (batch * tl.num_programs(1) * G + head) * S
        query_head = query_ptr + batch * query_b + head * query_h
        grad_head = grad_ptr + batch * grad_b + head * grad_h
        for first in tl.range(begin, end, M):
            i_M = first + tl.arange(0, M)
            real_M = i_M < end
            row = first - (T - S)
            query = _load(query_head, row, query_s, S, M, D)
            grad = _load(grad_head, row, grad_s, S, M, D)
            lse_M = tl.load(lse_ptr + statistics + i_M - (T - S), mask=real_M, other=0.0) * LOG2E
            delta_M = tl.load(delta_ptr + statistics + i_M - (T - S), mask=real_M, other=0.0)
            weight = tl.exp2(tl.dot(key, query.T) * scale_log2 - lse_M[None, :])
            mask = tl.trans(_mask(i_M, j_N, sink, window, T)) & real_M[None, :]
            weight = tl.where(mask, weight, 0.0)
            dvalue = tl.dot(weight.to(grad.dtype), grad, dvalue)
            score_grad = weight * (tl.dot(value, grad.T) - delta_M[None, :])
            dkey = tl.dot(score_grad.to(query.dtype), query, dkey)

    offset = split * out_split + batch * out_b + kv_head * out_h + j_N.to(tl.int64)[:, None] * out_t + columns[None, :]
    real = (j_N < T)[:, None]
    tl.store(dkey_ptr + offset, (dkey * scale).to(dkey_ptr.dtype.element_ty), mask=real)
    tl.store(dvalue_ptr + offset, dvalue.to(dvalue_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["S"])
def _delta(
    output_ptr, grad_ptr, delta_ptr, output_b, output_h, output_s, grad_b, grad_h, grad_s, S,
    D: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Sum output × its gradient over D."""
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * M
    output = _load(output_ptr + batch * output_b + head * output_h, start, output_s, S, M, D)
    grad = _load(grad_ptr + batch * grad_b + head * grad_h, start, grad_s, S, M, D)
    rows = start + tl.arange(0, M)
    delta_M = tl.sum(output.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + (batch * tl.num_programs(1) + head) * S + rows, delta_M, mask=rows < S)


# --- Launching --------------------------------------------------------------------------------------------------


def _pack(groups: int, limit: int) -> int:
    """Count the heads of a group that share a tile: with more of them it spans fewer positions, so less is masked."""
    return min(limit, groups & -groups)


def _rows_contiguous(states: torch.Tensor) -> torch.Tensor:
    return states if states.stride(-1) == 1 else states.contiguous()


def _blocks_of(states_BKTD: torch.Tensor, rows: int) -> TensorDescriptor:
    """Describe blocks of a head's rows for TMA, which takes rows in one piece, each at a multiple of 16 bytes."""
    *strides, last = states_BKTD.stride()
    steps = (states_BKTD.data_ptr(), *(stride * states_BKTD.element_size() for stride in strides))
    if last != 1 or min(strides) <= 0 or any(step % 16 for step in steps):
        states_BKTD = states_BKTD.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor(states_BKTD, states_BKTD.shape, states_BKTD.stride(), [1, 1, rows, states_BKTD.shape[-1]])


def _like(states_BHSD: torch.Tensor) -> torch.Tensor:
    """Make an empty tensor of that shape, heads inside positions: what the output projection reads without a copy."""
    batch, heads, length, dim = states_BHSD.shape
    return states_BHSD.new_empty(batch, length, heads, dim).transpose(1, 2)


def _run_forward(query, key, value, sink, window, scale, with_lse):
    batch, heads, length, dim = query.shape
    groups = heads // key.shape[1]
    tile = forward_tile(dim, batch * length, shared_memory(query.device), capability(query.device))
    pack = _pack(groups, tile.pop("max_pack"))
    output = _like(query)
    lse = query.new_empty(batch, heads, length, dtype=torch.float32) if with_lse else None
    grid = (triton.cdiv(length, tile["M"] // pack), heads // pack, batch)
    blocks = [_blocks_of(states, tile["N"]) for states in (key, value)] if tile["TMA"] else (key, value)
    with on_device(query):
        _forward[grid](
            query, *blocks, output, lse,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
            length, key.shape[2], sink, window, scale * LOG2E.value,
            G=groups, D=dim, PACK=pack, **tile,
        )  # fmt: skip
    return output, lse


def forward_tile(dim: int, queries: int, shared: int, capability: tuple[int, int]) -> dict[str, int]:
    """Choose the forward kernel's tile, for thread blocks that may use ``shared`` bytes of shared memory."""
    # The host takes longer to describe blocks than a short prompt takes the device.
    tma = capability >= (9, 0) and queries >= MIN_TMA_QUERIES
    tile = dict(M=64, N=64, num_warps=4, num_stages=2, max_pack=4, TMA=tma)
    if dim > 128:
        return tile | dict(N=32)
    if tma and capability < (12, 0):
        # Tiles that read half as much from L2, in few enough registers for two thread blocks on an SM.
        return tile | dict(M=128, num_warps=8, maxnreg=128)
    # Small tiles, so that two thread blocks share an SM and one computes while the other takes its softmax. Three
    # stages take up to 112 KiB, two 80 KiB: consumer GPUs have 99.
    return tile | dict(num_stages=3 if shared >= 140_000 or dim <= 64 else 2)


def backward_tile(dim: int) -> dict[str, int]:
    """Choose the backward kernels' tile."""
    side = 64 if dim <= 128 else 32
    return dict(M=side, N=side, num_warps=4, num_stages=2)


def _run_backward(query, key, value, output, lse, grad, sink, window, scale):
    batch, heads, length, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    groups = heads // kv_heads
    pack = _pack(groups, 4)
    tile = backward_tile(dim)
    M, N = tile["M"], tile["N"]
    grad = _rows_contiguous(grad)
    delta = torch.empty_like(lse)
    _delta[(triton.cdiv(length, 64), heads, batch)](
        output, grad, delta, *output.stride()[:3], *grad.stride()[:3], length, D=dim, M=64
    )
    strides = *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride()[:3]
    dquery, dkey, dvalue = _like(query), _like(key), _like(key)
    constants = dict(G=groups, D=dim, **tile)
    _query_gradient[(triton.cdiv(length, M // pack), heads // pack, batch)](
        query, key, value, grad, lse, delta, dquery, *strides, *dquery.stride()[:3],
        length, keys, sink, window, scale, scale * LOG2E.value, PACK=pack, **constants,
    )  # fmt: skip
    _key_gradient[(triton.cdiv(keys, N), kv_heads, batch)](
        query, key, value, grad, lse, delta, dkey, dvalue, *strides, 0, *dkey.stride()[:3],
        length, keys, sink, window, scale, scale * LOG2E.value, 1, FAR=False, **constants,
    )  # fmt: skip
    sinks = min(sink, keys)
    if sinks and keys > window:  # queries behind the window see the sink keys: many queries, few keys
        splits = max(1, min(64, keys // 1024))
        blocks = triton.cdiv(sinks, N)
        far = query.new_zeros(2, splits, batch, kv_heads, blocks * N, dim, dtype=torch.float32)
        _key_gradient[(blocks, kv_heads, batch * splits)](
            query, key, value, grad, lse, delta, far[0], far[1], *strides, *far.stride()[1:5],
            length, keys, sink, window, scale, scale * LOG2E.value, splits, FAR=True, **constants,
        )  # fmt: skip
        for states, extra in zip((dkey, dvalue), far.sum(1), strict=True):
            states[:, :, :sinks] += extra[:, :, :sinks].to(states.dtype)
    return dquery, dkey, dvalue


@torch.library.custom_op("flux_attention::streaming", mutates_args=())
def streaming(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sink: int, window: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute output and log-sum-exp; an operator, as gradient checkpointing can keep what an operator gave."""
    return _run_forward(query, key, value, sink, window, scale, with_lse=True)


@streaming.register_fake
def _(query, key, value, sink, window, scale):
    return _like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.settings = inputs[3:]


def _gradients(ctx, grad, _):
    with on_device(grad):
        return *_run_backward(*ctx.saved_tensors, grad, *ctx.settings), None, None, None


streaming.register_autograd(_gradients, setup_context=_keep)


def attention(
    query_BHSD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    sink: int,
    window: int,
    scale: float,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """
    Compute attention of the last S of T positions to the first ``sink`` keys and the latest ``window`` ones.

    Differentiable; gradients do not flow through the log-sum-exp.

    Parameters
    ----------
    query_BHSD, key_BKTD, value_BKTD : torch.Tensor
        On an NVIDIA GPU, any strides; of ``kernels.DTYPES`` and ``kernels.HEAD_DIMS``.
    sink, window : int
        Tokens; ``window`` = T is causal attention.
    scale : float
        Positive.
    return_lse : bool
        Return the log-sum-exp of each query's scores too: float32 (B, H, S), natural logarithm.
    """
    query, key, value = map(_rows_contiguous, (query_BHSD, key_BKTD, value_BKTD))
    # In training the operator also where gradients are off, so that checkpointing sees it there, too; and in what is
    # compiled, as a launch reads addresses.
    if torch.compiler.is_compiling() or any(states.requires_grad for states in (query, key, value)):
        output, lse = streaming(query, key, value, sink, window, scale)
    else:
        output, lse = _run_forward(query, key, value, sink, window, scale, return_lse)
    return (output, lse) if return_lse else output
