"""Recipes: the paper's defaults, and what is refused."""

import pytest

from flux_attention.training import Recipe, RecipeError


def test_recipes_round_trip_and_default_to_the_papers(tmp_path):
    recipe = Recipe.from_dict(dict(model="a", output="b", data=[{"path": "c.jsonl"}]))
    recipe.to_yaml(tmp_path / "r.yaml")
    assert Recipe.from_yaml(tmp_path / "r.yaml").resolved == recipe.resolved
    assert "learning_rate: 0.0005" in (tmp_path / "r.yaml").read_text()
    (tmp_path / "r.yaml").write_text("{model: a, output: b, data: [], training: {learning_rate: 5e-4, max_steps: 20}}")
    assert Recipe.from_yaml(tmp_path / "r.yaml").training == {"learning_rate": 5e-4, "max_steps": 20}
    args = recipe.training_arguments
    assert (args["max_steps"], recipe.batch_size, recipe.max_length) == (300, 48, 65_536)
    assert (args["learning_rate"], args["adam_beta1"], args["adam_beta2"], args["weight_decay"]) == (
        5e-4,
        0.9,
        0.95,
        0.1,
    )
    assert (args["warmup_steps"], args["lr_scheduler_type"], args["max_grad_norm"]) == (0.2, "cosine", 5.0)
    assert recipe.objective.multiplier_lr == 1e-3
    assert recipe.targets["MultiHop QA"] == 0.45 and recipe.targets["Code"] == 1.0


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(steps=3), r"unknown keys \['steps'\]"),
        (dict(objective=dict(tau=1)), r"unknown keys \['tau'\] in objective"),
        (dict(objective=dict(temperature_end=0)), "above 0"),
        (dict(objective=dict(multiplier_lr="fast")), "multiplier_lr is 'fast'"),
        (dict(routers=dict(window=0)), "routers: window is 0"),
        (dict(routers=dict(windows=3)), "routers: .*windows"),
        (dict(targets={"Code": 1.5}), "'Code' is 1.5"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(max_length=100, pack_length=99), "pack_length is 99"),
        (dict(data="x.jsonl"), "expected a list of sources"),
        (dict(training=dict(output_dir="x")), "training.output_dir cannot be set"),
        (dict(dtype="int8"), "dtype is 'int8'"),
        (dict(dtype="float16"), "dtype is 'float16'"),
        (dict(objective=dict(temperature_until=0)), "temperature_until must be above 0"),
        (dict(training=dict(num_train_epochs=3)), "training.num_train_epochs cannot be set"),
        (dict(training=dict(save_only_model=True)), "training.save_only_model cannot be set"),
        (dict(training=dict(logging_steps=0.1)), "training.logging_steps is 0.1, expected a whole number"),
        (dict(training=dict(save_steps=0)), "training.save_steps is 0, expected a whole number"),
        (dict(training=dict(save_steps=5, logging_steps=2)), "multiple of logging_steps"),
        (dict(training=dict(max_steps=0)), "max_steps is 0"),
        (dict(model=""), "model is ''"),
        (dict(start=3), "start is 3, expected an adapter's directory or Hub id"),
        (dict(output=3), "output is 3, expected text"),
        (dict(objective=[1]), r"objective is \[1\], expected keys and values"),
        (dict(objective=dict(target_warmup=-1)), "objective.target_warmup is -1, expected a number, at least 0"),
        (dict(objective=dict(target_warmup=True)), "objective.target_warmup is True, expected a number, at least 0"),
        (dict(routers=[1]), r"routers is \[1\], expected keys and values"),
        (dict(gradient_checkpointing="no"), "gradient_checkpointing is 'no', expected true or false"),
        ({1: 2}, r"unknown keys \['1'\] in Recipe; known keys are \['model', "),
        (dict(start="x", routers=dict(sink=4)), "routers and start are both there"),
    ],
)
def test_wrong_recipes_are_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict({**dict(model="a", output="b", data=[]), **change})


def test_damaged_recipe_files_name_the_file(tmp_path):
    path = tmp_path / "r.yaml"
    for text, message in (("a: [", "not YAML"), ("- 1", "list, expected keys"), ("model: a", "incomplete")):
        path.write_text(text)
        with pytest.raises(RecipeError, match=f"r.yaml.*{message}"):
            Recipe.from_yaml(path)
