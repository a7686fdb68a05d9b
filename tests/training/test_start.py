"""What training may start from and decide by: a ranking of layers, the prompt's ends, budgets."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.models import ids, randomize
from helpers.training import short_recipe
from transformers import AutoModelForCausalLM

from flux_attention import AdapterError, FluxConfig, attach
from flux_attention.errors import FluxConfigError, RecipeError
from flux_attention.training import Recipe, train
from flux_attention.training.objective import SparsityObjective
from flux_attention.training.run import dry_run, load_model


@pytest.fixture(scope="module")
def ranked(base, tmp_path_factory):
    """A calibrated adapter of the tiny model."""
    folder = tmp_path_factory.mktemp("ranked")
    model = AutoModelForCausalLM.from_pretrained(base)
    attach(model, FluxConfig(sink=4, window=12, pool_size=6, ranking=(2, 0, 1), budget=0.5)).save_pretrained(folder)
    return folder


def recipe_of(base, records_file, output, **changes):
    recipe = short_recipe(base, records_file, output)
    if "start" in changes:
        changes["routers"] = {}
    return replace(recipe, **changes)


def test_routers_start_from_the_ranking(base, records_file, ranked, tmp_path):
    routing = load_model(recipe_of(base, records_file, tmp_path, start=str(ranked)))
    assert routing.config.ranking is None and routing.config.sparse["window"] == 12
    margins = {}
    for layer in routing.layers:
        logits = routing.router(layer)(torch.randn(3, routing.config.base_model.head_dim))
        assert torch.equal(logits, logits[:1].expand(3, 2))  # by the bias alone
        margins[layer] = (logits[0, 1] - logits[0, 0]).item()
    assert margins == {2: 4.5, 0: 0.0, 1: -4.5}


def test_heads_start_from_the_ranking_of_their_layers(base, records_file, ranked, tmp_path):
    heads = dict(routers=dict(granularity="head"))
    recipe = replace(recipe_of(base, records_file, tmp_path, start=str(ranked)), **heads)
    routing = load_model(recipe)
    assert routing.config.granularity == "head" and routing.config.sparse["window"] == 12
    with torch.no_grad():
        routing.model(ids(1, 300))
    logits = routing.routes.logits_BL2[0]
    assert (logits[:, 1] - logits[:, 0]).tolist() == [0.0, 0.0, -4.5, -4.5, 4.5, 4.5]
    assert dry_run(recipe)["trained"] == dry_run(replace(recipe, routers={}))["trained"]
    assert Recipe.from_dict(recipe.resolved).routers == heads["routers"]
    routing.config = replace(routing.config, granularity="layer")
    routing.save_pretrained(tmp_path / "layers")
    with pytest.raises(RecipeError, match="has routers, so it says what `routers` would"):
        dry_run(replace(recipe, start=str(tmp_path / "layers")))


def test_a_run_from_a_ranking_trains_routers_that_read_the_ends(base, records_file, ranked, tmp_path):
    trainer = train(recipe_of(base, records_file, tmp_path / "out", start=str(ranked), decide="ends"), say=print)
    config = FluxConfig.from_json(tmp_path / "out" / "flux_config.json")
    assert config.decide == "ends" and config.ranking is None and config.pool_size == 6
    trainer.routing.detach()
    model = AutoModelForCausalLM.from_pretrained(base)
    routing = attach(model, tmp_path / "out")
    with torch.no_grad():
        model(ids(1, 300))
    assert routing.routes.logits_BL2 is not None
    assert "alone" in (tmp_path / "out" / "README.md").read_text()


def test_a_start_with_blocks_is_refused(base, records_file, ranked, tmp_path):
    config = FluxConfig.from_json(ranked / "flux_config.json")
    replace(config, sparse=config.sparse | {"block_size": 4}).to_json(tmp_path / "flux_config.json")
    with pytest.raises(RecipeError, match="rounds to blocks of 4 tokens"):
        dry_run(recipe_of(base, records_file, tmp_path / "out", start=str(tmp_path)))


def test_a_run_with_budgets_makes_an_adapter_that_takes_one(base, records_file, tmp_path):
    recipe = recipe_of(base, records_file, tmp_path / "out", budget=True)
    trainer = train(recipe, say=print)
    trainer.routing.detach()
    model = AutoModelForCausalLM.from_pretrained(base)
    routing = attach(model, tmp_path / "out", budget=0.9)
    assert routing.router(0).takes_budget and routing.budget == 0.9
    with torch.no_grad():
        model(ids(1, 60))
        first = routing.routes.logits_BL2
        routing.budget = 0.1
        model(ids(1, 60))
        assert not torch.equal(routing.routes.logits_BL2, first)
        routing.budget = 0.9
        model(ids(1, 60))
        assert torch.equal(routing.routes.logits_BL2, first)
    again = Recipe.from_yaml(tmp_path / "out" / "recipe.yaml")
    assert again.budget and again.resolved == replace(recipe, output=again.output).resolved


def test_each_sample_is_held_to_its_own_budget(base, records_file, tmp_path):
    """Routers are told it, and the objective's pull on the gates has the sign of what is missing."""
    routing = randomize(load_model(recipe_of(base, records_file, tmp_path, budget=True)))
    budgets = torch.tensor([0.3, 0.7])
    noise = torch.zeros(2, 3, 2)
    with routing.soft(1.0, noise, budgets):
        routing.model(ids(2, 40), use_cache=False)
    told = routing._last.routes.logits_BL2
    alone = []
    for row, budget in enumerate(budgets):
        with routing.soft(1.0, noise[:1], budget[None]):
            routing.model(ids(2, 40)[row : row + 1], use_cache=False)
        alone.append(routing._last.routes.logits_BL2[0])
    torch.testing.assert_close(told, torch.stack(alone))
    with routing.soft(1.0, noise, budgets.flip(0)):
        routing.model(ids(2, 40), use_cache=False)
    assert (routing._last.routes.logits_BL2 - told).abs().amin(dim=(1, 2)).max() > 0
    gates = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0]], requires_grad=True)  # Ω is 0.75 for both
    objective = SparsityObjective({"x": 0.0}, initial=1.0, warmup=0.5)
    objective(torch.zeros(2), gates, ["x", "x"], progress=0.0, targets_B=torch.tensor([0.5, 1.0])).backward()
    assert (gates.grad[0] < 0).all() and (gates.grad[1] > 0).all()


def test_budgets_do_not_mix_with_routers_trained_without(base, records_file, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    for budget in (None, 0.5):
        attach(model, FluxConfig(budget=budget)).save_pretrained(tmp_path / str(budget))
        model.get_decoder().flux_routing.detach()
        recipe = recipe_of(base, records_file, tmp_path, start=str(tmp_path / str(budget)), budget=budget is None)
        kind = "without" if budget is None else "with"
        for run in (load_model, dry_run):
            with pytest.raises(RecipeError, match=f"were trained {kind} budgets"):
                run(recipe)


def test_a_budget_of_none_is_refused(base):
    routing = attach(AutoModelForCausalLM.from_pretrained(base), FluxConfig(budget=0.5))
    with pytest.raises(FluxConfigError, match="budget is None, expected a share"):
        routing.budget = None


def test_budgets_are_refused_where_routers_have_none(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(FluxConfigError, match=r"a budget of 0\.5 was asked for, but these routers were not trained"):
        attach(model, FluxConfig(), budget=0.5)
    routing = attach(model)
    assert routing.budget is None
    with pytest.raises(FluxConfigError, match=r"a budget of 0\.5 was asked for"):
        routing.budget = 0.5


@pytest.mark.parametrize("key", ["decide", "budget", "ranking", "base_model"])
def test_keys_of_the_recipe_are_refused_within_routers(base, records_file, tmp_path, key):
    with pytest.raises(RecipeError, match=rf"routers: \['{key}'\] cannot be set there"):
        recipe_of(base, records_file, tmp_path, routers={key: "ends"})


def test_a_ranking_of_another_model_is_refused(base, records_file, ranked, tmp_path):
    values = json.loads((ranked / "flux_config.json").read_text())
    values["base_model"]["hidden_size"] = 999
    (tmp_path / "flux_config.json").write_text(json.dumps(values))
    recipe = recipe_of(base, records_file, tmp_path / "out", start=str(tmp_path))
    with pytest.raises(AdapterError, match=r"ranking of layers in .* was made for .*hidden_size"):
        load_model(recipe)
    with pytest.raises(RecipeError, match="made for another model: hidden_size"):
        dry_run(recipe)


def test_a_dry_run_counts_the_routers_that_a_ranking_starts(base, records_file, ranked, tmp_path):
    counted = dry_run(recipe_of(base, records_file, tmp_path, start=str(ranked)))
    assert counted["trained"] == dry_run(recipe_of(base, records_file, tmp_path))["trained"] > 0
