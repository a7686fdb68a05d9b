"""Measures whole models on a GPU: prefill, decode steps and memory, by length and forced sparsity, with random weights.

Every function yields result rows (the contract of ``results``) as they are measured. The baseline is the same code with
every layer full; its floor is what the hardware's ceilings allow.

Shape suffixes: B batch, K KV heads, C capacity, D head dim.
"""

from __future__ import annotations

import copy
import gc
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from flux_attention.config import FluxConfig
from flux_attention.hf.attach import attach
from flux_attention.hf.cache.layer import RoutedLayer
from flux_attention.hf.cache.size import kv_bytes
from flux_attention.hf.capture import without_collection
from flux_attention.hf.generation.step import decode_step
from flux_attention.hf.handle import Routing
from flux_attention.hf.layout import BatchLayout
from flux_attention.patterns import Full
from flux_attention.routes import parse_routes
from flux_attention.sizes import SHAPES
from speed.timing import DTYPE, PATTERN, floor_ms, measure, measure_in_turn, require_gpu, row

#: By whether layers are compiled.
ENGINES = {False: "flux", True: "flux-compile"}
#: Tokens of all prompts together, up to which prefill is timed with routers, too; and at most, where they are several.
MAX_ROUTED, MAX_TOGETHER = 2**17, 2**18


def random_model(shape: str, compile: bool) -> Routing:
    """Make a model of a named shape with random bf16 weights on the GPU, and fresh routers attached."""
    gc.collect()  # an earlier model, which refers to itself
    torch.cuda.empty_cache()
    config = AutoConfig.for_model(**SHAPES[shape], max_position_embeddings=2**20)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
    model.requires_grad_(False)
    return attach(model, FluxConfig(sink=PATTERN.sink, window=PATTERN.window), compile=compile)


def random_cache(routing: Routing, batch: int, length: int, sparsity: float) -> DynamicCache:
    """Make a KV cache as a prefill of ``length`` tokens leaves it, with random content."""
    base = routing.config.base_model
    routes = parse_routes(float(sparsity), 1, routing.layers)[0].tolist()
    cache = DynamicCache(config=routing.model.config)
    for layer, route in zip(routing.layers, routes, strict=True):
        cached = cache.layers[layer] = RoutedLayer(routing.sparse.later)
        cached.route([route] * batch)
        states = torch.randn(batch, base.num_kv_heads, length, base.head_dim, device=routing.model.device, dtype=DTYPE)
        cached.append(states, states, BatchLayout.all_real(batch, length))
    return cache


def _full_layers(layers: int, sparsity: float) -> int:
    return layers - round(sparsity * layers)


def _kept(layers: int, full: int, length: int) -> int:
    """Count the tokens in the KV cache of one sequence, summed over the layers."""
    return full * length + (layers - full) * min(length, PATTERN.sink + PATTERN.window)


def body_and_head(routing: Routing) -> tuple[int, int]:
    """Count the parameters between the embeddings, and those of the output embedding, which may be the input's."""
    embedding, head = routing.model.get_input_embeddings().weight, routing.model.get_output_embeddings().weight
    outside = embedding.numel() + (0 if head is embedding else head.numel())
    return sum(parameter.numel() for parameter in routing.model.parameters()) - outside, head.numel()


def fitting(batches: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return (batch, length) of prompts alone, and of several that have at most ``MAX_TOGETHER`` tokens together."""
    pairs = itertools.product(batches, lengths)
    return [(batch, length) for batch, length in pairs if batch == 1 or batch * length <= MAX_TOGETHER]


def _counts(routing: Routing, length: int, sparsity: float) -> dict[str, float]:
    """Count the FLOPs of a prefill and the bytes of a decode step of one sequence: attention, and everything else."""
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
    batches: Sequence[int],
    sparsities: Sequence[float],
    compile: bool,
    repeats: int = 3,
) -> Iterator[dict[str, Any]]:
    """
    Measure the prefill of one prompt, or of some of one length: all layers, the last token's logits.

    Parameters
    ----------
    shape : str
        A key of ``SHAPES``.
    lengths, batches, sparsities : sequence
        Tokens of a prompt; prompts, of ``MAX_TOGETHER`` tokens at most where they are several; forced Ω_MSR.
    compile : bool
        See ``attach``.
    repeats : int
        Prefills that are timed at least.

    Yields
    ------
    dict
        ``own-dense`` is the baseline. Routes of ``static`` rows are forced; rows with ``method`` = ``routed`` (up to
        ``MAX_ROUTED`` tokens together) run routers that decide the same, so that they show what routers cost. All of
        one length are timed in turn, after one of the sparsest. ``peak_bytes`` is the most memory that was allocated,
        ``floor_ms`` the FLOPs over the measured rate of matrix products.
    """
    require_gpu()
    routing = random_model(shape, compile)
    model = routing.model
    ratios = sorted({0.0, *map(float, sparsities)})
    weights = {sparsity: _deciding(routing, sparsity) for sparsity in ratios}

    @torch.no_grad()
    def run(ids, key, held, failed):
        if key in failed:
            return
        sparsity, routed = key
        torch.cuda.reset_peak_memory_stats()
        try:
            with routing.force(None if routed else sparsity):
                cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
            held[key] = dict(peak_bytes=torch.cuda.max_memory_allocated(), kv_bytes=kv_bytes(cache))
        except torch.OutOfMemoryError:
            failed.add(key)
            torch.cuda.empty_cache()

    for batch, length in fitting(batches, lengths):
        ids = torch.randint(3, model.config.vocab_size, (batch, length), device=model.device)
        facts = dict(shape=shape, seq_len=length, batch=batch, phase="prefill", engine=ENGINES[compile])
        kinds = (False, True) if batch * length <= MAX_ROUTED else (False,)
        keys = [(sparsity, routed) for routed in kinds for sparsity in ratios]
        held: dict[tuple[float, bool], dict] = {}
        failed: set[tuple[float, bool]] = set()
        torch.cuda.empty_cache()
        run(ids, (ratios[-1], False), held, failed)
        runs = [partial(run, ids, key, held, failed) for key in keys]
        before = [partial(routing.routers.load_state_dict, weights[sparsity]) for sparsity, _ in keys]
        measured = measure_in_turn(runs, seconds=10, min_repeats=repeats, warm=0, before=before)
        times = dict(zip(keys, measured, strict=True))
        for sparsity, routed in keys:
            method = "routed" if routed else "static" if sparsity else "dense"
            if (sparsity, routed) in failed:
                yield dict(facts, sparsity=sparsity, method=method, error="out of memory")
                continue
            floor = floor_ms(batch * _counts(routing, length, sparsity)["flops"], "matmul_tflops")
            dense = None if (0.0, False) in failed else times[0.0, False]
            yield row(times[sparsity, routed], "own-dense", dense, **facts, sparsity=sparsity, method=method,
                      floor_ms=round(floor, 3), **held[sparsity, routed])  # fmt: skip


def ends(
    shape: str, lengths: Sequence[int], sparsity: float, compile: bool, repeats: int = 3
) -> Iterator[dict[str, Any]]:
    """
    Measure the prefill of one prompt by when its routes are decided: forced, in the prefill, by its ends beforehand.

    Yields
    ------
    dict
        Methods ``static`` (forced, the baseline), ``routed`` and ``routed-ends``; the routers decide as is forced.
    """
    require_gpu()
    routing = random_model(shape, compile)
    model, config = routing.model, routing.config
    routing.routers.load_state_dict(_deciding(routing, sparsity))

    @torch.no_grad()
    def run(ids, method):
        routing.config = replace(config, decide="ends" if method == "routed-ends" else "prefill")
        with routing.force(sparsity if method == "static" else None):
            model(ids, use_cache=True, logits_to_keep=1)

    methods = ("static", "routed", "routed-ends")
    for length in lengths:
        ids = torch.randint(3, model.config.vocab_size, (1, length), device=model.device)
        torch.cuda.empty_cache()
        times = measure_in_turn([partial(run, ids, method) for method in methods], 2, repeats, warm=1)
        for method, found in zip(methods, times, strict=True):
            facts = dict(shape=shape, seq_len=length, batch=1, phase="prefill", engine=ENGINES[compile])
            yield row(found, "static", times[0], **facts, method=method, sparsity=sparsity)


def _deciding(routing: Routing, sparsity: float) -> dict[str, torch.Tensor]:
    """Make weights of routers that read as any others, and decide on the same layers for every input."""
    routers = copy.deepcopy(routing.routers)
    routes = parse_routes(sparsity, 1, routing.layers)[0].tolist()
    for router, route in zip(routers.values(), routes, strict=True):
        torch.nn.init.zeros_(router.head[-1].weight)
        with torch.no_grad():
            router.head[-1].bias.copy_(torch.tensor([0.0, 1.0] if route else [1.0, 0.0]))
    return routers.state_dict()


def decode(
    shape: str,
    lengths: Sequence[int],
    batches: Sequence[int],
    sparsities: Sequence[float],
    compile: bool,
) -> Iterator[dict[str, Any]]:
    """
    Measure one captured decode step of the whole model.

    Parameters
    ----------
    compile : bool
        See ``attach``.

    Yields
    ------
    dict
        ``own-dense`` is the baseline; ``floor_ms`` is the bytes of weights and KV over the copy bandwidth;
        ``capture_s`` what capture took; ``generate_ms`` what a token takes in ``generate``: the step, choosing the
        token, and the loop.
    """
    require_gpu()
    routing = random_model(shape, compile)
    for batch in batches:
        step = decode_step(routing, batch)
        for length in lengths:
            dense = None
            facts = dict(shape=shape, seq_len=length, batch=batch, phase="decode", engine=ENGINES[compile])
            for sparsity in sorted({0.0, *sparsities}):
                facts |= dict(sparsity=sparsity, method="static" if sparsity else "dense")
                cache = None  # the one before
                torch.cuda.empty_cache()
                try:
                    cache = random_cache(routing, batch, length, sparsity)
                    step.load(cache, 60)
                    times = measure(step.run, seconds=0.2, max_repeats=50, warm=3)
                except torch.OutOfMemoryError:
                    yield dict(facts, error="out of memory")
                    continue
                dense = times if sparsity == 0.0 else dense
                token = _generate(routing.model, cache)
                counts = _counts(routing, length, sparsity)
                floor = floor_ms(counts["weight_bytes"] + batch * counts["kv_bytes"], "copy_tbps")
                yield row(times, "own-dense", dense, **facts, floor_ms=round(floor, 4),
                          over_floor=round(times["ms"] / floor, 3), generate_ms=token,
                          capture_s=round(step.seconds, 1))  # fmt: skip


def _generate(model, cache: DynamicCache) -> float | None:
    """
    Time a token, greedily generated behind ``cache``, in milliseconds.

    Of 36 tokens less 4, which have the first one. None without the memory for it.
    """
    model.generation_config.eos_token_id = None

    def seconds(tokens: int) -> float:
        past = cache.get_seq_length()
        ids = torch.full((len(cache.layers[0].lengths), past + 1), 5, device=model.device)
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.generate(ids, past_key_values=cache, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    with torch.no_grad(), without_collection():
        try:
            seconds(4)
            few, more = seconds(4), seconds(36)
        except torch.OutOfMemoryError:
            return None
    return round(1000 * (more - few) / 32, 4)


def memory(shape: str, lengths: Sequence[int], sparsities: Sequence[float], gpu_bytes: int) -> Iterator[dict[str, Any]]:
    """
    Count the KV bytes of one sequence, and find the longest context whose KV cache fits beside the weights.

    By arithmetic, without a GPU: the model has no memory for its weights. ``gpu_bytes`` is the memory to fit into.
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
