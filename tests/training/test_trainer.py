"""The Trainer's own part: two learning rates, a frozen model, a loss that is finite."""

import json
from pathlib import Path

import pytest
from transformers import TrainerCallback

from flux_attention.training import RouterTrainer, load_data, train
from flux_attention.training.checkpoints import last_checkpoint
from flux_attention.training.module import RoutedTraining
from flux_attention.training.run import load_model


def test_multipliers_learn_at_a_constant_rate(recipe, tokenizer):
    rates = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append([group["lr"] for group in optimizer.param_groups])

    trainer = RouterTrainer(load_model(recipe), recipe, load_data(recipe, tokenizer)[0], callbacks=[Watch()])
    trainer.train()
    assert [multipliers for _, multipliers in rates] == [0.01] * 6
    assert max(router for router, _ in rates) == pytest.approx(3e-3) and rates[0][0] == 0.0
    assert [group["maximize"] for group in trainer.optimizer.param_groups] == [False, True]


def test_dropout_is_off_and_the_model_left_as_it_was(recipe, base):
    config = json.loads((base / "config.json").read_text())
    recipe.config = {"attention_dropout": 0.5}
    recipe.gradient_checkpointing = True
    recipe.training["max_steps"] = 2
    trainer = train(recipe)
    assert config["attention_dropout"] == 0.0
    model = trainer.routing.model
    assert not model.training and not model.is_gradient_checkpointing and model.config.use_cache
    assert {layer.self_attn.attention_dropout for layer in model.model.layers} == {0.5}


def test_a_loss_that_is_not_finite_stops_the_run(recipe, monkeypatch):
    forward = RoutedTraining.forward

    def broken(self, **kwargs):
        outputs = forward(self, **kwargs)
        return {**outputs, "loss": outputs["loss"] * (float("nan") if kwargs["progress"] > 0.4 else 1.0)}

    monkeypatch.setattr(RoutedTraining, "forward", broken)
    with pytest.raises(FloatingPointError, match=r"the loss of step 4 is nan on sequences \["):
        train(recipe)
    assert last_checkpoint(recipe.output).name == "checkpoint-2"
    assert not (Path(recipe.output) / "routers.safetensors").exists()
