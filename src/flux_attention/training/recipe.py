"""A recipe describes a training run in YAML: model, data, the task classes' targets, and every knob of the method.

The defaults are the paper's ("Training: soft to hard"; 300 steps of 48 sequences of up to 65,536 tokens).
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, Strict
from pydantic.dataclasses import dataclass

from flux_attention.config import FluxConfig
from flux_attention.errors import FluxConfigError, RecipeError
from flux_attention.files import replacing
from flux_attention.patterns import full_pattern, sparse_pattern
from flux_attention.validation import (
    NO_OTHER_KEYS,
    NonemptyText,
    Positive,
    Text,
    checked,
    expected,
    from_keys,
    text_keys,
)

#: The paper's task classes and their target Ω_MSR, and the class of plain text.
TARGETS = {
    "Single QA": 0.45,
    "MultiHop QA": 0.45,
    "Summarization": 1.0,
    "Code": 1.0,
    "In-Context Learning": 1.0,
    "language modeling": 1.0,
}
#: What ``training`` holds if the recipe says nothing: arguments of transformers' ``TrainingArguments``.
TRAINING = {
    "max_steps": 300,
    "learning_rate": 5e-4,
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.2,
    "max_grad_norm": 5.0,
    "logging_steps": 1,
    "save_steps": 20,
    "save_total_limit": 2,
    "seed": 0,
    "report_to": "none",
}
#: Arguments that a recipe may not set, and the key that takes their place.
TAKEN = {
    "num_train_epochs": "training.max_steps",
    "optim": "none: routers descend and multipliers ascend by AdamW",
    "output_dir": "output",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "batch_size",
    "resume_from_checkpoint": "none: a run goes on from its own folder",
    "remove_unused_columns": "none",
    "gradient_checkpointing": "gradient_checkpointing, outside of training",
    "activation_checkpointing": "gradient_checkpointing, outside of training",
    "bf16": "dtype",
    "fp16": "dtype",
    "save_only_model": "none: a run goes on from its checkpoints",
    "ignore_data_skip": "none: a run goes on to the same end",
    "data_seed": "training.seed",
    "label_smoothing_factor": "none",
    "eval_strategy": "none: flux-attention eval judges adapters",
    "load_best_model_at_end": "none: flux-attention eval judges adapters",
}


#: What ``routers`` may hold, written out; ``FluxConfig``'s shorthand is short for the first.
ROUTER_KEYS = ("sparse", "full", "pool_size", "granularity", "end_tokens")
#: Between which a sample's target is drawn with ``budget: true``, and the adapter's default then.
BUDGETS, MEAN_BUDGET = (0.2, 0.95), 0.6


class _Loader(yaml.SafeLoader):
    """Reads 5e-4 as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


#: As YAML would give it back.
_PLAIN = BeforeValidator(lambda value: json.loads(json.dumps(value, default=str)))
_Keys = Annotated[dict[str, Any], _PLAIN, expected("keys and values")]
_Number = Annotated[float, Strict(), Field(ge=0), expected("a number, at least 0")]
_Ratio = Annotated[float, Strict(), Field(ge=0, le=1), expected("a ratio between 0 and 1")]
_Adapter = Annotated[str, Strict(), Field(min_length=1), expected("an adapter's directory or Hub id")]
_Sources = Annotated[list[dict[str, Any]], _PLAIN, expected("a list of sources, each with `path` or `generated`")]


@checked(RecipeError, within="objective")
@dataclass(config=NO_OTHER_KEYS)
class Objective:
    """
    Holds the knobs of ``SparsityObjective`` and of the relaxation.

    Attributes
    ----------
    multiplier_lr, multiplier_start : float
        Learning rate and first value of λ1 and λ2.
    target_warmup : float
        Share of the steps over which targets rise from 0.
    temperature_start, temperature_end, temperature_until : float
        τ falls by a cosine from start to end over this first share of the steps.
    """

    multiplier_lr: _Number = 1e-3
    multiplier_start: _Number = 0.0
    target_warmup: _Number = 0.2
    temperature_start: _Number = 1.5
    temperature_end: _Number = 1.0
    temperature_until: _Number = 0.6

    def __post_init__(self):
        for name in ("temperature_start", "temperature_end", "temperature_until"):
            if getattr(self, name) == 0:
                raise RecipeError(f"objective.{name} must be above 0")


def check_trains(config: FluxConfig) -> None:
    """
    Refuse patterns that gradients do not flow through.

    Raises
    ------
    FluxConfigError
        With what to use instead.
    """
    for pattern in (sparse_pattern(config), full_pattern(config)):
        if not pattern.trains:
            raise FluxConfigError(
                f"gradients do not flow through {pattern.name}, which selects: train with the patterns full and "
                f"streaming, and set {pattern.name} in the adapter's flux_config.json afterwards"
            )


@checked(RecipeError)
@dataclass(config=NO_OTHER_KEYS)
class Recipe:
    """
    Says all that a training run depends on.

    Attributes
    ----------
    model : str
        Directory or Hub id of the frozen causal LM; ``shipped`` for the one that comes along.
    output : str
        Folder for checkpoints, and in the end for the adapter, its card and its plot.
    data : list of dict
        Sources, see ``data.SOURCES``: ``path`` (JSONL, parquet or a datasets id) or ``generated``.
    routers : dict
        ``pattern, sink, window, last_n, pool_size`` of ``FluxConfig``.
    start : str, optional
        Adapter whose routers training goes on from, a directory or Hub id (``shipped`` for the one that comes along);
        it says all that ``routers`` would. Multipliers start as ``objective`` says. Of a calibrated adapter, which has
        no routers, fresh ones start from its ranking of layers; by head, where ``routers`` has that ``granularity``.
    decide : {"prefill", "ends"}, optional
        When routers read a prompt, see ``FluxConfig``; default: as ``start`` says, else "prefill".
    budget : bool
        Train one adapter for every budget: each sample's target is drawn anew and told to the routers, in place of the
        targets of task classes.
    targets : dict
        Target Ω_MSR of each task class.
    max_length : int
        Tokens of a sequence at most.
    pack_length : int, optional
        Tokens of a pack of sequences at most; default ``max_length``.
    batch_size : int
        Packs in a step, over all processes.
    dtype : {"bfloat16", "float32", "auto"}
        Of the frozen model; ``auto`` is the checkpoint's own, but float32 on a CPU without fast bfloat16. Routers are
        float32 always.
    config : dict
        Changes to the model's configuration, such as ``rope_parameters`` for sequences beyond its own length.
    gradient_checkpointing : bool
        Compute layers again in the backward pass instead of keeping their activations.
    shape : str, optional
        A key of ``sizes.SHAPES``: sizes for a dry run where the model's configuration is not at hand.
    objective : Objective
        Knobs of the objective.
    training : dict
        Any argument of transformers' ``TrainingArguments`` that has no key above.
    """

    model: NonemptyText
    output: NonemptyText
    data: _Sources
    routers: _Keys = field(default_factory=dict)
    start: _Adapter | None = None
    decide: Annotated[Literal["prefill", "ends"] | None, expected("prefill or ends")] = None
    budget: Annotated[bool, Strict(), expected("true or false")] = False
    targets: Annotated[dict[str, _Ratio], _PLAIN, expected("keys and values")] = field(
        default_factory=lambda: dict(TARGETS)
    )
    max_length: Positive = 65_536
    pack_length: Positive | None = None
    batch_size: Positive = 48
    # In float16 the routers' gradients vanish.
    dtype: Annotated[Literal["bfloat16", "float32", "auto"], expected("bfloat16, float32 or auto")] = "bfloat16"
    config: _Keys = field(default_factory=dict)
    gradient_checkpointing: Annotated[bool, Strict(), expected("true or false")] = True
    shape: Text | None = None
    objective: Annotated[Objective, from_keys(Objective), expected("keys and values")] = field(
        default_factory=Objective
    )
    training: _Keys = field(default_factory=dict)

    def __post_init__(self):
        if self.start is not None and set(self.routers) - {"granularity"}:
            raise RecipeError(f"routers and start are both there: the adapter {self.start} says what `routers` would")
        if taken := sorted({"decide", "budget", "ranking", "base_model"} & set(self.routers)):
            raise RecipeError(
                f"routers: {taken} cannot be set there; `decide`, `budget` and `start` are keys of a recipe"
            )
        if self.pack_length is None:
            self.pack_length = self.max_length
        if self.pack_length < self.max_length:
            raise RecipeError(f"pack_length is {self.pack_length!r}, expected at least max_length ({self.max_length})")
        args = self.training_arguments
        for name in ("save_steps", "logging_steps", "max_steps"):
            if not isinstance(args[name], int) or args[name] < 1:
                raise RecipeError(f"training.{name} is {args[name]!r}, expected a whole number, at least 1")
        if args["save_steps"] % args["logging_steps"]:
            raise RecipeError(
                f"training.save_steps is {args['save_steps']}, expected a multiple of logging_steps "
                f"({args['logging_steps']})"
            )
        for name in sorted(set(self.training) & set(TAKEN)):
            raise RecipeError(f"training.{name} cannot be set; the recipe's key for it is {TAKEN[name]}")
        try:
            self.flux_config = FluxConfig(
                **self.routers, decide=self.decide or "prefill", budget=MEAN_BUDGET if self.budget else None
            )
            check_trains(self.flux_config)
        except FluxConfigError as error:
            raise RecipeError(f"routers: {error}") from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """
        Make the recipe that ``to_dict`` described, or that a YAML file holds.

        Raises
        ------
        RecipeError
            For unknown keys (by name), missing ones, and values that cannot be.
        """
        if not isinstance(values, dict):
            raise RecipeError(f"the recipe is {type(values).__name__}, expected keys and values")
        return cls(**text_keys(values))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """
        Read a recipe.

        Raises
        ------
        RecipeError
            If the file is not YAML or not a recipe; the message names the file.
        FileNotFoundError
            If there is no such file.
        """
        try:
            return cls.from_dict(yaml.load(Path(path).read_text(encoding="utf-8"), _Loader))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of plain values; ``from_dict`` of it is equal to this recipe."""
        return asdict(self)

    def to_yaml(self, path: str | Path) -> None:
        """Write the recipe, all defaults written out."""
        with replacing(path) as file:
            file.write_text(yaml.safe_dump(self.resolved, sort_keys=False, allow_unicode=True), encoding="utf-8")

    @property
    def resolved(self) -> dict[str, Any]:
        """The recipe as ``to_dict`` gives it, with the defaults within ``routers`` and ``training`` written out."""
        routers = {name: getattr(self.flux_config, name) for name in ROUTER_KEYS}
        routers = routers if self.start is None else self.routers
        return {**self.to_dict(), "routers": routers, "training": self.training_arguments}

    @property
    def training_arguments(self) -> dict[str, Any]:
        """The defaults of ``training`` under what the recipe sets."""
        return {**TRAINING, **self.training}
