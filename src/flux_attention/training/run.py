"""Runs a whole training, from a recipe to an adapter; or a dry run that only counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainerState

from flux_attention import names
from flux_attention.adapters import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, check_base_model, load_config
from flux_attention.config import FluxConfig
from flux_attention.errors import AdapterError, FluxConfigError, RecipeError
from flux_attention.files import check_writable
from flux_attention.hf import loading
from flux_attention.hf.attach import attach
from flux_attention.hf.handle import Routing
from flux_attention.hf.support import max_positions
from flux_attention.progress import Progress, silent
from flux_attention.router import bias_by_rank
from flux_attention.routes import unit_name
from flux_attention.sizes import SHAPES
from flux_attention.tasks.text import OTHER_TEXT
from flux_attention.training.card import card, plot
from flux_attention.training.checkpoints import last_checkpoint
from flux_attention.training.data import check_sources, load_data
from flux_attention.training.interrupt import Interrupted, SaveOnInterrupt
from flux_attention.training.module import CHUNK
from flux_attention.training.packing import PackedExamples
from flux_attention.training.recipe import MEAN_BUDGET, Recipe, check_trains
from flux_attention.training.trainer import RouterTrainer, training_arguments

#: What a run leaves in its folder besides what it goes on from.
RESULTS = (CARD_FILE, "training.svg", "training_log.json", WEIGHTS_FILE, CONFIG_FILE, "malformed.txt", "left_out.txt")


def check_model(recipe: Recipe) -> None:
    """
    Refuse, before anything is loaded, a model or a starting adapter that is not there, and too long sequences.

    Raises
    ------
    RecipeError, AdapterError
        With what is missing, or the model's positions.
    """
    try:
        reason = names.check_model(names.model_path(recipe.model))
    except ValueError as error:
        raise RecipeError(f"model: {error}") from None
    if recipe.start is not None:
        load_config(names.adapter_path(recipe.start))
    if reason:
        raise RecipeError(f"cannot load {recipe.model}: {reason}")
    most = max_positions(_model_config(recipe))
    if most and recipe.max_length > most:
        raise RecipeError(
            f"max_length is {recipe.max_length}, but {recipe.model} has {most} positions: shorten it, or extend them "
            "by `config`, with rope_parameters that fit and max_position_embeddings"
        )


def load_model(recipe: Recipe, device: str | torch.device = "cpu") -> Routing:
    """
    Load the recipe's model with routers, fresh ones or those that it starts from; loaded in what ``device`` is fast in.

    Raises
    ------
    OSError, ValueError
        If there is no such model, or no such adapter for it.
    """
    model = loading.load_model(recipe.model, recipe.dtype, device, **recipe.config)
    if recipe.start is None:
        return attach(model, recipe.flux_config)
    folder, start = load_config(names.adapter_path(recipe.start))
    check_start(start, recipe)
    if start.ranking is None:
        return attach(model, folder, decide=recipe.decide)
    routing = attach(model, from_ranking(start, recipe))
    try:
        check_base_model(start, routing.config.base_model, str(folder))
    except AdapterError:
        routing.detach()
        raise
    bias_by_rank([routing.router(layer) for layer in start.ranking])
    return routing


def check_start(start: FluxConfig, recipe: Recipe) -> None:
    """
    Refuse to train routers with budgets that were trained without, and the reverse, and patterns that packs lack.

    Raises
    ------
    RecipeError
        With what the adapter is.
    """
    try:
        check_trains(start)
    except FluxConfigError as error:
        raise RecipeError(f"{recipe.start}: {error}") from None
    if (block := start.sparse.get("block_size", 1)) != 1:
        raise RecipeError(
            f"{recipe.start} rounds to blocks of {block} tokens (block_size), which training does not compute; leave "
            "block_size out of its flux_config.json for exact tokens (flux-attention import --exact)"
        )
    if start.ranking is None and recipe.routers:
        raise RecipeError(f"{recipe.start} has routers, so it says what `routers` would: leave granularity out")
    if start.ranking is None and (start.budget is not None) != recipe.budget:
        kind = "without budgets" if start.budget is None else "with budgets"
        raise RecipeError(
            f"budget is {str(recipe.budget).lower()}, but the routers of {recipe.start} were trained {kind}: set it "
            "as they were, or start from a calibrated adapter or fresh routers"
        )


def from_ranking(start: FluxConfig, recipe: Recipe) -> FluxConfig:
    """Make the configuration of routers, by layer or head, that are trained from a ranking: its patterns and sizes."""
    budget = MEAN_BUDGET if recipe.budget else None
    fixed: dict[str, Any] = dict(ranking=None, budget=budget, decide=recipe.decide or "prefill", base_model=None)
    return replace(start, **fixed, **recipe.routers)


def check_output(recipe: Recipe, folder: Path, restart: bool = False) -> None:
    """
    Refuse an output folder in which something would be lost, and to go on with a run that another recipe began.

    Raises
    ------
    RecipeError
        With the files that would be lost, or the recipe's keys that differ.
    """
    if recipe.start is not None and Path(names.adapter_path(recipe.start)).resolve() == folder.resolve():
        raise RecipeError(f"the output is {folder}, the adapter that is started from: use another output")
    kept, checkpoint = folder / "recipe.yaml", last_checkpoint(folder)
    found = [name for name in RESULTS if not name.endswith(".txt") and (folder / name).exists()]
    if found and not kept.exists():
        raise RecipeError(f"{folder} holds {', '.join(found)}, but no recipe.yaml of a run: use another output")
    if found and not restart and checkpoint is None:
        raise RecipeError(
            f"{folder} holds {', '.join(found)}, but no checkpoint to go on from: use another output, or --restart, "
            "which deletes them"
        )
    if restart or not kept.exists() or checkpoint is None:
        return
    before, now = Recipe.from_yaml(kept).resolved, recipe.resolved
    changed = sorted(key for key in now if key != "output" and now[key] != before[key])
    if changed:
        raise RecipeError(
            f"{folder} holds a run of another recipe (its {', '.join(changed)} differ): use another output, restart "
            "it with --restart, or train with the recipe.yaml that lies there"
        )


def train(
    recipe: Recipe | str | Path,
    restart: bool = False,
    say: Callable[[str], object] = print,
    progress: Progress = silent,
) -> RouterTrainer:
    """
    Train routers by a recipe; a run that was interrupted goes on from its last checkpoint.

    The output folder gets the adapter (``flux_config.json``, ``routers.safetensors``), ``README.md`` (its card),
    ``training.svg``, ``training_log.json``, ``recipe.yaml``, and ``malformed.txt`` or ``left_out.txt`` if records were
    left out, as unusable or too long.

    Parameters
    ----------
    recipe : Recipe, str or Path
        A recipe, or the path of a YAML file.
    restart : bool
        Begin anew even if the output folder holds checkpoints.
    say : callable
        Takes the lines that tell what is going on.
    progress : Progress
        Told of each step.

    Returns
    -------
    RouterTrainer
        After training; its ``routing`` has the trained routers attached.

    Raises
    ------
    RecipeError, DataError
        For a recipe or data that cannot be used.
    Interrupted
        By Ctrl-C, when the step at work is finished and saved.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.from_yaml(recipe)
    args = training_arguments(recipe)
    folder = Path(recipe.output)
    main = args.process_index == 0
    check_output(recipe, folder, restart)
    check_model(recipe)
    if main:
        check_writable(folder)
        say(f"making data for {recipe.model}")
    # Before the model: what is wrong with data is known before a large one is loaded.
    data, report = load_data(recipe, loading.load_tokenizer(recipe.model), args.main_process_first)
    if main:
        say(f"{report}\n{len(data):,} packs of up to {recipe.pack_length:,} tokens, {recipe.batch_size} in a step")
    if len(data) < recipe.batch_size:
        raise RecipeError(f"batch_size is {recipe.batch_size}, but the data makes {len(data)} packs only")
    if main and (note := loading.dequantising(recipe.model, recipe.dtype, args.device)):
        say(note)
    if main:
        say(f"loading {recipe.model}")
    torch.manual_seed(args.seed)  # of the routers' initial weights
    routing = load_model(recipe, args.device)
    interrupt = SaveOnInterrupt()
    trainer = RouterTrainer(routing, recipe, data, args, say=say, progress=progress, callbacks=[interrupt])
    trainer.accelerator.wait_for_everyone()
    checkpoint, digest = None if restart else last_checkpoint(folder), data.hash()
    if checkpoint is not None:
        if main:
            say(f"going on from {checkpoint}")
        kept = folder / "data.sha256"
        if kept.exists() and kept.read_text().strip() != digest:
            why = f". Generated: {OTHER_TEXT}" if any("generated" in source for source in recipe.data) else ""
            raise RecipeError(f"the data is not what {folder} was begun with: use another output, or --restart{why}")
    trainer.accelerator.wait_for_everyone()
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:  # whatever lies there is not of this run
            for old in folder.glob("checkpoint-*") if restart else ():
                shutil.rmtree(old)
            for name in RESULTS:
                (folder / name).unlink(missing_ok=True)
        recipe.to_yaml(folder / "recipe.yaml")
        for name, kind in (("malformed", "malformed"), ("left_out", "too long")):
            if some := getattr(report, name):
                lines = "".join(f"{where}: {reason}\n" for where, reason in some)
                (folder / f"{name}.txt").write_text(lines, encoding="utf-8")
                say(f"all {kind} records are listed in {folder / f'{name}.txt'}")
        (folder / "data.sha256").write_text(digest + "\n")
    _fit(trainer, interrupt, checkpoint)
    trainer.gather()
    if main:
        finish(trainer, folder, data)
        say(f"the adapter is in {folder}: attach(model, {str(folder)!r})")
    trainer.accelerator.wait_for_everyone()
    return trainer


def _fit(trainer: RouterTrainer, interrupt: SaveOnInterrupt, checkpoint: Path | None) -> None:
    """Train to the last step, from the checkpoint if there is one; or raise ``Interrupted``."""
    steps = trainer.args.max_steps
    state = None if checkpoint is None else TrainerState.load_from_json(checkpoint / "trainer_state.json")
    try:
        if state is not None and state.global_step >= steps:  # it was stopped when all was trained
            trainer.state = state
            trainer._load_from_checkpoint(str(checkpoint))
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        interrupt.release()
        trainer.model.release()
    if interrupt.stopped:
        step = trainer.state.global_step
        raise Interrupted(step, steps, Path(trainer.args.output_dir) / f"checkpoint-{step}")


def finish(trainer: RouterTrainer, folder: Path, data: PackedExamples) -> None:
    """Write the adapter, its card, its log and its plot."""
    rows = [row for row in trainer.state.log_history if "loss" in row]
    trainer.routing.save_pretrained(folder)
    (folder / "training_log.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    plot(rows, trainer.recipe, list(map(unit_name, trainer.routing.units)), folder / "training.svg")
    card(trainer, rows, data).save(folder / CARD_FILE)


# --- Dry run ----------------------------------------------------------------------------------------------------------


def _model_config(recipe: Recipe):
    """Return the model's configuration: its own, or where that does not lie on this machine, the recipe's ``shape``."""
    if recipe.shape not in {None, *SHAPES}:
        raise RecipeError(f"shape is {recipe.shape!r}, expected one of {list(SHAPES)}")
    path = names.model_path(recipe.model)
    try:
        return loading.load_config(recipe.model, local_files_only=recipe.shape is not None, **recipe.config)
    except OSError as error:
        if recipe.shape is not None and not Path(path).is_dir():
            return AutoConfig.for_model(**{**SHAPES[recipe.shape], **recipe.config})
        reason = str(error).splitlines()[0]
        raise RecipeError(f"cannot read the configuration of {recipe.model}: {reason}") from None


def dry_run(recipe: Recipe) -> dict[str, Any]:
    """
    Count what a run would take, by arithmetic: the model is built without memory for its weights, no data is read.

    Returns
    -------
    dict
        ``parameters``, ``trained``, ``steps``, ``packs_per_step``, ``tokens_per_step``; in bytes, for each GPU as if
        it held the whole model, ``weights``, ``optimizer`` (routers, their gradients and Adam's moments),
        ``activations`` (what a pack of ``pack_length`` tokens keeps for the backward pass, and one layer's working set)
        and ``total``.

    Raises
    ------
    RecipeError
        If the model's configuration is not at hand and the recipe names no ``shape``.
    """
    check_sources(recipe)
    config = _model_config(recipe)
    sizes, made_for = recipe.flux_config, None
    if recipe.start is not None:
        start = load_config(names.adapter_path(recipe.start))[1]
        check_start(start, recipe)
        sizes, made_for = replace(start, base_model=None), start.base_model
        if start.ranking is not None:
            sizes = from_ranking(start, recipe)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        routing = attach(model, sizes)
    if made_for is not None and (differences := made_for.differences(routing.config.base_model)):
        raise RecipeError(f"the adapter {recipe.start} was made for another model: {'; '.join(differences)}")
    args = recipe.training_arguments
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in routing.routers.parameters())
    itemsize = 4 if recipe.dtype == "float32" else 2
    tokens, hidden = recipe.pack_length, config.hidden_size
    heads, kv_heads = routing.config.base_model.num_heads, routing.config.base_model.num_kv_heads
    attention = (2 * heads + 2 * kv_heads) * routing.config.base_model.head_dim  # query, key, value, output
    layer = itemsize * tokens * (4 * hidden + 3 * attention + 3 * config.intermediate_size)
    kept = itemsize * tokens * hidden if recipe.gradient_checkpointing else layer
    if recipe.gradient_checkpointing:  # both branches' outputs and log-sum-exps are kept
        kept += 2 * tokens * heads * (itemsize * routing.config.base_model.head_dim + 4)
    logits = 2 * CHUNK * config.vocab_size * (itemsize + 4)
    memory = {
        "weights": itemsize * parameters,
        "optimizer": 16 * trained,
        "activations": kept * config.num_hidden_layers + layer + logits,
    }
    return {
        "parameters": parameters,
        "trained": trained,
        "steps": args["max_steps"],
        "packs_per_step": recipe.batch_size,
        "tokens_per_step": recipe.batch_size * tokens,
        **memory,
        "total": sum(memory.values()),
    }
