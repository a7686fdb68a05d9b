"""Router training on transformers' Trainer: the backbone is frozen, routers and multipliers learn.

Distribution, mixed precision, checkpoints, resuming and reporting are the Trainer's. What is ours: the module that it
trains, the objective, the optimizer's two groups, and noise that depends on seed, step and sequence alone, so that a
resumed run, or one on other processes, makes the same decisions.

Shape suffixes: N sequences of a pack, S tokens of a pack, L routed layers, C task classes, D hidden size.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from flux_attention import kernels
from flux_attention.attach import Routing
from flux_attention.evaluation.harness import check_head
from flux_attention.routes import unit_name
from flux_attention.training.data import Example, PackedExamples, collate
from flux_attention.training.objective import SparsityObjective, temperature
from flux_attention.training.recipe import Recipe

#: What a checkpoint holds of the model.
WEIGHTS = "training.safetensors"
#: How a sharded optimizer's state lies in a checkpoint: whole.
SHARDED = StateDictOptions(full_state_dict=True, cpu_offload=True)
#: Label positions whose logits are in memory at a time.
CHUNK = 2048


def keep_attention(device: torch.device):
    """
    What makes gradient checkpointing keep the outputs of attention, both branches', and compute all else again.

    They take as little memory as the hidden states between layers, and of a long pack's work they are most.
    """
    names = ["flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"]
    kept = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in names]
    if kernels.has_triton(device):
        from flux_attention.kernels import triton_prefill  # which registers it

        kept.append(triton_prefill.streaming._opoverload)
    return partial(create_selective_checkpoint_contexts, kept)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP may have sharded; every process takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Steps(Dataset):
    """
    The packs of a whole run, in the order in which they are trained on: every pass over the data is shuffled anew.

    One long epoch, so that no step is short and N processes share each step evenly.
    """

    def __init__(self, packs: PackedExamples, count: int, seed: int):
        self.packs, self.count, self.seed, self._orders = packs, count, seed, {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> list[tuple[int, Example]]:
        turn, place = divmod(index, len(self.packs))
        if turn not in self._orders:
            order = list(range(len(self.packs)))
            random.Random(f"{self.seed}-{turn}").shuffle(order)
            self._orders = {turn: order}
        return self.packs[self._orders[turn][place]]


def label_losses(head: nn.Module, hidden_PD: torch.Tensor, targets_P: torch.Tensor) -> torch.Tensor:
    """
    Loss in nats at the positions that carry a label: the language-model head runs there only, some at a time.

    Parameters
    ----------
    head : torch.nn.Module
        From hidden states to logits.
    hidden_PD, targets_P : torch.Tensor
        Hidden states, and the tokens that come after them.

    Returns
    -------
    torch.Tensor
        float32 (P,).
    """

    def chunk(hidden, targets):
        return F.cross_entropy(head(hidden).float(), targets, reduction="none")

    parts = zip(hidden_PD.split(CHUNK), targets_P.split(CHUNK), strict=True)
    return torch.cat([checkpoint(chunk, hidden, targets, use_reentrant=False) for hidden, targets in parts])


class RoutedTraining(nn.Module):
    """
    A frozen model with routers and multipliers, as the one module that a Trainer wraps.

    Parameters
    ----------
    routing : Routing
        Routers attached to the model.
    objective : SparsityObjective
        With a target for every task class.
    """

    def __init__(self, routing: Routing, objective: SparsityObjective):
        super().__init__()
        self.routing = routing
        self.backbone = routing.model.requires_grad_(False)
        self.routers, self.objective = routing.routers, objective
        self.names = list(objective.classes)
        check_head(routing)
        # Checkpointing needs training mode, in which a frozen model is to compute what it computes at inference.
        self._before = (self.backbone.training, self.backbone.config.use_cache, [])
        for module in self.backbone.modules():
            names = ["p"] if isinstance(module, nn.Dropout) else ["attention_dropout", "router_jitter_noise"]
            for name in names:
                if getattr(module, name, None):
                    self._before[2].append((module, name, getattr(module, name)))
                    setattr(module, name, 0.0)

    def release(self) -> None:
        """Leave the backbone as it was: its mode, its dropout, gradient checkpointing off."""
        mode, use_cache, dropouts = self._before
        self.backbone.train(mode)
        self.backbone.config.use_cache = use_cache
        if any(getattr(module, "gradient_checkpointing", False) for module in self.backbone.modules()):
            self.backbone.gradient_checkpointing_disable()
        for module, name, value in dropouts:
            setattr(module, name, value)

    @property
    def config(self):
        """The backbone's."""
        return self.backbone.config

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        sequence_lengths: torch.Tensor,
        prompt_lengths: torch.Tensor,
        classes: torch.Tensor,
        temperature: float,
        noise: torch.Tensor,
        progress: float,
    ) -> dict[str, torch.Tensor]:
        """
        The objective of one pack (see ``data.collate``).

        Returns
        -------
        dict
            ``loss``: the sequences' mean; ``lm_loss_N``: float32, nats a labelled token; ``gates_NL``.
        """
        with self.routing.soft(temperature, noise):
            hidden_SD = (
                self.backbone.get_decoder()(
                    input_ids=input_ids,
                    position_ids=position_ids,
                    use_cache=False,
                    sequence_lengths=sequence_lengths.tolist(),
                    prompt_lengths=prompt_lengths.tolist(),
                )
                .last_hidden_state[0]
                .contiguous()
            )
        # Position s predicts the token at s + 1; no label stands on a sequence's first token.
        places = (labels[0, 1:] != -100).nonzero()[:, 0]
        losses_P = label_losses(self.backbone.get_output_embeddings(), hidden_SD[places], labels[0, 1:][places])
        count = len(sequence_lengths)
        owner_S = torch.arange(count, device=places.device).repeat_interleave(
            sequence_lengths.to(places.device), output_size=labels.shape[1]
        )
        owner_P = owner_S[places + 1]
        total_N = torch.zeros(count, device=places.device).index_add(0, owner_P, losses_P)
        lm_loss_N = total_N / owner_P.bincount(minlength=count)
        gates_NL = self.routing.gates.to(lm_loss_N.device)
        names = [self.names[index] for index in classes.tolist()]
        loss = self.objective(lm_loss_N, gates_NL, names, progress)
        return {"loss": loss, "lm_loss_N": lm_loss_N.detach(), "gates_NL": gates_NL.detach()}


def noise_of(seed: int, step: int, numbers: list[int], layers: int) -> torch.Tensor:
    """The Gumbel noise (N, L, 2) of these sequences in this step, whatever the pack or the process they are in."""
    noise = []
    for number in numbers:
        digest = hashlib.sha256(f"{seed}-{step}-{number}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:16], "big"))
        noise.append(torch.from_numpy(generator.gumbel(size=(layers, 2)).astype(np.float32)))
    return torch.stack(noise)


class RouterTrainer(Trainer):
    """
    transformers' Trainer for routers.

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
    **kwargs
        To ``Trainer``: callbacks, optimizers and so on.
    """

    def __init__(
        self,
        routing: Routing,
        recipe: Recipe,
        train_dataset: PackedExamples,
        args: TrainingArguments | None = None,
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
            settings = {"use_reentrant": False, "context_fn": keep_attention(args.device)}
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
                self.add_callback(Progress(list(objective.classes)))

    def _get_train_sampler(self, train_dataset=None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)

    # Optimizer: descent on the routers, ascent on the multipliers.

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """AdamW with a group for each; the multipliers' maximises, and keeps them at zero or above."""
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
        """The recipe's schedule for the routers; the multipliers' learning rate is constant."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            scheduler.lr_lambdas[1] = lambda _: 1.0
            scheduler.optimizer.param_groups[1]["lr"] = scheduler.base_lrs[1]
        return scheduler

    # The loss: a mean over the sequences of all packs of a step, on all processes.

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The packs of a step, and how many sequences they hold on all processes."""
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
        outputs = model(**inputs, temperature=tau, noise=noise, progress=progress)
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
        if checkpoint is None or not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
        set_optimizer_state_dict(self.model, self.optimizer, state, options=SHARDED)
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


class Progress(ProgressCallback):
    """The Trainer's progress bar, and one line a log instead of all numbers."""

    def __init__(self, names: list[str]):
        super().__init__()
        self.names = names

    def on_train_begin(self, args, state, control, **kwargs):
        """Count from where a run goes on, so that the time left is that of the steps left."""
        super().on_train_begin(args, state, control, **kwargs)
        self.began, self.current_step = (time.monotonic(), state.global_step), state.global_step
        if self.training_bar is not None:
            self.training_bar.n = self.training_bar.initial = state.global_step
            self.training_bar.refresh()

    def _left(self, state) -> str:
        """About how long the steps left take."""
        then, first = self.began
        seconds = (time.monotonic() - then) / max(1, state.global_step - first) * (state.max_steps - state.global_step)
        return str(timedelta(seconds=round(seconds)))

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print loss, and each class's Ω_MSR and LM loss."""
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        classes = [
            f"{name} Ω {logs[f'{name}/msr']:.2f}, {logs[f'{name}/lm_loss']:.3f} nats"
            for name in self.names
            if f"{name}/msr" in logs
        ]
        line = f"step {state.global_step} of {state.max_steps}: loss {float(logs['loss']):.3f}; " + "; ".join(classes)
        line += f"; {self._left(state)} left"
        if self.training_bar is None:
            print(line, flush=True)
        else:
            self.training_bar.write(line)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """
    A recipe's ``TrainingArguments``.

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


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint: a run that was killed while it wrote one goes on from the one before."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        # The trainer's state is what is written last, but a full disk or a crash can cut any file.
        with contextlib.suppress(Exception):
            step = int(json.loads((path / "trainer_state.json").read_text())["global_step"])
            load_file(path / WEIGHTS)
            for name in ("optimizer.pt", "scheduler.pt"):
                torch.load(path / name, map_location="cpu", weights_only=True)
            found.append((step, path))
    return max(found)[1] if found else None
