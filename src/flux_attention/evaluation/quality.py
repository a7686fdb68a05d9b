"""Measures a model's answers under every way of choosing its full layers, on generated questions or on records.

Questions in words are scored by what ``generate`` answers, those of ``tasks.families`` by whether every token of the
answer is the most likely one, prose and plain text by perplexity.

All methods see the same samples; ``methods.ABOUT`` says what each has full.

``static``, ``best-static`` and ``random`` have as many full layers as ``routed`` has on average over all families,
rounded up, and ``head-static`` as many heads as ``head``. So the Ω_MSR of ``routed`` lies between those of
``best-static`` and of ``best-static-fewer``, unless it is one. Where no adapter has routers, they have as many as each
budget leaves.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from flux_attention.config import FluxConfig
from flux_attention.evaluation.base import AdapterEvaluation, exact_dense
from flux_attention.evaluation.material import CALIBRATION_SEED, Material, Records
from flux_attention.evaluation.measures import answer_measures, token_measures
from flux_attention.evaluation.methods import DEFAULT_METHODS, METHODS, SIZED, check_lengths
from flux_attention.evaluation.progress import Progress, Tally, silent
from flux_attention.evaluation.savings import mean_esr, mean_kv
from flux_attention.evaluation.selection import best_layers, greedy_order, liked_routes, random_routes
from flux_attention.hf.attach import attach
from flux_attention.hf.handle import Routing
from flux_attention.hf.support import check_head, max_positions
from flux_attention.results import begun_rows, write_results
from flux_attention.routes import unit_name
from flux_attention.tasks.generation import score_answers
from flux_attention.tasks.questions import NATURAL, PROSE, Question
from flux_attention.tasks.samples import Haystack, Sample
from flux_attention.tasks.scoring import evaluate
from flux_attention.validation import check_known


class Evaluation(AdapterEvaluation):
    """
    Measures all methods on generated questions, or on a user's own.

    Parameters
    ----------
    model, tokenizer, adapters, config, budgets, force
        As in ``AdapterEvaluation``.
    haystack : Haystack or None
        The text that questions of ``tasks.families`` are hidden in; None where none are asked.
    families, lengths, methods : sequence
        Of ``tasks.families.EVERY_FAMILY`` and ``tasks.questions.NATURAL``; tokens of a sample; of ``METHODS``.
    samples, calibration : int
        Of each family and length: in the report, and for choosing static layers.
    batch_size : int
        Samples a forward, and prompts a call of ``generate``.
    chat : bool, optional
        Whether questions in words go through the chat template; default: where there is one.
    questions : sequence of Question, optional
        The user's own, instead of families; they may have as many tokens as the longest of ``lengths``, default as the
        model reads.

    Raises
    ------
    ValueError
        For unknown families or methods, no adapter and no pattern, or samples that are longer than the model's
        positions.
    """

    def __init__(
        self,
        model,
        tokenizer,
        adapters: Sequence[str],
        haystack: Haystack | None,
        families: Sequence[str],
        lengths: Sequence[int],
        methods: Sequence[str] = DEFAULT_METHODS,
        samples: int = 100,
        calibration: int = 8,
        batch_size: int = 1,
        *,
        config: FluxConfig | None = None,
        budgets: Sequence[float] | None = None,
        force: Sequence[str] = (),
        chat: bool | None = None,
        questions: Sequence[Question] | None = None,
    ):
        check_known("methods", methods, METHODS)
        positions = max_positions(model.config)
        if lengths:
            check_lengths(lengths, positions)
        super().__init__(model, tokenizer, adapters, methods, samples, batch_size, config, budgets, force)
        if questions is None:
            self.material, self.lengths = Material(tokenizer, families, haystack, chat), list(lengths)
        else:
            self.material = Records(tokenizer, questions, max(lengths, default=positions), chat)
            self.lengths = [self.material.length]
        self.families, self.calibration = self.material.families, calibration

    @property
    def settings(self) -> dict[str, Any]:
        """See ``AdapterEvaluation.settings``."""
        facts = {"calibration": self.calibration, "lengths": self.lengths}
        return {**super().settings, **facts, **self.material.settings}

    def make(self, family: str, length: int, count: int, seed: int = 0) -> list[Sample]:
        """Make samples of a family, on held-out names and values."""
        return self.material.make(family, length, count, seed)

    def rows(self, done: Sequence[dict[str, Any]] = (), progress: Progress = silent) -> Iterator[dict]:
        """
        Yield result rows as they are measured.

        Parameters
        ----------
        done : sequence of dict
            Rows of an earlier call with the same settings: not measured again.
        progress : Progress
            Told how far it is.
        """
        have = {row_key(row): row for row in done}
        samples = sum(self.material.count(family, self.samples) for family in self.families)
        tally = Tally("answering", dict.fromkeys(self.lengths, self.kinds * samples), progress)
        for place, (name, routers) in enumerate(self.subjects):
            with self._attached(routers) as routing:
                row, method = partial(self._row, routing, have, tally, routers=name), self.deciding.get(name)
                for length in self.lengths:
                    yield from self._of_length(routing, method, place == 0, length, row, have, progress)
            if "routed-ends" in self.methods and self.deciding.get(name) == "routed":
                with self._attached(routers, decide="ends") as routing:
                    row = partial(self._row, routing, have, tally, routers=name)
                    for length, family in itertools.product(self.lengths, self.families):
                        yield row(length, family, "routed-ends", None)

    @contextmanager
    def _attached(self, routers: str | FluxConfig, **options: Any) -> Iterator[Routing]:
        routing = attach(self.model, routers, **options)
        try:
            check_head(routing)
            yield routing
        finally:
            routing.detach()

    def _row(self, routing, have, tally: Tally, length: int, family: str, method: str, routes, *, routers, **more):
        """Measure a method on a family, if that is not there yet: ``more`` is what the row says besides."""
        facts = dict(task=family, method=method, seq_len=length, routers=routers)
        key = row_key({**facts, **more})
        if key in have:
            tally.leave_out(self.material.count(family, self.samples), length)
            return have[key]
        counted = tally.start(length, f"{length:,} tokens, {family}: {method}")
        samples, began = self.make(family, length, self.samples), time.perf_counter()
        with exact_dense(routing, method):
            measures, full = self._scores(samples, routing, routes(samples) if callable(routes) else routes, counted)
            seconds = (time.perf_counter() - began) / len(samples)
            sizes = full, [len(sample.input_ids) for sample in samples]
            saved = {"esr": round(mean_esr(routing, *sizes), 8), **mean_kv(routing, *sizes)}
        rates = torch.tensor(full, dtype=torch.float32).mean(0).tolist()
        return {
            **facts,
            "model": self.model_name,
            "n": len(samples),
            "sparsity": round(1 - fmean(map(fmean, full)), 4),
            **saved,
            "seconds": round(seconds, 4),
            **measures,
            "fa_rate": {unit_name(unit): round(rate, 4) for unit, rate in zip(routing.units, rates, strict=True)},
            **more,
        }

    def _scores(
        self, samples: list[Sample], routing: Routing, routes, counted
    ) -> tuple[dict[str, Any], list[list[bool]]]:
        """Return what the samples scored, and the routes that they ran with."""
        question = samples[0].question
        if question is None or question.is_prose:
            scores = evaluate(self.model, samples, routing, self.batch_size, routes, counted)
            measures, full = token_measures(scores, question is not None or samples[0].family == "plain"), scores.full
        else:
            found, full = score_answers(self.model, self.tokenizer, samples, self.batch_size, routes, routing, counted)
            measures = answer_measures(found)
        words = {} if question is None else {"task_class": question.task_class, "metric": question.metric}
        return {**words, **measures}, full

    def _of_length(
        self, routing: Routing, method: str | None, first: bool, length: int, row, have, progress
    ) -> Iterator[dict]:
        for choice in self.beforehand(routing, first):
            more = choice.facts if choice.method == "static-nll" else {**choice.facts, "routers": None}
            for family in self.families:
                yield row(length, family, choice.method, choice.routes, **more)
        if method is None:
            if first and not any(self.deciding.values()):
                for budget in self.budgets or ():
                    count = len(routing.layers) - round(budget * len(routing.layers))
                    shared = partial(row, routers=None, budget=budget)
                    yield from self._of_count(routing, length, count, shared, have, progress)
            return
        followers = ("head-static",) if method == "head" else SIZED
        if not {method, *followers} & set(self.methods):
            return
        counts = []
        for family in self.families:
            found = row(length, family, method, None)
            counts.append(sum(found["fa_rate"].values()))
            yield found
        count = min(len(routing.units), math.ceil(fmean(counts) - 1e-6))
        if method != "head":
            yield from self._of_count(routing, length, count, row, have, progress)
        elif "head-static" in self.methods:

            @cache
            def liked() -> torch.Tensor:  # asked for only if a row is not there yet
                return self.static_heads(routing, length, count, progress)

            for family in self.families:
                yield row(length, family, "head-static", lambda samples: liked())

    def _of_count(self, routing: Routing, length: int, count: int, row, have, progress) -> Iterator[dict]:
        """Yield the rows of methods that have ``count`` full layers."""
        for method, choose, many in (
            ("static", self.static_layers, count),
            ("best-static", self._best, count),
            ("best-static-fewer", self._best, max(0, count - 1)),
        ):
            if method not in self.methods:
                continue
            keys = [row_key({**row.keywords, "task": t, "method": method, "seq_len": length}) for t in self.families]
            known = next((have[key]["full_layers"] for key in keys if key in have), None)
            chosen = choose(routing, length, many, progress) if known is None else known
            for family in self.families:
                yield row(length, family, method, chosen or "sparse", full_layers=chosen)
        if "random" in self.methods:
            for family in self.families:
                yield row(length, family, "random", lambda samples: random_routes(samples, len(routing.layers), count))

    def _calibration(self, length: int) -> dict[str, list[Sample]]:
        families = NATURAL if isinstance(self.material, Records) else self.families
        return {family: self.make(family, length, self.calibration, CALIBRATION_SEED) for family in families}

    def static_layers(self, routing, length: int, count: int, progress: Progress) -> list[int]:
        """Choose ``count`` full layers for every input, greedily by loss on calibration samples."""
        calibration, tried = self._calibration(length).values(), itertools.count(1)
        total = sum(len(routing.layers) - place for place in range(count))

        def loss(chosen: list[int]) -> float:
            progress("choosing static layers", next(tried), total, f"{length:,} tokens: {len(chosen)} of {count}")
            return fmean(
                fmean(evaluate(self.model, samples, routing, self.batch_size, chosen).nats) for samples in calibration
            )

        return sorted(greedy_order(loss, routing.layers, count))

    def static_heads(self, routing, length: int, count: int, progress: Progress) -> torch.Tensor:
        """Choose ``count`` full heads for every input, which routers like best on calibration samples: bool (U,)."""
        samples = list(itertools.chain.from_iterable(self._calibration(length).values()))
        return liked_routes(routing, samples, count, progress)

    def _best(self, routing, length, count, progress) -> list[int]:
        calibration = self._calibration(length)

        def value(chosen: list[int], few: bool) -> tuple[float, float]:
            """Return the mean accuracy of the questions; where that is equal, the lower loss wins."""
            first = max(1, self.calibration // 4) if few else self.calibration
            right, nats = [], []
            for family, samples in calibration.items():
                scores = evaluate(self.model, samples[:first], routing, self.batch_size, chosen or "sparse")
                nats.append(fmean(scores.nats))
                if family not in ("plain", PROSE):
                    right.append(scores.accuracy)
            return fmean(right) if right else 0.0, -fmean(nats)

        return best_layers(value, routing.layers, count, progress)


def row_key(row: dict[str, Any]) -> tuple:
    """Return what tells the rows of one result file apart."""
    return row["task"], row["method"], row["seq_len"], row["routers"], row.get("budget"), row.get("force")


def run(
    evaluation: AdapterEvaluation, folder: Path, restart: bool, progress: Progress = silent, **meta: Any
) -> list[dict[str, Any]]:
    """
    Measure all rows into ``folder``/quality.json, each written as it is there, and go on where a run stopped.

    ``meta`` is what the file says besides.

    Raises
    ------
    ValueError
        If the folder holds results of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, settings = folder / "quality.json", evaluation.settings
    done = [] if restart else begun_rows(path, settings)
    rows: list[dict[str, Any]] = []
    for row in evaluation.rows(done, progress):
        rows.append(row)
        written = set(map(row_key, rows))
        later = [old for old in done if row_key(old) not in written]
        if row not in done:
            write_results(path, rows + later, settings=settings, **meta)
    return rows
