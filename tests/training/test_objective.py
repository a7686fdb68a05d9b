"""The training objective, and that it makes a router switch off what is not needed."""

import pytest
import torch
from helpers.models import VOCAB, tiny_model

from flux_attention import FluxConfig, attach
from flux_attention.training import SparsityObjective, temperature


def test_temperature_schedule():
    assert temperature(0.0) == pytest.approx(1.5)
    assert temperature(0.3) == pytest.approx(1.25)
    assert temperature(0.6) == temperature(1.0) == pytest.approx(1.0)


def test_loss_is_the_methods_formula():
    objective = SparsityObjective({"a": 0.5, "b": 1.0})
    with torch.no_grad():
        objective.multipliers_C2.copy_(torch.tensor([[2.0, 3.0], [5.0, 7.0]]))
    gates = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])  # Ω = 0.25, 0.75
    loss = objective(torch.tensor([1.0, 2.0]), gates, ["a", "b"])
    expected = (1 + 2 * 0.25 + 3 * 0.0625 + 2 + 5 * 0.25 + 7 * 0.0625) / 2
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    torch.testing.assert_close(objective.multipliers_C2.grad, torch.tensor([[0.125, 0.03125], [0.125, 0.03125]]))


def test_targets_rise_during_warmup():
    objective = SparsityObjective({"a": 1.0}, initial=1.0, warmup=0.5)
    gates = torch.full((1, 4), 0.5)
    assert objective(torch.zeros(1), gates, ["a"], progress=0.25).item() == pytest.approx(0.0)
    assert objective(torch.zeros(1), gates, ["a"], progress=0.5).item() == pytest.approx(0.75)


def test_multipliers_stay_non_negative():
    objective = SparsityObjective({"a": 0.5}, initial=0.1)
    with torch.no_grad():
        objective.multipliers_C2.sub_(1.0)
    objective.clamp()
    assert (objective.multipliers_C2 == 0).all()


def test_unknown_classes_and_targets_are_refused():
    with pytest.raises(ValueError, match="target of task class 'a' is 1"):
        SparsityObjective({"a": 1.5})
    with pytest.raises(KeyError, match=r"\['b'\] have no target"):
        SparsityObjective({"a": 0.5})(torch.zeros(1), torch.zeros(1, 2), ["b"])


def test_training_reaches_its_sparsity_target():
    torch.manual_seed(0)
    model = tiny_model("qwen3").requires_grad_(False)
    routing = attach(model, FluxConfig(sink=4, window=9, pool_size=6))

    def ids(batch, length, seed):
        return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))

    objective = SparsityObjective({"text": 0.67}, initial=1.0)
    optimizer = torch.optim.AdamW(routing.routers.parameters(), lr=3e-3)
    ascent = torch.optim.Adam(objective.parameters(), lr=1e-2, maximize=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in range(60):
        prompt = ids(4, 40, step)
        with routing.soft(temperature(step / 60)):
            loss = model(prompt, labels=prompt).loss
        objective(loss.expand(4), routing.gates, ["text"] * 4).backward()
        optimizer.step(), ascent.step(), objective.clamp()
        optimizer.zero_grad(), ascent.zero_grad()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (objective.multipliers_C2 > 1.0).any()
    with torch.no_grad():
        model(ids(16, 40, 999))
    assert sum(routing.routes.msr) / 16 == pytest.approx(0.67, abs=0.2)
