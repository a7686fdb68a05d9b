"""Describes what evaluations share: the model and its adapters, and choices of full layers known beforehand."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flux_attention.adapters import CONFIG_FILE, WEIGHTS_FILE, load_config
from flux_attention.config import FluxConfig
from flux_attention.evaluation.methods import check_adapters, count_kinds, routed_method
from flux_attention.hf.handle import Routing
from flux_attention.patterns import Full
from flux_attention.progress import Progress, silent
from flux_attention.routes import RouteSpec, parse_routes, read_spec


@dataclass(frozen=True)
class Choice:
    """Describes full layers that are known beforehand: the method, the routes, and what the rows say besides."""

    method: str
    routes: RouteSpec
    facts: dict[str, Any] = field(default_factory=dict)


class AdapterEvaluation(ABC):
    """
    Describes an evaluation of one model with some adapters and methods, which ``run`` runs once it has ``rows``.

    Parameters
    ----------
    model, tokenizer
        The base model, without routers attached.
    adapters : sequence of str
        Adapters for it: directories or Hub ids. The first one's patterns are those of ``sparse`` and
        ``forced``; ``dense`` is exact full attention.
    methods : sequence of str
        Of ``METHODS``; those that nothing here can give are passed over.
    samples, batch_size : int
        Of each kind, at most; a forward.
    config : FluxConfig, optional
        The pattern, where there are no adapters.
    budgets : sequence of float, optional
        Shares of sparse layers for adapters with a ranking; default: each one's own. Where no adapter has routers,
        they are for ``static``, ``best-static`` and ``random`` too.
    force : sequence of str
        Routes to force, as ``routes.read_spec`` reads them.

    Raises
    ------
    ValueError
        Without an adapter or a pattern; for routes that cannot be read.
    """

    def __init__(
        self,
        model,
        tokenizer,
        adapters: Sequence[str],
        methods: Sequence[str],
        samples: int,
        batch_size: int,
        config: FluxConfig | None = None,
        budgets: Sequence[float] | None = None,
        force: Sequence[str] = (),
    ):
        check_adapters(adapters, config)
        self.model, self.tokenizer, self.adapters, self.methods = model, tokenizer, list(adapters), list(methods)
        self.samples, self.batch_size, self.config, self.budgets = samples, batch_size, config, budgets
        self.force = {text: read_spec(text) for text in force}

    @property
    def settings(self) -> dict[str, Any]:
        """Facts that the rows depend on: results of other settings are not mixed with them."""
        facts = {
            "model": getattr(self.model.config, "_name_or_path", ""),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(self.model.device)
            if self.model.device.type == "cuda"
            else self.model.device.type,
            "adapters": [[adapter, adapter_hash(adapter)] for adapter in self.adapters],
            "samples": self.samples,
        }
        return facts if self.adapters else {**facts, "sparse": self.config.sparse, "full": self.config.full}

    @abstractmethod
    def rows(self, done: Sequence[dict[str, Any]] = (), progress: Progress = silent) -> Iterator[dict]:
        """Yield result rows as they are measured; see ``quality.Evaluation.rows``."""

    @property
    def model_name(self) -> str:
        """The model's name in rows: the last part of its path or Hub id, in small letters."""
        return Path(getattr(self.model.config, "_name_or_path", "")).name.lower()

    @property
    def subjects(self) -> list[tuple[str | None, str | FluxConfig | None]]:
        """What is attached, one after the other, with its name in rows."""
        named: list[tuple[str | None, str | FluxConfig | None]] = [(adapter, adapter) for adapter in self.adapters]
        return named or [(None, self.config)]

    @cached_property
    def deciding(self) -> dict[str, str | None]:
        """What ``routed_method`` says of each adapter."""
        return {adapter: routed_method(load_config(adapter)[1]) for adapter in self.adapters}

    @property
    def kinds(self) -> int:
        """How many rows each family (or task) and length has."""
        configs = [load_config(adapter)[1] for adapter in self.adapters]
        return count_kinds(self.methods, configs, self.budgets, list(self.force))

    def beforehand(self, routing: Routing, first: bool) -> list[Choice]:
        """
        List the choices of full layers that need no look at any sample.

        Parameters
        ----------
        routing : Routing
            The attached adapter's handle.
        first : bool
            Whether it is the first adapter, whose pattern all share where no adapter is named.

        Raises
        ------
        ValueError
            For routes that name other layers than the model's routed ones.
        """
        found = []
        if first:
            found += [Choice("dense", "full"), Choice("sparse", "sparse")]
            for text, spec in self.force.items():
                full = parse_routes(spec, 1, routing.units)[0].tolist()
                units = [unit for unit, is_full in zip(routing.units, full, strict=True) if is_full]
                found.append(Choice("forced", torch.tensor(full), {"force": text, "full_layers": units}))
        if routing.config.ranking is not None:
            for budget in self.budgets or [routing.config.budget]:
                layers = list(replace(routing.config, budget=budget).full_layers)
                facts = {"budget": budget, "full_layers": layers}
                found.append(Choice("static-nll", layers or "sparse", facts))
        return [choice for choice in found if choice.method in self.methods]


@contextmanager
def exact_dense(routing: Routing, method: str) -> Iterator[None]:
    """Let full layers compute exact attention where the method is dense, whatever the adapter has them compute."""
    pattern = routing.full
    if method == "dense":
        routing.full = Full()
    try:
        yield
    finally:
        routing.full = pattern


def adapter_hash(adapter: str) -> str | None:
    """Hash a local adapter's weights, where it has any, and configuration (SHA-256)."""
    config, weights = (Path(adapter) / name for name in (CONFIG_FILE, WEIGHTS_FILE))
    if not config.exists():
        return None
    return hashlib.sha256(b"".join(file.read_bytes() for file in (config, weights) if file.exists())).hexdigest()
