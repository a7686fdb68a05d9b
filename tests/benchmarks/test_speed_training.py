"""What the training benchmark runs and counts; its timing is for GPUs."""

import pytest
import torch
from helpers.models import tiny_model
from speed import training

from flux_attention import FluxConfig, attach
from flux_attention.hf.forward import ForwardPass
from flux_attention.training.module import RoutedTraining
from flux_attention.training.objective import SparsityObjective

one = ForwardPass._one


@pytest.fixture
def routing(monkeypatch):
    monkeypatch.setattr(training, "LABELS", 8)
    return attach(tiny_model("qwen3"), FluxConfig(sink=4, window=9, pool_size=6))


def test_both_formulas_give_the_same_loss_and_gradients(routing):
    module = RoutedTraining(routing, SparsityObjective({"all": 0.5}, initial=0.5))
    pack = training.pack_of(routing, [40], 8)
    grads = []
    for formula in (training.plain_formula(), torch.enable_grad()):
        with formula:
            outputs = module(**pack)
            outputs["loss"].backward()
        assert outputs["gates_NL"].tolist() == [[1, 0, 1]]
        grads.append([parameter.grad.clone() for parameter in routing.routers.parameters()])
        module.zero_grad()
    for plain, mixed in zip(*grads, strict=True):
        torch.testing.assert_close(mixed, plain, atol=1e-7, rtol=1e-4)


def test_neither_formula_keeps_gates_that_were_computed_again(routing, monkeypatch):
    calls, finish = [], ForwardPass.finish
    monkeypatch.setattr(ForwardPass, "finish", lambda self: calls.append(self) or finish(self))
    routing.model.gradient_checkpointing_enable({"use_reentrant": False})
    routing.model.train()
    module = RoutedTraining(routing, SparsityObjective({"all": 0.5}))
    for formula in (training.plain_formula(), torch.enable_grad()):
        with formula:
            module(**training.pack_of(routing, [40], 8))["loss"].backward()
        assert not calls[-1].decision._gates


def test_the_plain_formula_runs_each_branch_once(routing, monkeypatch):
    """Two attentions a layer for either: the comparison is about the backward pass."""
    runs = []
    monkeypatch.setattr(ForwardPass, "_one", lambda self, *a: runs.append(1) or one(self, *a))
    module = RoutedTraining(routing, SparsityObjective({"all": 0.5}))
    for formula in (training.plain_formula(), torch.enable_grad()):
        runs.clear()
        with formula:
            module(**training.pack_of(routing, [40], 8))
        assert len(runs) == 2 * 3


def test_flops_are_those_of_the_sizes(routing, monkeypatch):
    monkeypatch.setattr(training, "PATTERN", routing.sparse)
    model, length = routing.model, 40
    linear = sum(
        module.weight.numel() for layer in model.model.layers for module in layer.modules()
        if isinstance(module, torch.nn.Linear)
    )  # fmt: skip
    norms = sum(parameter.numel() for name, parameter in model.model.named_parameters() if "norm" in name)
    dense, sparse = length * (length + 1) // 2, int(routing.sparse.mask(length).sum())
    attention = 4 * 4 * 16 * (3 * (dense + sparse) + 2 * (2 * dense + sparse))
    expected = 4 * length * (linear + norms) + 4 * 8 * model.lm_head.weight.numel() + attention
    assert training.necessary_flops(routing, length) == pytest.approx(expected)
