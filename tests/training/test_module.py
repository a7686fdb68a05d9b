"""The loss of a pack against the plain formula, and what checkpointing keeps."""

import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.devices import INTERPRETED
from helpers.models import SMALL, tiny_model
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers import AutoConfig, AutoModelForCausalLM

from flux_attention import FluxConfig, UnsupportedModelError, attach
from flux_attention.hf.forward import Finished, ForwardPass
from flux_attention.kernels import triton_prefill
from flux_attention.training import SparsityObjective, load_data
from flux_attention.training.module import ATTENTION, RoutedTraining, keep_attention, noise_of
from flux_attention.training.packing import collate


def test_the_loss_of_a_pack_is_the_plain_formula(recipe, tokenizer):
    """Against each sequence alone, its routes forced to the gates, and the whole vocabulary's logits."""
    model = tiny_model("qwen3", vocab_size=len(tokenizer))
    routing = attach(model, FluxConfig(sink=4, window=12, pool_size=6))
    for router in routing.routers.values():
        router.head[-1].bias.data.zero_()
    objective = SparsityObjective(recipe.targets, initial=0.7)
    data, _ = load_data(recipe, tokenizer)
    batch = collate([data[0], data[1]], objective.classes)
    numbers = batch.pop("numbers").tolist()
    noise = noise_of(0, 3, numbers, 3)
    outputs = RoutedTraining(routing, objective)(**batch, temperature=1.3, noise=noise, progress=1.0)
    gates = outputs["gates_NL"]
    assert 0 < gates.mean() < 1 and torch.equal(gates, (noise[..., 1] > noise[..., 0]).float())
    examples = [example for items in (data[0], data[1]) for _, example in items]
    expected = []
    for example, z, lm_loss in zip(examples, gates, outputs["lm_loss_N"], strict=True):
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        with torch.no_grad(), routing.force(z):
            logits = model(ids, prompt_lengths=[example.prompt_length], use_cache=False).logits[0]
        start = example.labels_from
        nats = F.cross_entropy(logits[start - 1 : -1], ids[0, start:])
        torch.testing.assert_close(lm_loss, nats, atol=1e-5, rtol=1e-5)
        gap = (1 - z.mean()) - recipe.targets[example.task]
        expected.append(nats + 0.7 * gap.abs() + 0.7 * gap.square())
    torch.testing.assert_close(outputs["loss"], torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)


def test_the_operations_that_are_kept_exist():
    for name in ATTENTION:
        room, operation = name.split("::")
        assert hasattr(getattr(torch.ops, room), operation), name


@INTERPRETED
def test_checkpointing_keeps_what_our_own_kernel_gave(monkeypatch):
    forward, runs = triton_prefill._run_forward, []
    monkeypatch.setattr(triton_prefill, "_run_forward", lambda *a, **k: runs.append(1) or forward(*a, **k))

    def attended(*states):
        return triton_prefill.attention(*states, sink=2, window=5, scale=0.25).sin()

    for context, times in ((keep_attention, 1), (noop_context_fn, 2)):
        states = [torch.randn(1, 2, 20, 16, dtype=torch.float16, requires_grad=True) for _ in range(3)]
        runs.clear()
        checkpoint(attended, *states, use_reentrant=False, context_fn=context).sum().backward()
        assert len(runs) == times and all(tensor.grad is not None for tensor in states)


def calls_of(routing):
    """The forward calls that are still in memory."""
    gc.collect()
    return [item for item in gc.get_objects() if issubclass(type(item), ForwardPass) and item.shapes is routing._shapes]


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_checkpointing_keeps_nothing_for_longer_than_needed(recipe, tokenizer, granularity, monkeypatch):
    data, _ = load_data(recipe, tokenizer)
    model = tiny_model("qwen3", vocab_size=len(tokenizer)).train()
    settings = {"use_reentrant": False, "context_fn": keep_attention}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    routing = attach(model, FluxConfig(sink=60, window=100, pool_size=6, granularity=granularity))
    begin, calls = routing.begin, []
    monkeypatch.setattr(routing, "begin", lambda kwargs: calls.append(begin(kwargs)) or calls[-1])
    objective = SparsityObjective(recipe.targets, initial=0.7)
    batch = collate([data[0]], objective.classes)
    noise = noise_of(0, 3, batch.pop("numbers").tolist(), len(routing.units))
    left = []
    for number, layer in enumerate(model.model.layers):  # the layers behind it have been computed again, and are done
        layer.register_full_backward_pre_hook(
            lambda *_, number=number: left.append((number, set(calls[-1].decision._gates)))
        )
    module = RoutedTraining(routing, objective)
    loss = module(**batch, temperature=2.0, noise=noise, progress=1.0)["loss"]
    loss.backward()
    behind = [{unit for unit in gates if (unit if granularity == "layer" else unit[0]) > n} for n, gates in left]
    assert len(left) == 3 and behind == [set()] * 3 and not calls[-1].decision._gates
    for _ in range(2):  # and nothing at all of a forward that no backward follows
        module(**batch, temperature=2.0, noise=noise, progress=1.0)
    routing.publish(Finished(routing.routes, None))
    calls.clear()
    assert not calls_of(routing)


def test_checkpointing_keeps_attention_and_gradients(recipe, tokenizer):
    """Attention runs once a branch and layer; all else twice."""
    data, _ = load_data(recipe, tokenizer)
    grads, counts = [], []
    for context in (None, keep_attention, noop_context_fn):
        torch.manual_seed(0)
        model = tiny_model("qwen3", vocab_size=len(tokenizer)).train()
        if context is not None:
            settings = {"use_reentrant": False, "context_fn": context}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        routing = attach(model, FluxConfig(sink=60, window=100, pool_size=6))
        objective = SparsityObjective(recipe.targets, initial=0.7)
        batch = collate([data[0]], objective.classes)
        noise = noise_of(0, 3, batch.pop("numbers").tolist(), 3)
        module = RoutedTraining(routing, objective)
        for router in routing.routers.values():
            torch.nn.init.normal_(router.head[-1].weight, generator=torch.Generator().manual_seed(1))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            module(**batch, temperature=2.0, noise=noise, progress=1.0)["loss"].backward()
        # Checkpointing looks at each call, which shows as an event too; one that computes makes its output.
        attention = [e for e in profiler.events() if e.name == "aten::_scaled_dot_product_flash_attention_for_cpu"]
        counts.append(sum(any(child.name == "aten::empty" for child in event.cpu_children) for event in attention))
        grads.append([parameter.grad for parameter in routing.routers.parameters()])
        assert not calls_of(routing)  # one that is kept keeps what its attention gave, in every layer
    sequences = len(batch["sequence_lengths"])
    assert counts[:2] == [2 * 3 * sequences] * 2 and counts[2] > counts[1]
    for others in grads[1:]:
        for plain, other in zip(grads[0], others, strict=True):
            torch.testing.assert_close(other, plain, atol=1e-6, rtol=1e-4)


def test_noise_depends_on_seed_step_and_sequence_alone():
    together = noise_of(1, 2, [5, 9], 4)
    assert torch.equal(together, torch.cat([noise_of(1, 2, [5], 4), noise_of(1, 2, [9], 4)]))
    for other in (noise_of(2, 2, [5], 4), noise_of(1, 3, [5], 4), noise_of(1, 2, [6], 4)):
        assert not torch.equal(together[:1], other)


def test_models_that_scale_logits_are_refused(recipe):
    config = AutoConfig.for_model("granite", **SMALL, logits_scaling=3.0)
    with pytest.raises(UnsupportedModelError, match="scales or caps its logits"):
        RoutedTraining(attach(AutoModelForCausalLM.from_config(config)), SparsityObjective({"a": 0.5}))
