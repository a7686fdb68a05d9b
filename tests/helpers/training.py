"""A training run that takes seconds: its records, recipe and model, and what it leaves."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.models import tiny_model

from flux_attention.training import Recipe, train
from flux_attention.training.records import PLAIN


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer):
    """A tiny model on disk, with a real tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("qwen3", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def record(task="Single QA", index=0, **changes):
    return {
        "context": f"def f{index}(x):\n    return x + {index}\n" * (3 + index % 4),
        "question": f"What does f{index} add?",
        "answer": f"It adds {index}.",
        "metadata": {"task": task, "is_prefix": bool(index % 2)},
        **changes,
    }


@pytest.fixture(scope="session")
def records_file(tmp_path_factory):
    """Of 24 questions of two task classes, and four plain texts."""
    path = tmp_path_factory.mktemp("records") / "data.jsonl"
    records = [record(("Single QA", "Code")[i % 2], i) for i in range(24)] + [{"text": "import os\n" * 20}] * 4
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def short_recipe(base, path, output):
    return Recipe.from_dict(
        dict(
            model=str(base),
            output=str(output),
            data=[{"path": str(path)}],
            routers=dict(sink=4, window=12, pool_size=6),
            targets={"Single QA": 0.3, "Code": 0.9, PLAIN: 1.0},
            max_length=192,
            batch_size=2,
            dtype="float32",
            gradient_checkpointing=False,
            objective=dict(multiplier_start=0.5, multiplier_lr=0.01),
            training=dict(max_steps=6, save_steps=2, learning_rate=3e-3),
        )
    )


#: What shards the model of ``short_recipe``.
FSDP = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"],
    },
}


@pytest.fixture
def recipe(base, records_file, tmp_path):
    """Of a run that takes seconds."""
    return short_recipe(base, records_file, tmp_path / "run")


@pytest.fixture(scope="session")
def finished(base, records_file, tmp_path_factory):
    """The folder of a run of ``recipe``, which no test may change."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(short_recipe(base, records_file, folder))
    return folder


@pytest.fixture
def done(recipe, finished):
    """A recipe whose run is finished, in a folder of its own."""
    shutil.copytree(finished, recipe.output)
    return recipe


def losses(folder):
    rows = json.loads((Path(folder) / "training_log.json").read_text())
    return [(row["step"], row["loss"], row["grad_norm"], row.get("Code/msr")) for row in rows]


def same_losses(alone, shared, tolerance):
    for one, two in zip(losses(alone), losses(shared), strict=True):
        assert one[0] == two[0] and one[1:3] == pytest.approx(two[1:3], abs=tolerance)
        assert one[3] == pytest.approx(two[3], abs=1e-6) if one[3] is not None else two[3] is None
