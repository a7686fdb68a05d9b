"""The handle of attached routers: forcing, soft decisions, what was decided, saving, detaching.

Shape suffixes: B batch, L routed layers, U units.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from flux_attention import notebook
from flux_attention.adapters import AdapterMixin
from flux_attention.config import FluxConfig
from flux_attention.decision import (
    Decision,
    Forced,
    Routed,
    RoutedBeforehand,
    Soft,
    SoftBeforehand,
    Static,
    Unit,
)
from flux_attention.errors import UnsupportedModelError
from flux_attention.hf.cache.layer import RoutedLayer
from flux_attention.hf.context import NAME, ForwardContext, enclosing, generated_prompt
from flux_attention.hf.ends import EndsReader
from flux_attention.hf.forward import Finished, ForwardPass
from flux_attention.hf.generation.step import CapturedSteps, unsupported
from flux_attention.hf.heads import HeadForwardPass
from flux_attention.hf.inputs import InputReader, Inputs
from flux_attention.hf.report import ReportMixin
from flux_attention.hf.support import QueryShape, tensor_parallel_group
from flux_attention.hf.watching import watched
from flux_attention.patterns import full_pattern, sparse_pattern
from flux_attention.router import LayerRouter, Pooling
from flux_attention.routes import Routes, RouteSpec, layer_of, parse_routes


@dataclass(frozen=True)
class Settings:
    """
    What ``with`` blocks of this thread ask of a model's decisions.

    Attributes
    ----------
    forced : what ``Routing.force`` takes, or None
        Routes in force.
    temperature : float, torch.Tensor or None
        Of soft decisions; None outside of ``Routing.soft``.
    noise : torch.Tensor or None
        Their Gumbel noise; None draws it.
    budgets : torch.Tensor or None
        The Ω_MSR that each sequence's routers are told.
    """

    forced: RouteSpec | None = None
    temperature: float | torch.Tensor | None = None
    noise: torch.Tensor | None = None
    budgets: torch.Tensor | None = None


#: What the ``with`` blocks that are open say: (the block, the handle's id, its changes), outermost first. A context
#: variable, so that a request's ``force`` is no other one's: threads and tasks.
_settings: ContextVar[tuple[tuple[object, int, dict[str, Any]], ...]] = ContextVar("flux_settings", default=())


class Routing(ReportMixin, AdapterMixin):
    """
    Routers attached to a model; made by ``attach``.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        The model that they are attached to.
    config : FluxConfig
        Patterns, sizes, and the base model's fingerprint.
    routers : torch.nn.ModuleDict
        One ``LayerRouter`` a routed layer, by the layer's index. Not part of the model: ``model.state_dict()``
        and ``model.parameters()`` are the stock ones.
    layers : tuple of int
        The routed layers' indices.
    units : tuple
        What is decided on, in the order of routes and gates: the routed layers, or (layer, head) of their KV heads.
    sparse, full : Pattern
        What sparse and full layers compute.
    cuda_graphs : bool
        Whether ``generate`` may decode by captured steps; may be set at any time.
    min_tokens : int
        Shorter prompts run full; may be set at any time.
    steps : CapturedSteps
        Captured decode steps.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: nn.Module,
        attentions: dict[int, nn.Module],
        config: FluxConfig,
        routers: nn.ModuleDict,
        keep_full_kv: bool,
        cuda_graphs: bool,
        compile: bool,
        min_tokens: int,
    ):
        self.model, self.config, self.routers, self.keep_full_kv = model, config, routers, keep_full_kv
        self.cuda_graphs, self.compile, self.min_tokens = cuda_graphs, compile, min_tokens
        self.layers = config.base_model.routed_layers
        self.sparse, self.full = sparse_pattern(config), full_pattern(config)
        self.by_head = config.granularity == "head"
        heads = range(config.base_model.num_kv_heads)
        self.units: tuple[Unit, ...] = (
            tuple((layer, head) for layer in self.layers for head in heads) if self.by_head else self.layers
        )
        self.steps = CapturedSteps()
        self.own_hooks: set[Any] = set()  # functions of ours that are hooks of modules
        self._shapes = {index: QueryShape.of(decoder.config, attention) for index, attention in attentions.items()}
        self._group = tensor_parallel_group(decoder)
        self._decoder = decoder
        # Where heads are routed the cache is dense.
        self._reader = InputReader(decoder, self.layers, self.sparse.later, keep_full_kv or self.by_head)
        self._pass_type = HeadForwardPass if self.by_head else ForwardPass
        self._ends = EndsReader(
            decoder,
            self.units,
            {} if config.ranking is not None else {unit: self.router(unit) for unit in self.units},
            lambda inputs, reading: self._pass_type(inputs, reading, self.units, self._shapes, self.full, self.full),
            self._pooling,
            config.end_tokens,
        )
        # By thread, where ``force`` is by task, too: a task reads what its own call published before any other runs.
        self._published = threading.local()
        self._latest: Finished | None = None
        self.is_attached = True
        #: Undoes what ``attach`` did, latest first.
        self.undo = ExitStack()

    @property
    def is_tensor_parallel(self) -> bool:
        """Whether several processes share the model's heads."""
        return self._group is not None

    @property
    def min_tokens(self) -> int:
        """Shorter prompts run full, without routers."""
        return self._min_tokens

    @min_tokens.setter
    def min_tokens(self, value: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"min_tokens is {value!r}, expected a number of tokens, 0 or more")
        self._min_tokens = value

    @property
    def budget(self) -> float | None:
        """The share of layers that run sparse, where the adapter has one; may be set at any time, for all threads."""
        return self.config.budget

    @budget.setter
    def budget(self, value: float) -> None:
        self.config = self.config.with_budget(value)

    @property
    def _last(self) -> Finished | None:
        return getattr(self._published, "finished", self._latest)

    @property
    def routes(self) -> Routes | None:
        """What the last prefill of this thread decided; of any thread, where this one ran none."""
        return None if self._last is None else self._last.routes

    @property
    def gates(self) -> torch.Tensor | None:
        """In training (``soft``): float32 (B, U) on the CPU, this thread's last straight-through decisions."""
        return None if self._last is None else self._last.gates_BU

    def router(self, unit: Unit) -> LayerRouter:
        """Return the router that decides on ``unit``."""
        return cast(LayerRouter, self.routers[str(layer_of(unit))])

    def __repr__(self) -> str:
        return f"Routing({len(self.layers)} layers of {self.config.base_model.name}, {self.sparse})"

    def _repr_html_(self) -> str:
        """Draw for notebooks what the last prefill of this thread decided, and what the last generation saved."""
        report, routes = self._last_report, self.routes
        parts = [notebook.line(f"{self!r}{'' if self.is_attached else ', detached: the model is the stock one'}")]
        if routes is None:
            return notebook.frame(*parts, notebook.line("no prompt was routed yet"))
        if report is None:
            said = "nothing was generated yet, so there is no report of what was saved"
            return notebook.frame(*parts, routes.html(), notebook.line(said), notebook.legend())
        return notebook.frame(*parts, notebook.line("the last generation:"), report.html(), notebook.legend())

    # What to decide.

    @property
    def settings(self) -> Settings:
        """What the ``with`` blocks of this thread, or task, ask for."""
        mine = [changes for _, handle, changes in _settings.get() if handle == id(self)]
        return replace(Settings(), **dict(itertools.chain.from_iterable(changes.items() for changes in mine)))

    @contextlib.contextmanager
    def _set(self, **changes: Any) -> Iterator[Routing]:
        block = object()
        _settings.set((*_settings.get(), (block, id(self), changes)))
        try:
            yield self
        finally:  # blocks of generators may end in another order than they began
            _settings.set(tuple(entry for entry in _settings.get() if entry[0] is not block))

    def _check_attached(self, what: str) -> None:
        if not self.is_attached:
            raise RuntimeError(
                f"cannot {what} after detach(): the model is the stock one and has no routes; attach(model, ...) again "
                "and use the handle that it returns"
            )

    def force(self, routes: RouteSpec | None) -> AbstractContextManager[Routing]:
        """
        Force the routes of prefills of this thread within a ``with`` block; the routers are not run.

        Parameters
        ----------
        routes : str, float, sequence of int, torch.Tensor, or None
            ``"full"``, ``"sparse"``, a ratio Ω_MSR, the indices of the full layers, or (L,) or (B, L) bits; None lets
            the routers decide, also within another ``force``.

        Raises
        ------
        ValueError
            For anything else.
        RuntimeError
            After ``detach``.
        """
        self._check_attached("force routes")
        if routes is not None and not isinstance(routes, torch.Tensor):
            parse_routes(routes, 1, self.units)  # a wrong request fails here, not in the next forward
        return self._set(forced=routes)

    def soft(
        self,
        temperature: float | torch.Tensor,
        noise: torch.Tensor | None = None,
        budgets: torch.Tensor | None = None,
    ) -> AbstractContextManager[Routing]:
        """
        Decide by straight-through Gumbel-Softmax within a ``with`` block: for training, without a KV cache.

        Both branches run and gradients flow to the routers. Pass ``prompt_lengths`` (B real tokens each) to the
        model's forward where the sequences hold answers, which routers must not read.

        Parameters
        ----------
        temperature : float or torch.Tensor
            τ of the Gumbel-Softmax.
        noise : torch.Tensor, optional
            float32 (B, U, 2), the Gumbel noise, for decisions that can be repeated; drawn where it is not given.
        budgets : torch.Tensor, optional
            float32 (B,), the Ω_MSR that routers are told, for those that take one; default: ``budget``.

        Raises
        ------
        UnsupportedModelError
            Under tensor parallelism.
        ValueError
            For a fixed set, which has no routers.
        RuntimeError
            After ``detach``.
        """
        self._check_attached("decide softly")
        if self.config.ranking is not None:
            raise ValueError(
                "this adapter is a fixed set of layers and has no routers to train; a recipe's `start` makes some of it"
            )
        if self._group is not None:
            raise UnsupportedModelError("routers cannot be trained under tensor parallelism: use DDP or FSDP2")
        return self._set(temperature=temperature, noise=noise, budgets=budgets)

    def reroute(self, cache: DynamicCache) -> None:
        """
        Let the next call with ``cache`` decide routes anew, from that call's tokens.

        Raises
        ------
        ValueError
            Unless attached with ``keep_full_kv=True``: sparse layers have dropped what a full one would need.
        """
        layers = [layer for layer in cache.layers if isinstance(layer, RoutedLayer)]
        if not layers:
            raise ValueError("this cache has no routed layers: it was not filled by a model with routers attached")
        for layer in layers:
            layer.reroute()

    def needs_whole_prompt(self, lengths: list[int], again: bool = False) -> str | None:
        """
        Say why prompts of these lengths have to come in one call, and what to do; None if they need not.

        ``again``: they go on with a cache that decides anew.
        """
        forced = self.settings.forced
        if forced is None and all(length < self.min_tokens for length in lengths):
            return None
        by_routers = forced is None and self.config.ranking is None
        if again and forced is None and not by_routers and self.min_tokens:
            return "what it goes on with counts for min_tokens; set min_tokens to 0"
        if by_routers and again:
            return "routers read both ends of what re-routes; force routes (generate(..., routes=...))"
        if by_routers and self.config.decide == "prefill":
            return (
                "routers read both of its ends; attach with decide='ends', or force routes (generate(..., routes=...))"
            )
        spec = self.config.full_layers if forced is None and not by_routers else forced
        is_full = spec is not None and bool(parse_routes(spec, len(lengths), self.units).all())
        for pattern, advice in ((self.full, "full"), (self.sparse, "streaming without block_size")):
            if pattern.later != pattern and not (is_full and pattern is self.sparse):
                return f"within it {pattern} sees other keys than behind it; use {advice}, which counts exact tokens"
        return None

    # A forward call, from what ``attach`` puts around the decoder's forward.

    def begin(self, kwargs: dict[str, Any]) -> ForwardContext:
        """
        Check a forward call's arguments, put routed layers into its cache, and make its forward pass.

        Raises
        ------
        ValueError, UnsupportedModelError, RuntimeError
            For a call that cannot be routed.
        """
        began = time.perf_counter()
        implementation = self._decoder.config._attn_implementation
        if implementation != NAME:
            raise RuntimeError(
                f"the model's attention implementation was changed to {implementation!r} while routers were attached; "
                "detach first, and attach again after changing it"
            )
        settings = self.settings
        soft = settings.temperature is not None
        if soft and settings.forced is not None:
            raise ValueError("soft decisions within force: forced routes carry no gradients; leave one of the two")
        if soft and kwargs.get("past_key_values") is not None:
            raise ValueError("soft routing is for training and keeps no KV cache; pass use_cache=False")
        keeps_cache = not (soft or (self._decoder.training and self._checkpoints()))
        if self.compile and (kwargs.get("output_hidden_states") or self._decoder.config.output_hidden_states):
            raise UnsupportedModelError("compiled layers give no hidden states: attach without compile=True")
        # Routers wait for the device anyway, as telling padding does.
        by_routers = settings.forced is None and self.config.ranking is None
        has_last_rows = settings.forced is None and any(one.later != one for one in (self.sparse, self.full))
        inputs = self._reader.read(kwargs, keeps_cache, tells_padding=by_routers or has_last_rows)
        if generated := generated_prompt.get():
            generated.note(kwargs.get("past_key_values"), began, inputs.past, inputs.contexts)
        decision = watched(self._decision(inputs, settings)) if inputs.decides else None
        return self._pass_type(inputs, decision, self.units, self._shapes, self.sparse, self.full)

    def _decision(self, inputs: Inputs, settings: Settings) -> Decision:
        batch = len(inputs.layout.lengths)
        if not inputs.is_prompt and min(inputs.layout.lengths) == 0:
            raise ValueError("cannot re-route: a sequence of the batch has no new token to read")
        if settings.forced is not None:
            return Forced(self.units, parse_routes(settings.forced, batch, self.units))
        short = [length < self.min_tokens for length in inputs.contexts]
        if settings.temperature is None and (all(short) or self.config.ranking is not None):
            return Static(self.units, self.units if self.config.ranking is None else self.config.full_layers, short)
        budget = self.config.budget if settings.budgets is None else settings.budgets
        if self.config.decide == "ends":
            return self._by_ends(inputs, settings, short, budget)
        routers = {unit: self.router(unit) for unit in self.units}
        pooling = self._pooling(inputs.prompt_lengths, inputs.layout.columns)
        if settings.temperature is not None:
            return Soft(self.units, routers, pooling, settings.temperature, settings.noise, budget)
        return Routed(self.units, routers, pooling, short, budget)

    def _by_ends(
        self, inputs: Inputs, settings: Settings, short: list[bool], budget: float | torch.Tensor | None
    ) -> Decision:
        if enclosing.get() and not enclosing.get()[-1].text_only:
            raise UnsupportedModelError(
                "decide='ends' reads a prompt's first and last tokens alone, which is not for prompts with images, "
                "videos or sound; attach with decide='prefill'"
            )
        if settings.temperature is not None:
            logits_BU2 = self._ends.logits(self._ends.pooled(inputs.prompt), budget)
            return SoftBeforehand(self.units, logits_BU2, settings.temperature, settings.noise)
        by_graph = self.cuda_graphs and unsupported(self) is None
        return RoutedBeforehand(self.units, self._ends.read(inputs.prompt, by_graph, budget), short)

    def _pooling(self, lengths: list[int], columns: Callable[[torch.Tensor], torch.Tensor]) -> Pooling:
        return Pooling(lengths, self.config.pool_size, columns, self.config.base_model.num_heads, self._group)

    def _checkpoints(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self._decoder.modules())

    def publish(self, finished: Finished) -> None:
        """Make what a forward pass decided this thread's, and the latest."""
        self._published.finished = self._latest = finished

    # Attaching and detaching.

    def release(self) -> None:
        """Let go of what belongs to the attached model."""
        self.is_attached = False
        self.steps.clear()
        self._ends.clear()
        self._published = threading.local()
        if self._latest is not None:  # gates hold the graph that they came from
            self._latest = Finished(self._latest.routes, None)

    def detach(self) -> None:
        """
        Restore the stock model exactly; caches filled while attached cannot be read afterwards.

        Whatever was put around or in place of the model's modules meanwhile stays.
        """
        self.undo.close()

    def __reduce__(self):
        raise RuntimeError(
            "a model with routers attached cannot be copied or pickled: detach first, save routers as an adapter, and "
            "attach to each copy"
        )
