"""Trains routers by transformers' Trainer: the backbone is frozen, routers and multipliers learn.

Distribution, mixed precision, checkpoints, resuming and reporting are the Trainer's. What is ours: the module that it
trains, the objective, the optimizer's two groups, and noise that depends on seed, step and sequence alone, so that a
resumed run, or one on other processes, makes the same decisions.

Shape suffixes: N sequences of a pack, S tokens of a pack, L routed layers, C task classes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from flux_attention.hf.handle import Routing
from flux_attention.progress import Progress, silent
from flux_attention.routes import unit_name
from flux_attention.training.checkpoints import SHARDED, WEIGHTS, whole
from flux_attention.training.module import RoutedTraining, budgets_of, keep_attention, noise_of
from flux_attention.training.objective import SparsityObjective, temperature
from flux_attention.training.packing import PackedExamples, Steps, collate
from flux_attention.training.progress import TellProgress
from flux_attention.training.recipe import BUDGETS, Recipe


class RouterTrainer(Trainer):
    """
    Fits transformers' Trainer to routers.

    Parameters
    ----------
    routing : Routing
        Routers attached to the model to train them for.
    recipe : Recipe
        Targets, objective and training arguments.
    train_dataset : PackedExamples
        See ``data.load_data``.
    args : TrainingArguments, optional
        Default: those of the recipe.
    say : callable
        Takes a line of loss and classes now and then.
    progress : Progress
        Told of each step.
    **kwargs
        To ``Trainer``: callbacks, optimizers and so on.
    """

    def __init__(
        self,
        routing: Routing,
        recipe: Recipe,
        train_dataset: PackedExamples,
        args: TrainingArguments | None = None,
        *,
        say: Callable[[str], object] = print,
        progress: Progress = silent,
        **kwargs,
    ):
        self.recipe, self.routing = recipe, routing
        args = args or training_arguments(recipe)
        if routing.model.dtype == torch.float16:
            raise ValueError("the model is in float16, in which routers' gradients vanish: use bfloat16 or float32")
        knobs = recipe.objective
        objective = SparsityObjective(recipe.targets, knobs.multiplier_start, knobs.target_warmup)
        module = RoutedTraining(routing, objective)
        if recipe.gradient_checkpointing:  # reentrant checkpointing would hide the routers' gradients
            settings = {"use_reentrant": False, "context_fn": keep_attention}
            routing.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        self._sums: torch.Tensor | None = None
        super().__init__(
            model=module,
            args=args,
            train_dataset=Steps(train_dataset, args.max_steps * recipe.batch_size, args.seed),
            data_collator=partial(collate, classes=objective.classes),
            **kwargs,
        )
        version = getattr(getattr(self.accelerator.state, "fsdp_plugin", None), "fsdp_version", 2)
        if self.is_deepspeed_enabled or version != 2:
            found = "DeepSpeed" if self.is_deepspeed_enabled else f"FSDP{version}"
            raise ValueError(f"{found} cannot train routers: use DDP, or FSDP2 (fsdp_config: version: 2)")
        # ``compute_loss`` sees to gradient accumulation; accelerate would divide once more with older transformers.
        self.model_accepts_loss_kwargs = True
        self.accelerator.gradient_accumulation_steps = 1
        for callback in (PrinterCallback, ProgressCallback):
            if self.pop_callback(callback):
                self.add_callback(TellProgress(list(objective.classes), say, progress))

    def _get_train_sampler(self, train_dataset=None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)

    # Optimizer: descent on the routers, ascent on the multipliers.

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Make AdamW with a group for each; the multipliers' maximises, and keeps them at zero or above."""
        if self.optimizer is None:
            args, module = self.args, self.model
            groups = [
                {"params": list(module.routers.parameters()), "weight_decay": args.weight_decay},
                {
                    "params": list(module.objective.parameters()),
                    "weight_decay": 0.0,
                    "lr": self.recipe.objective.multiplier_lr,
                    "maximize": True,
                },
            ]
            self.optimizer = torch.optim.AdamW(
                groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon
            )
            self.optimizer.register_step_post_hook(lambda *_: module.objective.clamp())
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Make the recipe's schedule for the routers; the multipliers' learning rate is constant."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            scheduler.lr_lambdas[1] = lambda _: 1.0
            scheduler.optimizer.param_groups[1]["lr"] = scheduler.base_lrs[1]
        return scheduler

    # The loss: a mean over the sequences of all packs of a step, on all processes.

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the packs of a step, and how many sequences they hold on all processes."""
        packs, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(sum(len(pack["sequence_lengths"]) for pack in packs), device=device)
        return packs, self.accelerator.reduce(count, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """See ``RoutedTraining.forward``; scaled so that packs and processes add up to the mean over sequences."""
        numbers = inputs.pop("numbers").tolist()
        knobs, step = self.recipe.objective, self.state.global_step
        progress = step / max(1, self.state.max_steps)
        tau = temperature(progress, knobs.temperature_start, knobs.temperature_end, knobs.temperature_until)
        noise = noise_of(self.args.seed, step, numbers, len(self.routing.units))
        budgets = budgets_of(self.args.seed, step, numbers, *BUDGETS) if self.recipe.budget else None
        if budgets is not None:
            budgets = budgets.to(self.args.device)
        outputs = model(**inputs, temperature=tau, noise=noise, progress=progress, budgets=budgets)
        self._note(inputs["classes"], outputs)
        loss = outputs["loss"]
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss of step {step + 1} is {loss.item()} on sequences {numbers}: the model's hidden states have "
                "overflowed, its weights are damaged, or the learning rate is too high; the last checkpoint is whole"
            )
        if num_items_in_batch is not None:
            loss = loss * len(numbers) * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    # What is logged, by task class.

    def _note(self, classes: torch.Tensor, outputs: dict[str, torch.Tensor]) -> None:
        columns = [torch.ones_like(outputs["lm_loss_N"])[:, None], outputs["lm_loss_N"][:, None], outputs["gates_NL"]]
        values = torch.cat(columns, dim=1).cpu().double()
        if self._sums is None:
            self._sums = torch.zeros(len(self.model.names), values.shape[1], dtype=torch.float64)
        self._sums.index_add_(0, classes.cpu(), values)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each class's LM loss, Ω_MSR, multipliers and FA rate of each layer since the last log."""
        if "loss" in logs and self._sums is not None:
            sums = self.accelerator.reduce(self._sums.float().to(self.args.device), "sum").cpu()
            self._sums = None
            multipliers_C2 = whole(self.model.objective.multipliers_C2.detach())
            for index, name in enumerate(self.model.names):
                count, lm_loss, *full = sums[index].tolist()
                lambda1, lambda2 = multipliers_C2[index].tolist()
                logs |= {f"{name}/lambda1": lambda1, f"{name}/lambda2": lambda2}
                if count:
                    rates = [rate / count for rate in full]
                    logs |= {f"{name}/lm_loss": lm_loss / count, f"{name}/msr": 1 - sum(rates) / len(rates)}
                    for unit, rate in zip(self.routing.units, rates, strict=True):
                        logs[f"{name}/fa_rate_{unit_name(unit)}"] = rate
        super().log(logs, start_time)

    # Checkpoints hold routers and multipliers alone, put together where FSDP has sharded them.

    def _trained(self) -> dict[str, torch.Tensor]:
        state = self.model.state_dict().items()
        return {name: tensor for name, tensor in state if name.startswith(("routers.", "objective."))}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write routers and multipliers; every process takes part."""
        state = {name: whole(tensor).detach().cpu().contiguous() for name, tensor in self._trained().items()}
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / WEIGHTS)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        if set(state) != set(self._trained()):
            raise ValueError(
                f"the checkpoint {resume_from_checkpoint} was made for other routers or task classes; "
                "use another output folder"
            )
        set_model_state_dict(self.model, state, options=StateDictOptions(full_state_dict=True, strict=False))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = get_optimizer_state_dict(self.model, self.optimizer, options=SHARDED)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Of processes that share a CPU, older versions of transformers load to "cpu:0", which PyTorch cannot.
        if checkpoint is None or not (self.is_fsdp_enabled or self.args.device.type == "cpu"):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
        if self.is_fsdp_enabled:
            set_optimizer_state_dict(self.model, self.optimizer, state, options=SHARDED)
        else:
            self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def gather(self) -> None:
        """
        Give every process whole routers and multipliers, which FSDP has sharded; to be called before saving them.

        The backbone stays sharded: load the adapter anew to run the model.
        """
        for module in [*self.model.routers.modules(), self.model.objective]:
            for name, parameter in list(module.named_parameters(recurse=False)):
                if isinstance(parameter, DTensor):
                    module.register_parameter(name, nn.Parameter(whole(parameter.detach())))


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """
    Make a recipe's ``TrainingArguments``.

    Raises
    ------
    ValueError
        For an argument that transformers does not know, or a batch that the processes cannot share evenly.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if recipe.batch_size % processes:
        raise ValueError(f"batch_size is {recipe.batch_size}, expected a multiple of the {processes} processes")
    # Every router takes part in every step, so DDP need not look for unused ones.
    here = {"ddp_find_unused_parameters": False}
    here |= {"use_cpu": not torch.accelerator.is_available(), "dataloader_pin_memory": torch.cuda.is_available()}
    try:
        args = TrainingArguments(
            output_dir=recipe.output,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=recipe.batch_size // processes,
            remove_unused_columns=False,
            **{**here, **copy.deepcopy(recipe.training_arguments)},  # ``TrainingArguments`` completes dicts in place
        )
    except TypeError as error:
        raise ValueError(f"training: {error}") from None
    args._n_gpu = min(1, args.n_gpu)  # more GPUs by more processes: DataParallel cannot share packs
    if args.world_size != processes:  # each would run alone, and write the same files
        raise RuntimeError(f"{processes} processes were started, but torch.distributed joined {args.world_size}")
    return args
