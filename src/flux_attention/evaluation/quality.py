"""Measures a model's answers under every way of choosing its full layers, on the generated families.

Methods (all see the same samples):

================= ===========================================================================================
dense             every layer full
sparse            every layer sparse
routed            what the layer routers decide
static            one set of full layers for every input, chosen greedily by loss on calibration samples
best-static       the same, but of all sets the one that answers most calibration samples: for models of few layers
best-static-fewer the same, of one layer fewer
random            a random set for every input
head              what routers of granularity ``head`` decide, for each KV head
head-static       one set of full heads for every input: those that such routers like best on calibration samples
================= ===========================================================================================

``static``, ``best-static`` and ``random`` have as many full layers as ``routed`` has on average over all families,
rounded up, and ``head-static`` as many heads as ``head``. So the Ω_MSR of ``routed`` lies between those of
``best-static`` and of ``best-static-fewer``, unless it is one.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from flux_attention.calibration.calibrator import greedy_order
from flux_attention.evaluation.methods import DEFAULT_METHODS, EXHAUSTIVE, METHODS, check_adapters, check_lengths
from flux_attention.hf.attach import attach
from flux_attention.hf.support import check_head, max_positions
from flux_attention.results import begun_rows, write_results
from flux_attention.routes import unit_name
from flux_attention.tasks.families import EVERY_FAMILY
from flux_attention.tasks.samples import Haystack, Sample, make_sample
from flux_attention.tasks.scoring import Scores, evaluate
from flux_attention.validation import check_known

#: Calibration samples start from this seed, the report's from 0.
CALIBRATION_SEED = 10_000_000


def best_layers(
    value: Callable[[list[int], bool], tuple[float, ...]],
    layers: Sequence[int],
    count: int,
    tell: Callable[[str], None] = lambda _: None,
) -> list[int]:
    """
    Find the ``count`` layers of highest value to run full, of all such sets.

    Parameters
    ----------
    value : callable
        Of a list of full layers; and whether to judge it on few samples, as all sets are at first, or on all of them,
        as the best ten are then.
    tell : callable
        Told how far the search is.
    """
    few = []
    for number, chosen in enumerate(itertools.combinations(layers, count), 1):
        tell(f"best static layers: set {number:,} of {math.comb(len(layers), count):,}")
        few.append((value(list(chosen), True), list(chosen)))
    few.sort(key=lambda pair: pair[0], reverse=True)
    return max((chosen for _, chosen in few[:10]), key=lambda chosen: value(chosen, False))


def liked_routes(routing, samples: Sequence[Sample], count: int) -> torch.Tensor:
    """Return bool (U,): the ``count`` layers or heads whose routers give full attention most probability on average."""
    liked = torch.zeros(len(routing.units))
    for sample in samples:
        evaluate(routing.model, [sample], routing)
        liked += routing.routes.logits_BL2[0].softmax(-1)[:, 1]
    return torch.zeros(len(liked), dtype=torch.bool).scatter(0, liked.topk(count).indices, True)


def random_routes(samples: Sequence[Sample], layers: int, count: int, seed: int = 0) -> torch.Tensor:
    """Return bool (N, L): ``count`` full layers, drawn anew for each sample."""
    routes = torch.zeros(len(samples), layers, dtype=torch.bool)
    for row in range(len(samples)):
        routes[row, random.Random(f"{seed}-{samples[row].family}-{row}").sample(range(layers), count)] = True
    return routes


class AdapterEvaluation:
    """
    Describes an evaluation of one model with several adapters and methods, which ``run`` runs once it has ``rows``.

    Parameters
    ----------
    model, tokenizer
        The base model, without routers attached.
    adapters : sequence of str
        Router adapters for it: directories or Hub ids. The first one's pattern is that of ``dense`` and ``sparse``.
    methods : sequence of str
        Of ``METHODS``.
    samples, batch_size : int
        Of each kind, at most; a forward.

    Raises
    ------
    ValueError
        Without an adapter.
    """

    def __init__(
        self, model, tokenizer, adapters: Sequence[str], methods: Sequence[str], samples: int, batch_size: int
    ):
        check_adapters(adapters)
        self.model, self.tokenizer, self.adapters, self.methods = model, tokenizer, list(adapters), list(methods)
        self.samples, self.batch_size = samples, batch_size

    @property
    def settings(self) -> dict[str, Any]:
        """Facts that the rows depend on: results of other settings are not mixed with them."""
        return {
            "model": getattr(self.model.config, "_name_or_path", ""),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(self.model.device)
            if self.model.device.type == "cuda"
            else self.model.device.type,
            "adapters": [[adapter, adapter_hash(adapter)] for adapter in self.adapters],
            "samples": self.samples,
        }


class Evaluation(AdapterEvaluation):
    """
    Measures all methods on generated questions.

    Parameters
    ----------
    model, tokenizer, adapters
        As in ``AdapterEvaluation``.
    haystack : Haystack
        The text that questions are hidden in.
    families, lengths, methods : sequence
        Of ``EVERY_FAMILY``; tokens of a sample; of ``METHODS``.
    samples, calibration : int
        Of each family and length: in the report, and for choosing static layers.
    batch_size : int
        Samples a forward.

    Raises
    ------
    ValueError
        For unknown families or methods, no adapter, or samples that are longer than the model's positions.
    """

    def __init__(
        self,
        model,
        tokenizer,
        adapters: Sequence[str],
        haystack: Haystack,
        families: Sequence[str],
        lengths: Sequence[int],
        methods: Sequence[str] = DEFAULT_METHODS,
        samples: int = 100,
        calibration: int = 8,
        batch_size: int = 1,
    ):
        check_known("families", families, EVERY_FAMILY)
        check_known("methods", methods, METHODS)
        check_lengths(lengths, max_positions(model.config))
        super().__init__(model, tokenizer, adapters, methods, samples, batch_size)
        self.haystack, self.families, self.lengths = haystack, list(families), list(lengths)
        self.calibration = calibration

    @property
    def settings(self) -> dict[str, Any]:
        """See ``AdapterEvaluation.settings``."""
        return {
            **super().settings,
            "calibration": self.calibration,
            "text": hashlib.sha256(self.haystack.tokens.tobytes()).hexdigest(),
            "families": self.families,
            "lengths": self.lengths,
        }

    def make(self, family: str, length: int, count: int, seed: int = 0) -> list[Sample]:
        """Make samples of a family, on held-out names and values."""
        return [
            make_sample(family, self.haystack, self.tokenizer, length, seed + index, held_out=True)
            for index in range(count)
        ]

    def rows(self, done: Sequence[dict[str, Any]] = (), tell: Callable[[str], None] = lambda _: None) -> Iterator[dict]:
        """
        Yield result rows as they are measured.

        Parameters
        ----------
        done : sequence of dict
            Rows of an earlier call with the same settings: not measured again.
        tell : callable
            Told what is being done.
        """
        have = {row_key(row): row for row in done}
        for place, adapter in enumerate(self.adapters):
            routing = attach(self.model, adapter)
            try:
                check_head(routing)
                for length in self.lengths:
                    yield from self._of_length(routing, adapter, place == 0, length, have, tell)
            finally:
                routing.detach()

    def _of_length(self, routing, adapter, first, length, have, tell) -> Iterator[dict]:
        counts = []

        def row(family: str, method: str, routes, **more) -> dict[str, Any]:
            shared = method in ("dense", "sparse")
            facts = dict(task=family, method=method, seq_len=length, routers=None if shared else adapter)
            if row_key(facts) in have:
                return have[row_key(facts)]
            tell(f"{length} tokens, {family}: {method}")
            samples = self.make(family, length, self.samples)
            routes = routes(samples) if callable(routes) else routes
            scores = evaluate(self.model, samples, routing, self.batch_size, routes)
            rates = torch.tensor(scores.full, dtype=torch.float32).mean(0).tolist()
            return {
                **facts,
                "n": len(samples),
                "sparsity": round(scores.msr, 4),
                **_measures(family, scores),
                "fa_rate": {unit_name(unit): round(rate, 4) for unit, rate in zip(routing.units, rates, strict=True)},
                **more,
            }

        for method, spec in (("dense", "full"), ("sparse", "sparse")):
            if method in self.methods and first:
                for family in self.families:
                    yield row(family, method, spec)
        by_head = routing.config.granularity == "head"
        named = ("head", "head-static") if by_head else ("routed", "static", *EXHAUSTIVE, "random")
        if not set(named) & set(self.methods):
            return
        for family in self.families:
            found = row(family, named[0], None)
            counts.append(sum(found["fa_rate"].values()))
            yield found
        count = min(len(routing.units), math.ceil(fmean(counts) - 1e-6))
        if by_head:
            if "head-static" in self.methods:

                @cache
                def liked() -> torch.Tensor:  # asked for only if a row is not there yet
                    return self.static_heads(routing, length, count, tell)

                for family in self.families:
                    yield row(family, "head-static", lambda samples: liked())
            return
        for method, choose, many in (
            ("static", self.static_layers, count),
            ("best-static", self._best, count),
            ("best-static-fewer", self._best, max(0, count - 1)),
        ):
            if method not in self.methods:
                continue
            keys = [row_key(dict(task=task, method=method, seq_len=length, routers=adapter)) for task in self.families]
            known = next((have[key]["full_layers"] for key in keys if key in have), None)
            chosen = choose(routing, length, many, tell) if known is None else known
            for family in self.families:
                yield row(family, method, chosen or "sparse", full_layers=chosen)
        if "random" in self.methods:
            for family in self.families:
                yield row(family, "random", lambda samples: random_routes(samples, len(routing.layers), count))

    def _calibration(self, length: int) -> list[list[Sample]]:
        return [self.make(family, length, self.calibration, CALIBRATION_SEED) for family in self.families]

    def static_layers(self, routing, length: int, count: int, tell: Callable[[str], None]) -> list[int]:
        """Choose ``count`` full layers for every input, greedily by loss on calibration samples."""
        calibration = self._calibration(length)

        def loss(chosen: list[int]) -> float:
            tell(f"static layers: {len(chosen)} of {count}")
            return fmean(
                fmean(evaluate(self.model, samples, routing, self.batch_size, chosen).nats) for samples in calibration
            )

        return sorted(greedy_order(loss, routing.layers, count))

    def static_heads(self, routing, length: int, count: int, tell: Callable[[str], None]) -> torch.Tensor:
        """Choose ``count`` full heads for every input, which routers like best on calibration samples: bool (U,)."""
        tell(f"{length} tokens: static heads")
        return liked_routes(routing, [sample for samples in self._calibration(length) for sample in samples], count)

    def _best(self, routing, length, count, tell) -> list[int]:
        calibration = self._calibration(length)

        def value(chosen: list[int], few: bool) -> tuple[float, float]:
            """Return the mean accuracy of the questions; where that is equal, the lower loss wins."""
            first = max(1, self.calibration // 4) if few else self.calibration
            right, nats = [], []
            for family, samples in zip(self.families, calibration, strict=True):
                scores = evaluate(self.model, samples[:first], routing, self.batch_size, chosen or "sparse")
                nats.append(fmean(scores.nats))
                if family != "plain":
                    right.append(scores.accuracy)
            return fmean(right) if right else 0.0, -fmean(nats)

        return best_layers(value, routing.layers, count, tell)


def _measures(family: str, scores: Scores) -> dict[str, Any]:
    """Return the measure with its interval, and what it is the mean of: right or wrong, or nats a token, by sample."""
    if family == "plain":
        (low, high), name, value = scores.perplexity_interval, "perplexity", scores.perplexity
        each = [round(nats, 4) for nats in scores.nats]
    else:
        (low, high), name, value = scores.accuracy_interval, "accuracy", scores.accuracy
        each = list(map(int, scores.right))
    return {name: round(value, 4), "low": round(max(0.0, low), 4), "high": round(high, 4), "scores": each}


def row_key(row: dict[str, Any]) -> tuple:
    """Return what tells the rows of one result file apart."""
    return row["task"], row["method"], row["seq_len"], row["routers"]


def adapter_hash(adapter: str) -> str | None:
    """Hash a local adapter's weights and configuration (SHA-256)."""
    files = [Path(adapter) / name for name in ("flux_config.json", "routers.safetensors")]
    if not all(file.exists() for file in files):
        return None
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def run(
    evaluation: AdapterEvaluation, folder: Path, restart: bool, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """
    Measure all rows into ``folder``/quality.json, each written as it is there, and go on where a run stopped.

    Raises
    ------
    ValueError
        If the folder holds results of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, settings = folder / "quality.json", evaluation.settings
    done = [] if restart else begun_rows(path, settings)
    rows: list[dict[str, Any]] = []
    for row in evaluation.rows(done, tell):
        rows.append(row)
        written = set(map(row_key, rows))
        later = [old for old in done if row_key(old) not in written]
        if row not in done:
            write_results(path, rows + later, settings=settings)
    return rows
