"""The recipes of real models: they can be read, and what they name is there."""

from pathlib import Path

import pytest

from flux_attention.sizes import SHAPES
from flux_attention.tasks.families import EVERY_FAMILY
from flux_attention.tasks.questions import NATURAL
from flux_attention.training import Recipe
from flux_attention.training.data import check_sources

RECIPES = sorted((Path(__file__).parents[2] / "recipes/models").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_can_be_read(path):
    recipe = Recipe.from_yaml(path)
    check_sources(recipe)
    assert recipe.shape == path.stem and recipe.shape in SHAPES
    for source in recipe.data:
        tasks = source.get("tasks", {})
        assert set(tasks) <= {*EVERY_FAMILY, *NATURAL} and set(tasks.values()) <= set(recipe.targets)
        for family in set(tasks) & set(NATURAL):
            assert tasks[family] == NATURAL[family].task_class
    assert path.stem in path.read_text().split("\n")[1] + path.read_text().split("\n")[2]


def test_there_are_recipes_for_real_models():
    assert {"smollm2-135m", "qwen2.5-coder-0.5b"} <= {path.stem for path in RECIPES}
