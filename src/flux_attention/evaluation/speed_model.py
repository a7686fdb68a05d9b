"""Timing whole models on a GPU: prefill, decode steps and memory, by length and forced sparsity, with random weights.

Every function yields result rows (the contract of ``results``) as they are measured. The baseline is the same code with
every layer full; its floor is what the hardware's ceilings allow.

Shape suffixes: B batch, K KV heads, C capacity, D head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from flux_attention.attach import Routing, attach
from flux_attention.cache import RoutedLayer, Tokens, kv_bytes
from flux_attention.config import FluxConfig
from flux_attention.evaluation.speed import DTYPE, PATTERN, SHAPES, ceilings, measure, measure_in_turn, require_gpu, row
from flux_attention.generation import decode_step
from flux_attention.patterns import Full
from flux_attention.routes import parse_routes

#: By whether layers are compiled.
ENGINES = {False: "flux", True: "flux-compile"}


def random_model(shape: str, compile: bool) -> Routing:
    """A model of a named shape with random bf16 weights on the GPU, and fresh routers attached."""
    config = AutoConfig.for_model(**SHAPES[shape], max_position_embeddings=2**20)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
    model.requires_grad_(False)
    return attach(model, FluxConfig(sink=PATTERN.sink, window=PATTERN.window), compile=compile)


def random_cache(routing: Routing, batch: int, length: int, sparsity: float) -> DynamicCache:
    """A KV cache as a prefill of ``length`` tokens leaves it, with random content."""
    base = routing.config.base_model
    routes = parse_routes(float(sparsity), 1, routing.layers)[0].tolist()
    cache = DynamicCache(config=routing.model.config)
    for layer, route in zip(routing.layers, routes, strict=True):
        cached = cache.layers[layer] = RoutedLayer(routing.pattern)
        cached.decide([route] * batch)
        cached.expect(Tokens.all_real(batch, length))
        states = torch.randn(batch, base.num_kv_heads, length, base.head_dim, device=routing.model.device, dtype=DTYPE)
        cached.update(states, states)
        cached.take_views()
        cached.store()
    return cache


def _full_layers(layers: int, sparsity: float) -> int:
    return layers - round(sparsity * layers)


def _kept(layers: int, full: int, length: int) -> int:
    """Tokens in the KV cache of one sequence, summed over the layers."""
    return full * length + (layers - full) * min(length, PATTERN.sink + PATTERN.window)


def body_and_head(routing: Routing) -> tuple[int, int]:
    """Parameters between the embeddings, and of the output embedding, which may be the input's."""
    embedding, head = routing.model.get_input_embeddings().weight, routing.model.get_output_embeddings().weight
    outside = embedding.numel() + (0 if head is embedding else head.numel())
    return sum(parameter.numel() for parameter in routing.model.parameters()) - outside, head.numel()


def _counts(routing: Routing, length: int, sparsity: float) -> dict[str, float]:
    """FLOPs of a prefill and bytes of a decode step of one sequence: attention, and everything else."""
    base = routing.config.base_model
    layers = len(routing.layers)
    full = _full_layers(layers, sparsity)
    pairs = full * Full().pairs(length) + (layers - full) * PATTERN.pairs(length)
    body, head = body_and_head(routing)
    return {
        "flops": 4 * pairs * base.num_heads * base.head_dim + 2 * body * length,
        "weight_bytes": 2 * (body + head),
        "kv_bytes": 4 * _kept(layers, full, length) * base.num_kv_heads * base.head_dim,
    }


def prefill(
    shape: str,
    lengths: Sequence[int],
    sparsities: Sequence[float],
    compile: bool,
    repeats: int = 3,
) -> Iterator[dict[str, Any]]:
    """
    Prefill of one prompt: all layers, the last token's logits.

    Parameters
    ----------
    shape : str
        A key of ``SHAPES``.
    lengths, sparsities : sequence
        Tokens; forced Ω_MSR.
    compile : bool
        See ``attach``.
    repeats : int
        Prefills that are timed at least, after one that is not.

    Yields
    ------
    dict
        ``own-dense`` is the baseline. Routes of ``static`` rows are forced; rows with ``method`` = ``routed`` (up to
        32 K, beyond which they cost nothing) run routers that decide the same, so that they show what routers cost. All
        of one length are timed in turn. ``peak_bytes`` is the most memory that was allocated, ``floor_ms`` the FLOPs
        over the measured rate of matrix products.
    """
    require_gpu()
    routing = random_model(shape, compile)
    model = routing.model
    ratios = sorted({0.0, *map(float, sparsities)})
    routers = {sparsity: _deciding(routing, sparsity) for sparsity in ratios}

    @torch.no_grad()
    def run(ids, sparsity, routed):
        routing.routers = routers[sparsity]
        with routing.force(None if routed else sparsity):
            return model(ids, use_cache=True, logits_to_keep=1).past_key_values

    for length in lengths:
        ids = torch.randint(3, model.config.vocab_size, (1, length), device=model.device)
        facts = dict(shape=shape, seq_len=length, batch=1, phase="prefill", engine=ENGINES[compile])
        memory = {}
        for routed in (False, True) if length <= 2**15 else (False,):
            for sparsity in ratios:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                try:
                    held = kv_bytes(run(ids, sparsity, routed))
                except torch.OutOfMemoryError:
                    yield dict(facts, sparsity=sparsity, error="out of memory")
                    continue
                memory[sparsity, routed] = dict(peak_bytes=torch.cuda.max_memory_allocated(), kv_bytes=held)
        if not memory:
            continue
        torch.cuda.empty_cache()
        runs = [partial(run, ids, *key) for key in memory]
        try:
            times = dict(zip(memory, measure_in_turn(runs, seconds=len(runs), least=repeats, warm=0), strict=True))
        except torch.OutOfMemoryError:  # in pieces, after all has fitted once
            yield dict(facts, error="out of memory")
            continue
        for (sparsity, routed), found in times.items():
            method = "routed" if routed else "static" if sparsity else "dense"
            floor = _counts(routing, length, sparsity)["flops"] / ceilings()["matmul_tflops"] / 1e9
            yield row(found, "own-dense", times.get((0.0, False)), **facts, sparsity=sparsity, method=method,
                      floor_ms=round(floor, 3), **memory[sparsity, routed])  # fmt: skip


def _deciding(routing: Routing, sparsity: float) -> torch.nn.ModuleDict:
    """Routers that read as any others, and decide on the same layers for every input."""
    routers = copy.deepcopy(routing.routers)
    routes = parse_routes(sparsity, 1, routing.layers)[0].tolist()
    for router, route in zip(routers.values(), routes, strict=True):
        torch.nn.init.zeros_(router.head[-1].weight)
        with torch.no_grad():
            router.head[-1].bias.copy_(torch.tensor([0.0, 1.0] if route else [1.0, 0.0]))
    return routers


def decode(
    shape: str,
    lengths: Sequence[int],
    batches: Sequence[int],
    sparsities: Sequence[float],
    compile: bool,
) -> Iterator[dict[str, Any]]:
    """
    One decode step of the whole model, captured.

    Parameters
    ----------
    compile : bool
        See ``attach``.

    Yields
    ------
    dict
        ``own-dense`` is the baseline; ``floor_ms`` is the bytes of weights and KV over the copy bandwidth;
        ``capture_s`` what capture took.
    """
    require_gpu()
    routing = random_model(shape, compile)
    for batch in batches:
        step = decode_step(routing, batch)
        for length in lengths:
            dense = None
            facts = dict(shape=shape, seq_len=length, batch=batch, phase="decode", engine=ENGINES[compile])
            for sparsity in sorted({0.0, *sparsities}):
                try:
                    cache = random_cache(routing, batch, length, sparsity)
                except torch.OutOfMemoryError:
                    yield dict(facts, sparsity=sparsity, error="out of memory")
                    continue
                step.load(cache, 60)
                times = measure(step.run, seconds=0.2, most=50, warm=3)
                dense = times if sparsity == 0.0 else dense
                counts = _counts(routing, length, sparsity)
                floor = (counts["weight_bytes"] + batch * counts["kv_bytes"]) / ceilings()["copy_tbps"] / 1e9
                yield row(times, "own-dense", dense, **facts, sparsity=sparsity,
                          method="static" if sparsity else "dense", floor_ms=round(floor, 4),
                          over_floor=round(times["ms"] / floor, 3), capture_s=round(step.seconds, 1))  # fmt: skip
                del cache
                torch.cuda.empty_cache()


def memory(shape: str, lengths: Sequence[int], sparsities: Sequence[float], gpu_bytes: int) -> Iterator[dict[str, Any]]:
    """
    KV bytes of one sequence by arithmetic, and the longest context whose KV cache fits beside the weights.

    Needs no GPU: the model is made without memory for its weights. ``gpu_bytes`` is the memory to fit into.
    """
    config = AutoConfig.for_model(**SHAPES[shape])
    layers, kv_heads, dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    with torch.device("meta"):
        weights = 2 * sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    token = 4 * kv_heads * dim
    for sparsity in sparsities:
        full = _full_layers(layers, sparsity)
        kept = (layers - full) * (PATTERN.sink + PATTERN.window)
        longest = max(0, gpu_bytes - weights - kept * token) // (full * token) if full else None
        for length in lengths:
            yield dict(
                shape=shape, seq_len=length, batch=1, sparsity=sparsity, phase="decode", engine="flux",
                kv_bytes=token * _kept(layers, full, length),
                baseline="own-dense", baseline_kv_bytes=token * layers * length, weight_bytes=weights,
                gpu_bytes=gpu_bytes, longest_context=longest,
            )  # fmt: skip
