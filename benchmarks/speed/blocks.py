"""Times block-sparse prefill on a GPU: one layer's search and attention by density, and whole models.

Every function yields result rows (the contract of ``results``) as they are measured. Random weights attend to nothing
in particular. So one layer gets states of topics: runs of tokens that attend to their own topic and to the first
tokens, which selections find again; whole models get thresholds that select as many blocks.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from flux_attention import kernels
from flux_attention.config import FluxConfig
from flux_attention.hf.attach import attach
from flux_attention.kernels.block_sparse import BLOCK
from flux_attention.patterns import BlockSparse, Full
from speed.attention import _sizes
from speed.model import ENGINES, random_model
from speed.timing import DTYPE, PATTERN, measure_graphs, measure_in_turn, require_gpu, row

#: Tokens of a run of one topic, topics, and how much louder than noise they are.
RUN, TOPICS, LOUD = 512, 48, 0.7


def states_of_topics(heads: int, kv_heads: int, length: int, dim: int) -> list[torch.Tensor]:
    """Make queries, keys and values as a projection gives them; each KV head has topics of its own."""
    of_run = torch.randint(TOPICS, (-(-length // RUN),), device="cuda").repeat_interleave(RUN)[:length]
    topics = torch.randn(kv_heads, TOPICS, dim, device="cuda")

    def made(count: int, loud: float):
        noise = torch.randn(1, length, count, dim, device="cuda", dtype=DTYPE)
        for head in range(count):
            noise[0, :, head] += (loud * topics[head // (count // kv_heads)][of_run]).to(DTYPE)
        return noise.transpose(1, 2)

    query, key, value = made(heads, LOUD), made(kv_heads, LOUD), made(kv_heads, 0.0)
    key[:, :, :BLOCK] += query[:, :: heads // kv_heads].mean(2, keepdim=True)
    return [query, key, value]


def _select(query, key, mass: bool, stride: int, share: torch.Tensor, counted: bool = False):
    """Select all blocks, some rows at a time; return the mean share of the pairs of blocks, where it is asked for."""
    from flux_attention.kernels.triton_block_scores import select_blocks
    from flux_attention.kernels.triton_block_sparse import rows_at_once

    total, found = -(-key.shape[2] // BLOCK), 0
    step = rows_at_once(query, key, stride)
    for first in range(0, total, step):
        count = min(step, total - first)
        _, counts, *_ = select_blocks(query, key, stride, query.shape[3] ** -0.5, share, mass, first, count)
        if counted:
            found += counts.sum().item()
    return found / (len(query) * query.shape[1] * total * (total + 1) / 2) if counted else None


def threshold_of(query, key, mass: bool, stride: int, density: float) -> tuple[torch.Tensor, float]:
    """Search the threshold that selects a share of the blocks, for all heads; return it and the share it selects."""
    low, high = 0.0, 1.0
    for _ in range(24):  # of made-up states those that are not of a topic score much alike
        share = torch.tensor([(low + high) / 2], device="cuda")
        found = _select(query, key, mass, stride, share, counted=True)
        more = found < density
        low, high = (share.item(), high) if more == mass else (low, share.item())
    return share, found


def blocks(shape: str, lengths: Sequence[int], densities: Sequence[float]) -> Iterator[dict[str, Any]]:
    """
    Measure one layer's block-sparse prefill, in CUDA graphs, against what full layers run otherwise.

    Short prompts, in which search takes more than it saves, say what ``kernels.block_sparse_from`` returns.

    Yields
    ------
    dict
        ``density`` of the causal blocks is selected; ``search_ms`` is what scores and selection take, ``attend_ms`` the
        rest; ``tflops`` counts the attention to what is selected, over ``attend_ms``.
    """
    require_gpu()
    (heads, kv_heads, dim), select, stride = _sizes(shape), BlockSparse().select, BlockSparse().stride
    for length in lengths:
        torch.cuda.empty_cache()
        query, key, value = states_of_topics(heads, kv_heads, length, dim)
        dense, launches = partial(kernels.full, query, key, value, dim**-0.5), 10 if length <= 2**15 else 1
        for density in densities:
            share, found = threshold_of(query, key, select == "mass", stride, density)
            search = partial(_select, query, key, select == "mass", stride, share)
            whole = partial(kernels.block_sparse, query, key, value, dim**-0.5, select, share, stride)
            searched, ours, base = measure_graphs((search, whole, dense), launches)
            attend = ours["ms"] - searched["ms"]
            flops = 4 * found * Full().pairs(length) * heads * dim
            yield row(
                ours, "own-dense", base, shape=shape, seq_len=length, batch=1, phase="prefill", engine="flux",
                method="block_sparse", full="block_sparse", sparsity=0.0, select=select, stride=stride,
                density=round(found, 4), threshold=round(share.item(), 7), search_ms=round(searched["ms"], 4),
                attend_ms=round(attend, 4), tflops=round(flops / attend / 1e9, 1),
                search_share=round(searched["ms"] / base["ms"], 4),
            )  # fmt: skip


def block_prefill(
    shape: str, lengths: Sequence[int], sparsity: float, density: float, compile: bool, repeats: int = 3
) -> Iterator[dict[str, Any]]:
    """
    Measure whole models' prefill: all layers dense, then with forced routes, full layers exact or block-sparse.

    Yields
    ------
    dict
        ``own-dense`` is the baseline; ``full`` says how full layers attend, ``density`` what share of their blocks was
        selected in the last of them.
    """
    require_gpu()
    routing = random_model(shape, compile)
    model = routing.model
    seen: list[float] = []

    @torch.no_grad()
    def run(ids, ratio):
        with routing.force(ratio):
            model(ids, use_cache=True, logits_to_keep=1)

    for length in lengths:
        ids = torch.randint(3, model.config.vocab_size, (1, length), device=model.device)
        facts = dict(shape=shape, seq_len=length, batch=1, phase="prefill", engine=ENGINES[compile])
        kinds = [("full", 0.0), ("full", sparsity), ("block_sparse", sparsity), ("block_sparse", 0.0)]
        times = {}
        for full in ("full", "block_sparse"):
            routing.detach()
            gc.collect()
            torch.cuda.empty_cache()
            pattern = {"pattern": "full"} if full == "full" else BlockSparse(density, "mass", from_tokens=0).to_dict()
            config = FluxConfig(sink=PATTERN.sink, window=PATTERN.window, full=pattern)
            routing = attach(model, config, compile=compile)
            mine = [kind for kind in kinds if kind[0] == full]
            runs = [partial(run, ids, ratio) for _, ratio in mine]
            times |= zip(mine, measure_in_turn(runs, seconds=5, min_repeats=repeats, warm=1), strict=True)
            if full == "block_sparse":
                seen = _density_in_model(partial(run, ids, sparsity))
        for full, ratio in kinds:
            method = "static" if ratio else "dense" if full == "full" else "block_sparse"
            more = {} if full == "full" else {"density": round(seen[-1], 4), "threshold": density}
            yield row(
                times[full, ratio], "own-dense", times["full", 0.0], **facts, sparsity=ratio, method=method, full=full,
                **more,
            )  # fmt: skip


def _density_in_model(run) -> list[float]:
    """Return the share of blocks that each full layer selects, in a prefill of its own."""
    found, block_sparse = [], kernels.block_sparse

    def watched(query, key, value, scale, select, share, stride=16, correct=False):
        share = kernels.to_device(share, query.device)
        found.append(_select(query, key, select == "mass", stride, share, counted=True))
        return block_sparse(query, key, value, scale, select, share, stride, correct)

    kernels.block_sparse = watched
    try:
        run()
    finally:
        kernels.block_sparse = block_sparse
    return found
