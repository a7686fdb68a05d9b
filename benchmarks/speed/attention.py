"""Times one layer's attention on a GPU: own kernels against PyTorch's and FlexAttention, in one run, beside the floor.

Every function yields result rows (the contract of ``results``) as they are measured.

Shape suffixes: B batch, S query length, T key length, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from flux_attention import kernels
from flux_attention.kernels import dense as dense_kernel
from flux_attention.kernels.split_table import FULL, RING, split_table
from flux_attention.patterns import Full
from flux_attention.sizes import SHAPES
from speed.timing import DTYPE, PATTERN, floor_ms, measure, measure_graph, measure_graphs, require_gpu, row

BACKENDS = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}


def _sizes(shape: str) -> tuple[int, int, int]:
    sizes = SHAPES[shape]
    return sizes["num_attention_heads"], sizes["num_key_value_heads"], sizes["head_dim"]


def _states(batch: int, heads: int, length: int, dim: int) -> torch.Tensor:
    """Make random states as a projection gives them: heads inside positions."""
    return torch.randn(batch, length, heads, dim, device="cuda", dtype=DTYPE).transpose(1, 2)


def _sdpa(backend: str, query, key, value, causal: bool):
    with sdpa_kernel(BACKENDS[backend]):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)


def _heads_of(sparsities: Sequence[float], kv_heads: int) -> list[int]:
    """List how many KV heads of a layer are sparse at these ratios: neither none nor all."""
    return sorted({round(sparsity * kv_heads) for sparsity in sparsities} - {0, kv_heads})


def _mean(share: float, sparse: dict[str, float], full: dict[str, float]) -> dict[str, float]:
    """Return a layer's mean time where this share of the layers is sparse."""
    return {name: share * sparse[name] + (1 - share) * full[name] for name in ("ms", "ms_min", "ms_max")}


def _compiled_flex():
    """Compile FlexAttention for one size: earlier ones would count towards the compiler's limit of versions."""
    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False)


def attention_prefill(shape: str, lengths: Sequence[int], sparsities: Sequence[float]) -> Iterator[dict[str, Any]]:
    """
    Measure one layer's prefill, in CUDA graphs: dense, streaming, and streaming on a share of the KV heads (``head``).

    Yields
    ------
    dict
        Engines ``sdpa-cudnn`` and ``sdpa-flash`` (dense); ``flux``, dense, against ``sdpa-cudnn`` where it is another,
        and for the last ``queries`` only against ``sdpa-cudnn-unmasked``, which reads the same keys; ``flux``,
        streaming, against ``sdpa-cudnn`` and against ``flex`` (compiled FlexAttention, its block mask built beforehand;
        ``mask_ms`` is what that takes); method ``head`` against ``routed``, the mean over layers of which the same
        share is sparse. ``tflops`` counts exactly the pairs that the pattern asks for, ``floor_ms`` is those over the
        measured rate of matrix products.
    """
    require_gpu()
    for length in lengths:
        yield from _prefill_at(shape, length, sparsities)


def _prefill_at(shape: str, length: int, sparsities: Sequence[float]) -> Iterator[dict[str, Any]]:
    heads, kv_heads, dim = _sizes(shape)
    groups, scale = heads // kv_heads, dim**-0.5
    query, key, value = (_states(1, count, length, dim) for count in (heads, kv_heads, kv_heads))
    facts = dict(shape=shape, seq_len=length, batch=1, phase="prefill")
    timed = partial(measure_graph, launches=10 if length <= 2**15 else 1)

    def floor(flops):
        return {"floor_ms": round(floor_ms(flops, "matmul_tflops"), 5)}

    def rate(times, pairs):
        flops = 4 * pairs * heads * dim
        return {"tflops": round(flops / times["ms"] / 1e9, 1), **floor(flops)}

    sdpa = {name: timed(partial(_sdpa, name, query, key, value, True)) for name in BACKENDS}
    pairs = Full().pairs(length)
    for name, times in sdpa.items():
        yield row(times, "", None, **facts, sparsity=0.0, engine=name, method="dense", **rate(times, pairs))
    full, dense = sdpa["sdpa-cudnn"], dict(facts, sparsity=0.0, engine="flux", method="dense")
    if length >= dense_kernel.MIN_PROMPT:
        both = (partial(_sdpa, "sdpa-cudnn", query, key, value, True), partial(kernels.full, query, key, value, scale))
        base, full = measure_graphs(both, 1)  # in turn, as they differ in the power that they draw
        yield row(full, "sdpa-cudnn", base, **dense, **rate(full, pairs))
    for last in (128, 8192):  # triangle's last rows, and a later part of a prompt
        if last < length:
            few = query[:, :, -last:]
            ours = timed(partial(kernels.full, few, key, value, scale))
            base = timed(partial(_sdpa, "sdpa-cudnn", few, key, value, False))
            late = pairs - Full().pairs(length - last)
            yield row(ours, "sdpa-cudnn-unmasked", base, **dense, queries=last, **rate(ours, late))
    ours = timed(partial(kernels.streaming, query, key, value, PATTERN.sink, PATTERN.window, scale))
    sparse = dict(facts, sparsity=1.0, engine="flux", method="sparse", **rate(ours, PATTERN.pairs(length)))
    yield row(ours, "sdpa-cudnn", sdpa["sdpa-cudnn"], **sparse)

    def seen(b, h, q, k):
        return (q >= k) & ((k < PATTERN.sink) | (q - k < PATTERN.window))

    build = partial(create_block_mask, seen, None, None, length, length, device="cuda", _compile=True)
    flex = _compiled_flex()
    flexed = timed(partial(flex, query, key, value, block_mask=build(), scale=scale, enable_gqa=True))
    yield row(ours, "flex", flexed, **sparse, mask_ms=round(measure(build, seconds=0.1)["ms"], 4))

    def by_head(few):
        first = few * groups
        kernels.full(query[:, first:], key[:, few:], value[:, few:], scale)
        kernels.streaming(query[:, :first], key[:, :few], value[:, :few], PATTERN.sink, PATTERN.window, scale)

    for few in _heads_of(sparsities, kv_heads):
        share = few / kv_heads
        mean = _mean(share, ours, full)
        flops = 4 * (share * PATTERN.pairs(length) + (1 - share) * Full().pairs(length)) * heads * dim
        yield row(timed(partial(by_head, few)), "routed", mean, **facts, sparsity=share, engine="flux",
                  method="head", **floor(flops))  # fmt: skip


class _Rows:
    """Holds random caches for the decode kernel, several of them so that none stays in the GPU's own cache."""

    def __init__(self, lengths: Sequence[int], kinds: Sequence[int], heads: int, kv_heads: int, dim: int):
        from flux_attention.kernels.triton_decode import DecodeWorkspace

        kept = PATTERN.sink + PATTERN.window
        held = [min(length, kept) if kind == RING else length for length, kind in zip(lengths, kinds, strict=True)]
        self.bytes = 4 * sum(held) * kv_heads * dim
        self.floor_ms = round(floor_ms(self.bytes, "copy_tbps"), 5)
        batch, device = len(lengths), torch.device("cuda")
        self.workspace = DecodeWorkspace(batch, heads, kv_heads, dim, device)
        self.buffers, tables = [], []
        for _ in range(max(1, int(3e8 / self.bytes)) + 1):
            rows = [
                torch.randn(2, kv_heads, max(count, kept), dim, device="cuda", dtype=DTYPE)[:, :, :count]
                for count in held
            ]
            self.buffers.append(rows)
            table = [
                [row[0].data_ptr(), row[1].data_ptr(), row.stride(1), kind]
                for row, kind in zip(rows, kinds, strict=True)
            ]
            tables.append(split_table(table, list(lengths), PATTERN.sink, PATTERN.window, self.workspace.programs))
        self.tables = itertools.cycle([torch.tensor(table, device="cuda") for table in tables])
        self.lengths = torch.tensor([length - 1 for length in lengths], dtype=torch.int32, device="cuda")
        self.states = [
            torch.randn(batch, count, dim, device="cuda", dtype=DTYPE) for count in (heads, kv_heads, kv_heads)
        ]
        self.scale = dim**-0.5

    def run(self):
        from flux_attention.kernels.triton_decode import attend

        return attend(
            *self.states, next(self.tables), self.lengths, self.workspace, PATTERN.sink, PATTERN.window, self.scale
        )


def attention_decode(
    shape: str, lengths: Sequence[int], batches: Sequence[int], sparsities: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """
    Measure one layer's decode step, in CUDA graphs: full rows, sparse ones, rows with a share of their KV heads sparse.

    Yields
    ------
    dict
        Engine ``flux`` against ``sdpa-cudnn`` and ``sdpa-flash`` over the same keys, with ``tbps`` (TB/s of keys and
        values) and ``floor_ms`` (their bytes over the copy bandwidth); method ``head`` against ``routed``, the mean
        over layers of which the same share is sparse; and, for a sparse sequence or a batch of which every other one is
        sparse, against ``flex`` with its block mask rebuilt in the step.
    """
    require_gpu()
    for batch, length in itertools.product(batches, lengths):
        if batch * length <= 2**20:
            yield from _decode_at(shape, length, batch, sparsities)


def _decode_at(shape: str, length: int, batch: int, sparsities: Sequence[float]) -> Iterator[dict[str, Any]]:
    heads, kv_heads, dim = _sizes(shape)
    facts = dict(shape=shape, seq_len=length, batch=batch, phase="decode", engine="flux")
    query = torch.randn(batch, heads, 1, dim, device="cuda", dtype=DTYPE)
    measured = {}
    for kind, method in ((FULL, "dense"), (RING, "sparse")):
        rows = _Rows([length] * batch, [kind] * batch, heads, kv_heads, dim)
        measured[kind] = times = measure_graph(rows.run)
        rate = {"tbps": round(rows.bytes / times["ms"] / 1e9, 3), "floor_ms": rows.floor_ms}
        stacked = itertools.cycle([torch.stack(buffers, dim=1) for buffers in rows.buffers])
        del rows
        for backend in BACKENDS:
            base = measure_graph(lambda backend=backend, stacked=stacked: _sdpa(backend, query, *next(stacked), False))
            yield row(times, backend, base, **facts, sparsity=float(method == "sparse"), method=method, **rate)
        if method == "dense":
            yield _beside_flex(facts, query, *next(stacked))
        del stacked
    for few in _heads_of(sparsities, kv_heads):
        share, together = few / kv_heads, math.gcd(few, kv_heads)
        mean = _mean(share, measured[RING], measured[FULL])
        # The full and the sparse heads of a row as rows of their own, all of as many heads.
        kinds = [FULL] * ((kv_heads - few) // together) + [RING] * (few // together)
        parts = _Rows([length] * len(kinds) * batch, kinds * batch, heads * together // kv_heads, together, dim)
        yield row(measure_graph(parts.run), "routed", mean, **facts, sparsity=share, method="head",
                  floor_ms=parts.floor_ms)  # fmt: skip


def _beside_flex(facts: dict[str, Any], query, key, value) -> dict[str, Any]:
    """Time FlexAttention with a mask made for the step, on a sparse sequence, or several full and sparse in turn."""
    batch, kv_heads, length, dim = key.shape
    kinds = [RING if row % 2 or batch == 1 else FULL for row in range(batch)]
    route = torch.tensor([kind == FULL for kind in kinds], device="cuda")

    def seen(b, h, q, k):
        return route[b] | (k < PATTERN.sink) | (length - k <= PATTERN.window)

    flex = _compiled_flex()

    def rebuilt():
        mask = create_block_mask(seen, batch, None, 1, length, device="cuda", _compile=True)
        return flex(query, key, value, block_mask=mask, enable_gqa=True)

    rows = _Rows([length] * batch, kinds, query.shape[1], kv_heads, dim)
    # Both launched one by one: building the mask cannot be captured.
    share, method = kinds.count(RING) / batch, "sparse" if batch == 1 else "routed"
    return row(measure(rows.run), "flex", measure(rebuilt), **facts, sparsity=share, method=method,
               floor_ms=rows.floor_ms)  # fmt: skip
