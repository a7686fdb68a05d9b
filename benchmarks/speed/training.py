"""Times router training on a GPU: packs forward and backward through a whole frozen model, with random weights."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from flux_attention.hf.forward import ForwardPass
from flux_attention.hf.handle import Routing
from flux_attention.patterns import Full
from flux_attention.training.module import RoutedTraining, keep_attention
from flux_attention.training.objective import SparsityObjective
from speed.model import body_and_head, random_model
from speed.timing import PATTERN, ceilings, measure, require_gpu, row

#: Tokens at a sequence's end that carry the loss; of packs of several sequences.
LABELS, PACK_LABELS = 512, 64
#: Tokens of the sequences of a pack, at least and at most.
SEQUENCE = 2048, 8192
#: The paper's run: steps, sequences of a step, tokens of a sequence at most.
PAPER_TOKENS = 300 * 48 * 65_536


def plain_formula():
    """Compute mixed attention as it is written down, O = z · FA + (1 − z) · SA, with both branches' backward."""

    def mixed(self, gate_B, chosen, compute_other, dtype):
        gate = gate_B.to(dtype).view(1, 1, 1, 1)  # of a single sequence
        full, sparse = (chosen, compute_other()) if gate_B.item() > 0.5 else (compute_other(), chosen)
        return gate * full + (1 - gate) * sparse

    return mock.patch.object(ForwardPass, "_mixed", mixed)


def necessary_flops(routing: Routing, length: int) -> float:
    """
    Count a step's necessary FLOPs, every other layer full: nothing twice, no gradients of frozen weights.

    The model's products forward and for the activations' gradients; both branches of attention forward; the chosen
    one's backward, which takes twice its forward (FlashAttention's also computes the scores again).
    """
    base = routing.config.base_model
    body, head = body_and_head(routing)
    full = (len(routing.layers) + 1) // 2
    pairs = {True: Full().pairs(length), False: PATTERN.pairs(length)}
    forward = len(routing.layers) * sum(pairs.values())
    backward = 2 * (full * pairs[True] + (len(routing.layers) - full) * pairs[False])
    return 4 * (forward + backward) * base.num_heads * base.head_dim + 4 * (body * length + head * LABELS)


def pack_of(routing: Routing, lengths: Sequence[int], labelled: int) -> dict[str, Any]:
    """Make what ``RoutedTraining`` takes: a pack of sequences, and noise by which every other layer is full."""
    device, count = routing.model.device, len(lengths)
    ids = torch.randint(3, routing.model.config.vocab_size, (1, sum(lengths)), device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    ends = torch.tensor(lengths, device=device).repeat_interleave(torch.tensor(lengths, device=device))
    labels = ids.masked_fill(positions < ends - labelled, -100)
    noise = torch.zeros(count, len(routing.layers), 2)
    noise[:, ::2, 1] = noise[:, 1::2, 0] = 50.0
    return dict(
        input_ids=ids,
        position_ids=positions[None],
        labels=labels,
        sequence_lengths=torch.tensor(lengths),
        prompt_lengths=torch.tensor(lengths) - labelled,
        classes=torch.zeros(count, dtype=torch.long),
        temperature=1.0,
        noise=noise,
        progress=1.0,
    )


def sequences_of(length: int, seed: int = 0) -> list[int]:
    """Draw lengths of sequences that fill a pack of ``length`` tokens; the last one has what is left."""
    draw, lengths = random.Random(seed), []
    while sum(lengths) < length:
        lengths.append(min(draw.randint(*SEQUENCE), length - sum(lengths)))
    if lengths[-1] <= 2 * PACK_LABELS and len(lengths) > 1:
        lengths[-2:] = [sum(lengths[-2:])]
    return lengths


def packs(shape: str, lengths: Sequence[int], repeats: int = 3) -> Iterator[dict[str, Any]]:
    """
    Measure forward and backward of packs of sequences of 2 K to 8 K tokens, every other layer full.

    Yields
    ------
    dict
        Engine ``flux`` against ``alone``, the same sequences in a call each; with and without gradient checkpointing.
    """
    require_gpu()
    routing = random_model(shape, compile=False)
    module = RoutedTraining(routing, SparsityObjective({"all": 0.5}).to(routing.model.device)).train()
    for length, checkpointing in itertools.product(lengths, (False, True)):
        if checkpointing:
            settings = {"use_reentrant": False, "context_fn": keep_attention}
            routing.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        else:
            routing.model.gradient_checkpointing_disable()
        together = sequences_of(length)
        calls = {
            "alone": [pack_of(routing, [one], PACK_LABELS) for one in together],
            "flux": [pack_of(routing, together, PACK_LABELS)],
        }
        found = {}
        for engine, some in calls.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

            def step(some=some):
                for pack in some:
                    module(**pack)["loss"].backward()
                module.zero_grad(set_to_none=True)

            found[engine] = times = measure(step, min_repeats=repeats, warm=2)
            yield row(
                times, "alone", found["alone"],
                shape=shape, seq_len=length, batch=len(together), phase="train", engine=engine, method="routed",
                sparsity=0.5, tokens_per_s=round(length / times["ms"] * 1000),
                peak_bytes=torch.cuda.max_memory_allocated(), checkpointing=checkpointing,
            )  # fmt: skip


def training(shape: str, lengths: Sequence[int], repeats: int = 3) -> Iterator[dict[str, Any]]:
    """
    Measure forward and backward of one pack of one sequence, every other layer full, with selective checkpointing.

    Yields
    ------
    dict
        Engine ``flux`` against ``plain`` (``plain_formula``): ``ms``, ``tokens_per_s``, ``peak_bytes``, and
        ``of_matmul``, the rate of ``necessary_flops`` over that of a large matrix product; ``paper_hours`` is what the
        paper's recipe would take on eight such GPUs at this rate.
    """
    require_gpu()
    if min(lengths) <= LABELS:
        raise ValueError(f"lengths are {list(lengths)}, expected more than {LABELS} tokens")
    routing = random_model(shape, compile=False)
    settings = {"use_reentrant": False, "context_fn": keep_attention}
    routing.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    module = RoutedTraining(routing, SparsityObjective({"all": 0.5}).to(routing.model.device)).train()

    for length in lengths:
        pack = pack_of(routing, [length], LABELS)

        def step(pack=pack):
            module(**pack)["loss"].backward()
            module.zero_grad(set_to_none=True)

        found = {}
        for engine, formula in (("plain", plain_formula), ("flux", contextlib.nullcontext)):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                with formula():
                    times = measure(step, min_repeats=repeats, warm=1)
            except torch.OutOfMemoryError:
                yield dict(shape=shape, seq_len=length, batch=1, phase="train", engine=engine, error="out of memory")
                continue
            found[engine] = times
            speed = length / times["ms"] * 1000
            rate = necessary_flops(routing, length) / times["ms"] / 1e9
            yield row(
                times, "plain", found.get("plain"),
                shape=shape, seq_len=length, batch=1, phase="train", engine=engine, method="routed", sparsity=0.5,
                tokens_per_s=round(speed), peak_bytes=torch.cuda.max_memory_allocated(),
                of_matmul=round(rate / ceilings()["matmul_tflops"], 3),
                paper_hours=round(PAPER_TOKENS / speed / 8 / 3600, 2),
            )  # fmt: skip
