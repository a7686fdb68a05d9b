"""What training reached: the card's section, and the plot."""

import xml.dom.minidom
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers.models import CONFIG, tiny_model
from huggingface_hub import ModelCard

from flux_attention import attach
from flux_attention.training import Recipe
from flux_attention.training.card import card, plot


class Data(list):
    tokens = 123_456


@pytest.fixture
def trainer():
    routing = attach(tiny_model("qwen3"), CONFIG)
    routing.config = replace(routing.config, base_model=replace(routing.config.base_model, name="org/model"))
    recipe = Recipe.from_dict(
        dict(
            model="org/model",
            output="out",
            data=[],
            targets={"Code": 0.5, "Summarization": 1, "never seen": 0.2},
            batch_size=48,
            config={"max_position_embeddings": 65536},
        )
    )
    return SimpleNamespace(routing=routing, recipe=recipe, state=SimpleNamespace(global_step=20))


@pytest.fixture
def rows():
    """Twenty steps; only the last two count as reached, and ``Summarization`` is in none of them."""
    rows = []
    for step in range(1, 21):
        row = {"step": step, "loss": 1.0}
        for name in ("Code", "Summarization") if step <= 18 else ("Code",):
            row |= {f"{name}/msr": step / 100, f"{name}/lm_loss": 2.0 + step}
            row |= {f"{name}/fa_rate_{unit}": 0.5 for unit in range(3)}
        row |= {f"{name}/lambda{i}": i * step for name in ("Code", "Summarization") for i in (1, 2)}
        rows.append(row)
    return rows


def test_the_card_says_what_training_reached(trainer, rows, tmp_path):
    card(trainer, rows, Data([None] * 1234)).save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.base_model == "org/model"
    head, section = read.text.split("\n\n## What training reached\n\n")
    assert head.strip().startswith("# Layer routers for org/model")
    assert "from_pretrained('org/model', max_position_embeddings=65536)" in head
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert lines[2:] == [
        "| Code | 0.5 | 0.195 | 21.5000 | 20.000 | 40.000 |",  # of steps 19 and 20
        "| Summarization | 1.0 | 0.175 | 19.5000 | 20.000 | 40.000 |",  # of the last two that had any: 17 and 18
    ]
    trained = sum(parameter.numel() for parameter in trainer.routing.routers.parameters())
    said = f"20 steps of 48 packs; {trained:,} parameters trained; 123,456 tokens of data in 1,234 packs."
    assert said in section and section.endswith("[training_log.json](training_log.json).\n")
    assert "\n\n![Training](training.svg)\n\n" in section


def test_the_plot_has_every_class_that_was_seen(trainer, rows, tmp_path):
    plot(rows, trainer.recipe, ["0", "1", "2"], tmp_path / "training.svg")
    text = xml.dom.minidom.parse(str(tmp_path / "training.svg")).toxml()
    for shown in ("Code", "Summarization", "Ω_MSR (dotted: target)", "λ1 (dotted: λ2)"):
        assert shown in text
    assert "never seen" not in text
    plot([], trainer.recipe, ["0"], tmp_path / "none.svg")  # of a run that logged nothing
    assert not (tmp_path / "none.svg").exists()
