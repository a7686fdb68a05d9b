"""Launches the Triton kernels of sink + window attention: for batches of one length, and for packs of sequences.

Shape suffixes: B batch, S query length (of a pack, its tokens), T key length, H query heads, K KV heads, D head dim,
N spans.
"""

from __future__ import annotations

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from flux_attention.kernels.device import capability, on_device, shared_memory
from flux_attention.kernels.packs import Pack
from flux_attention.kernels.triton_attention import LOG2E, _delta, _forward, _key_gradient, _query_gradient

#: Queries of a call from which TMA loads keys and values.
MIN_TMA_QUERIES = 2**13


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


def _run_forward(query, key, value, sink, window, scale, with_lse, tables=None):
    batch, heads, length, dim = query.shape
    groups = heads // key.shape[1]
    tile = forward_tile(dim, batch * length, shared_memory(query.device), capability(query.device))
    pack = _pack(groups, tile.pop("max_pack"))
    output = _like(query)
    lse = query.new_empty(batch, heads, length, dtype=torch.float32) if with_lse else None
    step, tiles, sizes = tile["M"] // pack, *(tables or (None, None))
    grid = (triton.cdiv(length, step) if tiles is None else len(tiles), heads // pack, batch)
    blocks = [_blocks_of(states, tile["N"]) for states in (key, value)] if tile["TMA"] else (key, value)
    with on_device(query):
        _forward[grid](
            query, *blocks, output, lse, tiles, sizes,
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


class _Backward:
    """What the backward kernels of one call have in common; ``grads`` are of query, key and value."""

    def __init__(self, query, key, value, output, lse, grad, scale):
        batch, heads, length, dim = query.shape
        grad, delta = _rows_contiguous(grad), torch.empty_like(lse)
        _delta[(triton.cdiv(length, 64), heads, batch)](
            output, grad, delta, *output.stride()[:3], *grad.stride()[:3], length, D=dim, M=64
        )
        self.states = query, key, value, grad, lse, delta
        self.strides = *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride()[:3]
        self.grads = _like(query), _like(key), _like(key)
        self.scales = scale, scale * LOG2E.value
        self.pack = _pack(heads // key.shape[1], 4)
        self.constants = dict(G=heads // key.shape[1], D=dim, **backward_tile(dim))

    def query_gradient(self, count: int, tables, *sizes: int) -> None:
        heads, batch = self.states[0].shape[1], len(self.states[0])
        dquery = self.grads[0]
        _query_gradient[(count, heads // self.pack, batch)](
            *self.states, dquery, *tables, *self.strides, *dquery.stride()[:3], *sizes, *self.scales,
            PACK=self.pack, **self.constants,
        )  # fmt: skip

    def key_gradient(self, grid, dkey, dvalue, tables, out_strides, *sizes: int, splits: int = 1, far: bool) -> None:
        _key_gradient[grid](
            *self.states, dkey, dvalue, *tables, *self.strides, *out_strides, *sizes, *self.scales, splits,
            FAR=far, **self.constants,
        )  # fmt: skip


def _run_backward(query, key, value, output, lse, grad, sink, window, scale):
    run = _Backward(query, key, value, output, lse, grad, scale)
    batch, length, dim = len(query), *query.shape[2:]
    kv_heads, keys = key.shape[1:3]
    N, sizes, none = run.constants["N"], (length, keys, sink, window), (None, None, None)
    dquery, dkey, dvalue = run.grads
    run.query_gradient(triton.cdiv(length, run.constants["M"] // run.pack), none[:2], *sizes)
    grid = (triton.cdiv(keys, N), kv_heads, batch)
    run.key_gradient(grid, dkey, dvalue, none, (0, *dkey.stride()[:3]), *sizes, far=False)
    sinks = min(sink, keys)
    if sinks and keys > window:  # queries behind the window see the sink keys: many queries, few keys
        splits = max(1, min(64, keys // 1024))
        blocks = triton.cdiv(sinks, N)
        parts = query.new_zeros(2, splits, batch, kv_heads, blocks * N, dim, dtype=torch.float32)
        grid = (blocks, kv_heads, batch * splits)
        run.key_gradient(grid, *parts, none, parts.stride()[1:5], *sizes, splits=splits, far=True)
        for states, extra in zip((dkey, dvalue), parts.sum(1), strict=True):
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


# --- Packs ------------------------------------------------------------------------------------------------------------


def _forward_tiles(pack: Pack, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    device = query.device
    tile = forward_tile(query.shape[3], query.shape[2], shared_memory(device), capability(device))
    return pack.tiles(tile["M"] // _pack(query.shape[1] // key.shape[1], tile["max_pack"]), device)


def _backward_tables(pack: Pack, query: torch.Tensor, key: torch.Tensor) -> list[torch.Tensor]:
    groups, device, back = query.shape[1] // key.shape[1], query.device, backward_tile(query.shape[3])
    N = back["N"]
    return [
        pack.tiles(back["M"] // _pack(groups, 4), device),
        pack.key_blocks(N, device),
        pack.bounds(device),
        pack.sink_work(N, device),
        *pack.sink_sums(N, device),
    ]


def _run_packed_backward(query, key, value, output, lse, grad, sizes_N2, tables, scale):
    run = _Backward(query, key, value, output, lse, grad, scale)
    _, tiles, blocks, bounds, work, owner, places, rows = tables
    counts = query.shape[2], key.shape[2], 0, 0  # what spans see is in the tables
    dquery, dkey, dvalue = run.grads
    kv_heads, N, dim = key.shape[1], run.constants["N"], key.shape[3]
    run.query_gradient(len(tiles), (tiles, sizes_N2), *counts)
    grid, tables = (len(blocks), kv_heads, 1), (blocks, bounds, sizes_N2)
    run.key_gradient(grid, dkey, dvalue, tables, (0, *dkey.stride()[:3]), *counts, far=False)
    if len(work):
        parts = query.new_zeros(2, len(work), kv_heads, N, dim, dtype=torch.float32)
        strides = parts.stride(1), 0, parts.stride(2), parts.stride(3)
        run.key_gradient((len(work), kv_heads, 1), *parts, (work, bounds, sizes_N2), strides, *counts, far=True)
        for states, extra in zip((dkey, dvalue), parts.flatten(2), strict=True):
            summed = (owner @ extra).view(-1, kv_heads, N, dim).transpose(0, 1).flatten(1, 2)
            states[0].index_add_(1, rows, summed[:, places].to(states.dtype))  # each row once
    return dquery, dkey, dvalue


@torch.library.custom_op("flux_attention::packed", mutates_args=())
def packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sizes: torch.Tensor,
    tables: list[torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute output and log-sum-exp of a pack; an operator, as gradient checkpointing can keep what it gave."""
    return _run_forward(query, key, value, 0, 0, scale, True, (tables[0], sizes))


@packed.register_fake
def _(query, key, value, sizes, tables, scale):
    return _like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _keep_packed(ctx, inputs, output):
    *states, sizes, tables, ctx.scale = inputs
    ctx.save_for_backward(*states, *output, sizes, *tables)


def _packed_gradients(ctx, grad, _):
    query, key, value, output, lse, sizes, *tables = ctx.saved_tensors
    with on_device(grad):
        gradients = _run_packed_backward(query, key, value, output, lse, grad, sizes, tables, ctx.scale)
    return *gradients, None, [None] * len(tables), None


packed.register_autograd(_packed_gradients, setup_context=_keep_packed)


def packed_attention(
    query_1HSD, key_1KSD, value_1KSD, pack: Pack, sizes_N2: torch.Tensor, scale: float
) -> torch.Tensor:
    """Compute attention within the sequences of a pack, differentiably; see ``kernels.packed``."""
    query, key, value = map(_rows_contiguous, (query_1HSD, key_1KSD, value_1KSD))
    tiles = _forward_tiles(pack, query, key)
    if torch.compiler.is_compiling() or any(states.requires_grad for states in (query, key, value)):
        tables = [tiles, *_backward_tables(pack, query, key)]
        return packed(query, key, value, sizes_N2, tables, scale)[0]
    return _run_forward(query, key, value, 0, 0, scale, False, (tiles, sizes_N2))[0]


# --- Batches ----------------------------------------------------------------------------------------------------------


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
