"""Whole runs: what they leave, going on to the same end, several processes, dry runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_model
from helpers.training import FSDP, losses, same_losses
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from flux_attention import AdapterError, FluxConfig, attach
from flux_attention.errors import DataError
from flux_attention.sizes import SHAPES
from flux_attention.training import Recipe, RecipeError, train
from flux_attention.training.checkpoints import last_checkpoint
from flux_attention.training.run import check_output, dry_run, load_model

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_the_repository_pass_a_dry_run(path, tmp_path):
    recipe = Recipe.from_yaml(path)
    if recipe.start is not None and not recipe.start.startswith("shipped"):  # what calibration would leave
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[recipe.shape]))
            ranking = tuple(range(model.config.num_hidden_layers))
            attach(model, FluxConfig(ranking=ranking, budget=0.5)).save_pretrained(tmp_path)
        recipe = replace(recipe, start=str(tmp_path))
    counted = dry_run(recipe)
    layers = {"qwen3-4b": 36, "qwen3-8b": 36, "llama-3.1-8b": 32}.get(path.stem)
    if path.stem in ("smollm2-135m", "qwen2.5-coder-0.5b"):
        assert counted["parameters"] / 1e6 == pytest.approx({"s": 134.5, "q": 494.0}[path.stem[0]], abs=0.1)
    if layers:
        assert counted["trained"] / layers == pytest.approx(592e3, rel=0.01)
        billions = {"qwen3-4b": 4.02, "qwen3-8b": 8.19, "llama-3.1-8b": 8.03}[path.stem]
        assert counted["parameters"] / 1e9 == pytest.approx(billions, abs=0.01)
        assert counted["steps"] == 300 and counted["tokens_per_step"] == 48 * 65_536
    assert counted["total"] == counted["weights"] + counted["optimizer"] + counted["activations"]


def test_a_dry_run_counts_the_model_itself_where_it_is_there(recipe):
    counted = dry_run(recipe)
    assert dry_run(Recipe.from_dict({**recipe.to_dict(), "shape": "qwen3-8b"})) == counted
    away = Recipe.from_dict({**recipe.to_dict(), "model": "nobody/nothing", "shape": "qwen3-8b"})
    assert dry_run(away)["parameters"] > 1000 * counted["parameters"]
    with pytest.raises(RecipeError, match="shape is 'gpt'"):
        dry_run(Recipe.from_dict({**recipe.to_dict(), "shape": "gpt"}))


def test_a_run_leaves_an_adapter_and_a_frozen_model(recipe, base, capsys):
    recipe.gradient_checkpointing = True
    before = load_file(base / "model.safetensors")
    trainer = train(recipe)
    after = trainer.routing.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    folder = Path(recipe.output)
    assert len(losses(folder)) == 6
    multipliers = trainer.model.objective.multipliers_C2.detach()
    assert (multipliers != 0.5).any(1).all() and (multipliers >= 0).all()
    card = (folder / "README.md").read_text()
    assert f"| base model | {base} (qwen3, 3 layers) |" in card and "| Code | 0.9 |" in card
    assert "<svg" in (folder / "training.svg").read_text()
    trainer.routing.detach()
    fresh = tiny_model("qwen3", vocab_size=before["model.embed_tokens.weight"].shape[0])
    fresh.load_state_dict(before, strict=False)
    loaded = attach(fresh, folder)
    for name, tensor in trainer.routing.routers.state_dict().items():
        assert torch.equal(loaded.routers.state_dict()[name], tensor)
    assert not torch.equal(tensor, torch.tensor([0.0, 4.5]))
    # Begun again with other knobs, it is refused; with the same ones there is nothing left to do.
    recipe.objective.multiplier_lr = 0.02
    with pytest.raises(RecipeError, match="its objective differ"):
        check_output(recipe, folder)


def test_head_level_routers_train_by_the_same_recipe(recipe):
    recipe = Recipe.from_dict({**recipe.to_dict(), "routers": dict(sink=4, window=12, pool_size=6, granularity="head")})
    recipe.training["max_steps"] = 2
    trainer = train(recipe)
    assert trainer.routing.config.granularity == "head" and trainer.routing.gates.shape[1] == 3 * 2
    rows = json.loads((Path(recipe.output) / "training_log.json").read_text())
    assert {key.split("fa_rate_")[1] for row in rows for key in row if key.startswith("Code/fa")} == {
        f"{layer}.{head}" for layer in range(3) for head in range(2)
    }
    assert "6 KV heads" in (Path(recipe.output) / "README.md").read_text()


def test_training_goes_on_from_an_adapter(recipe, finished, tmp_path):
    values = {**recipe.to_dict(), "routers": {}, "start": str(finished), "output": str(tmp_path / "second")}
    second = Recipe.from_dict({**values, "training": {**recipe.training, "max_steps": 1, "learning_rate": 0.0}})
    trainer = train(second)
    assert trainer.routing.config.sparse["window"] == 12
    before, after = (load_file(folder / "routers.safetensors") for folder in (finished, Path(second.output)))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert dry_run(second)["trained"] == dry_run(recipe)["trained"]
    with pytest.raises(RecipeError, match="made for another model: num_layers is 10, expected 3"):
        dry_run(Recipe.from_dict({**values, "model": "shipped"}))
    train(second)  # which is done: the recipe that lies there is the same one
    with pytest.raises(AdapterError, match=r"has no flux_config\.json"):
        load_model(Recipe.from_dict({**values, "start": str(tmp_path)}))


def test_a_restart_forgets_the_run_before(done, tmp_path):
    recipe = done
    recipe.targets = {**recipe.targets, "Code": 0.1}
    with pytest.raises(RecipeError, match="targets differ"):
        train(recipe)
    recipe.training["max_steps"] = 4
    folder, data = Path(recipe.output), recipe.data
    recipe.data = [{"path": str(tmp_path / "none.jsonl")}]
    with pytest.raises(DataError):  # before anything is lost
        train(recipe, restart=True)
    assert last_checkpoint(folder) is not None and (folder / "routers.safetensors").exists()
    (tmp_path / "bad.jsonl").write_text("{\n" * 12)
    recipe.data = [*data, {"path": str(tmp_path / "bad.jsonl")}]
    train(recipe, restart=True)
    assert len((folder / "malformed.txt").read_text().splitlines()) == 12
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert len(losses(folder)) == 4


def test_what_is_not_of_an_unfinished_run_is_not_deleted(recipe, finished):
    folder = Path(recipe.output)
    folder.mkdir()
    (folder / "README.md").write_text("a project's own")
    for restart in (False, True):
        with pytest.raises(RecipeError, match=r"holds README\.md, but no recipe\.yaml"):
            train(recipe, restart=restart)
    shutil.rmtree(folder)
    shutil.copytree(finished, folder)
    for checkpoint in folder.glob("checkpoint-*"):  # to save space
        shutil.rmtree(checkpoint)
    adapter = (folder / "routers.safetensors").read_bytes()
    with pytest.raises(RecipeError, match="no checkpoint to go on from"):
        train(recipe)
    recipe.start = str(folder)
    for restart in (False, True):
        with pytest.raises(RecipeError, match="the adapter that is started from"):
            train(recipe, restart=restart)
    assert (folder / "routers.safetensors").read_bytes() == adapter
    recipe.start, recipe.training["max_steps"] = None, 2
    train(recipe, restart=True)
    assert len(losses(folder)) == 2


def test_a_run_that_is_done_is_not_trained_further(done):
    folder = Path(done.output)
    before, first = losses(folder), load_file(folder / "routers.safetensors")
    for name in ("README.md", "training_log.json", "routers.safetensors"):
        (folder / name).unlink()  # as if killed before they were written
    train(done)
    second = load_file(folder / "routers.safetensors")
    assert losses(folder) == before and all(torch.equal(first[name], second[name]) for name in first)
    assert (folder / "README.md").exists()


def test_other_data_is_refused(done, records_file, tmp_path):
    changed = tmp_path / "data.jsonl"
    done.data = [{"path": str(changed)}]
    done.to_yaml(Path(done.output) / "recipe.yaml")  # as if begun with this file, before it changed
    changed.write_text(records_file.read_text().replace("It adds 2.", "It adds two."))
    with pytest.raises(RecipeError, match="the data is not what"):
        train(done)
    changed.write_text(records_file.read_text())
    train(done)


def test_prompts_beyond_the_models_positions_are_refused(recipe):
    recipe.max_length = 100_000
    with pytest.raises(RecipeError, match="has 512 positions"):
        train(recipe)


def command(recipe, tmp_path, processes=1):
    recipe.to_yaml(tmp_path / "recipe.yaml")
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*start, "-m", "flux_attention.cli", "--debug", "train", str(tmp_path / "recipe.yaml")]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def test_a_killed_run_goes_on_to_the_same_end(recipe, finished, tmp_path):
    """Killed hard after a checkpoint, with the next one left half-written."""
    recipe.training["save_total_limit"] = 10  # it may get further before it is killed
    killed = Path(recipe.output)
    run = subprocess.Popen(
        command(recipe, tmp_path), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    for _ in range(600):
        if last_checkpoint(killed) is not None:
            break
        assert run.poll() is None, run.stdout.read().decode()
        time.sleep(0.1)
    run.send_signal(signal.SIGKILL)
    run.wait()
    for later in (4, 6):
        shutil.rmtree(killed / f"checkpoint-{later}", ignore_errors=True)
    for result in ("training_log.json", "routers.safetensors"):
        (killed / result).unlink(missing_ok=True)
    (killed / "checkpoint-4").mkdir()
    (killed / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4, "epo')
    assert last_checkpoint(killed) == killed / "checkpoint-2"
    said = []
    train(recipe, say=said.append)
    assert f"going on from {killed / 'checkpoint-2'}" in said
    assert losses(killed) == losses(finished)
    first, second = (load_file(folder / "routers.safetensors") for folder in (finished, killed))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sharding", [{}, FSDP], ids=["ddp", "fsdp"])
def test_two_gpus_give_the_same_run_as_one(recipe, tmp_path, sharding):
    folders = [tmp_path / "alone", tmp_path / "shared"]
    for processes, folder in enumerate(folders, 1):
        recipe.output = str(folder)
        if processes == 2:
            recipe.training = {**recipe.training, **sharding}
        devices = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(processes)))}
        run = command(recipe, tmp_path, processes)
        done = subprocess.run(run, env={**environment(), **devices}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    same_losses(*folders, 2e-3)


def test_too_few_packs_are_refused(recipe):
    recipe.batch_size = 100
    with pytest.raises(RecipeError, match="batch_size is 100, but the data makes"):
        train(recipe)
