"""Ranks layers by what making them sparse does to the loss of answers, and judges how many can be.

A fixed set for any budget is the first layers of the ranking. Sets are judged on other samples, by the loss and by what
the model generates, as the loss alone misleads: the largest budget that loses neither is the default. Published for
static hybrids as selection by negative log-likelihood (arXiv 2606.27791).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from flux_attention.calibration.samples import CalibrationSet
from flux_attention.calibration.thresholds import TRIED, Alone, Watched, grouped, of_layers
from flux_attention.errors import CalibrationError
from flux_attention.hf.handle import Routing
from flux_attention.patterns import BlockSparse
from flux_attention.progress import Progress, silent
from flux_attention.results import begun_rows, write_results
from flux_attention.tasks.generation import generate_answers, score_answers, with_answers
from flux_attention.tasks.samples import Sample
from flux_attention.tasks.scoring import evaluate
from flux_attention.tasks.text import OTHER_TEXT

#: Shares of sparse layers that are judged.
BUDGETS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
#: Rounds of the ranking: layers that stand in for each other, which leave-one-out cannot see, are told apart.
ROUNDS = 8
#: Nats a token by which no family's loss may rise at the default budget.
TOLERANCE = 0.05
#: By how much the mean score of generated answers may be below that of dense there.
MAX_LOST = 0.02
#: The least mean score of dense answers, by metric, at which a family's answers tell anything.
MIN_DENSE = {"match": 0.5, "rouge-l": 0.1, "edit": 0.1}
#: Files in the output folder, besides the adapter's.
ROWS_FILE, PLOT_FILE = "calibration.json", "calibration.svg"


def _left(layers: int, rounds: int) -> list[int]:
    """Count the layers that are left before each round, and after the last one."""
    rounds = min(rounds, layers)
    return [layers * (rounds - number) // rounds for number in range(rounds + 1)]


def eliminate(loss: Callable[[list[int]], float], layers: Sequence[int], rounds: int) -> list[int]:
    """
    Order layers, the one that needs full attention most first, by backward elimination.

    All layers begin full. A round takes the loss with each layer that is left made sparse, too, and then leaves out
    those that cost least: about as many in each round, so that all are out in the end. One round is leave-one-out.

    Parameters
    ----------
    loss : callable
        Of a list of full layers; called layers × (rounds + 1) / 2 times.
    rounds : int
        At least one; more than there are layers are as many as there are.
    """
    left, found = list(layers), []
    for keep in _left(len(layers), rounds)[1:]:
        losses = {layer: loss([other for other in left if other != layer]) for layer in left}
        ranked = sorted(left, key=losses.__getitem__, reverse=True)
        found = ranked[keep:] + found
        left = [layer for layer in left if layer in ranked[:keep]]
    return found


class Calibrator:
    """
    Ranks a model's layers and judges budgets; every figure is kept as it is measured.

    Parameters
    ----------
    routing : Routing
        Of a model with fresh routers.
    tokenizer
        The model's.
    samples : CalibrationSet
    batch_size : int
        Samples a forward.
    folder : Path, optional
        Keeps figures in ``calibration.json``, and has those of a run that stopped.
    restart : bool
        Measure all anew.
    progress : Progress
    """

    def __init__(
        self,
        routing: Routing,
        tokenizer,
        samples: CalibrationSet,
        batch_size: int = 1,
        folder: Path | None = None,
        restart: bool = False,
        progress: Progress = silent,
    ):
        self.routing, self.tokenizer, self.samples = routing, tokenizer, samples
        self.batch_size, self.folder, self.progress = batch_size, folder, progress
        #: Families that rank: those that can be judged, once that is known.
        self.counted: set[str] = {sample.family for sample in samples.ranked}
        self.rows: list[dict[str, Any]] = []
        if folder is not None and not restart:
            self.rows = begun_rows(folder / ROWS_FILE, self.settings, {"tokens": OTHER_TEXT})

    @cached_property  # written with every row, and hashes the samples and weights
    def settings(self) -> dict[str, Any]:
        """Facts that the rows depend on."""
        model, config = self.routing.model, self.routing.config
        base = config.base_model
        assert base is not None  # ``attach`` filled it in
        return {
            "model": base.name,
            "sample": base.sample and list(base.sample),
            "dtype": str(model.dtype).removeprefix("torch."),
            "sparse": config.sparse,
            "full": config.full,
            "tokens": self.samples.digest(),
            "answers": "own",  # earlier versions ranked by reference answers: their losses are not mixed with these
            "weights": weights_digest(model),
            **self.samples.settings,
        }

    def _find(self, **facts: Any) -> dict[str, Any] | None:
        return next((row for row in self.rows if all(row.get(key) == value for key, value in facts.items())), None)

    def _add(self, **row: Any) -> dict[str, Any]:
        self.rows.append(row)
        if self.folder is not None:
            write_results(self.folder / ROWS_FILE, self.rows, settings=self.settings)
        return row

    @cached_property
    def ranked(self) -> list[Sample]:
        """
        The samples that rank, with what the model itself answers, all layers full, in place of reference answers.

        Those are worded as the model would not, and sets of layers that word things more like them have a lower loss,
        though they lose what was asked for.
        """
        asked, done = list(filter(_asks, self.samples.ranked)), 0
        if not asked:
            return self.samples.ranked

        def told(count: int) -> None:
            nonlocal done
            done += count
            self.progress("answering what ranks", done, len(asked))

        row = self._find(phase="answers") or self._add(
            phase="answers",
            tokens=generate_answers(
                self.routing.model, self.tokenizer, asked, self.batch_size, None, "full", self.routing, told
            ).tokens,
        )
        own = iter(with_answers(asked, row["tokens"]))
        return [next(own) if _asks(sample) else sample for sample in self.samples.ranked]

    def _ranked_loss(self, full: list[int], **pattern: Any) -> float:
        """
        Return the mean over the families that count of the ranked samples' loss with these layers full.

        ``pattern`` says what they compute, if not exact attention.
        """
        facts = dict(phase="layer" if pattern else "rank", full_layers=sorted(full), **pattern)
        row = self._find(**facts)
        if row is None:
            nats: dict[str, list[float]] = {}
            scores = evaluate(self.routing.model, self.ranked, self.routing, self.batch_size, full)
            for sample, loss in zip(self.ranked, scores.nats, strict=True):
                nats.setdefault(sample.family, []).append(loss)
            families = {family: _finite(round(fmean(losses), 6), family) for family, losses in nats.items()}
            row = self._add(**facts, nats=fmean(families.values()), families=families, n=len(self.ranked))
        counted = [nats for family, nats in row["families"].items() if family in self.counted]
        return fmean(counted) if counted else row["nats"]

    def rank(self, rounds: int = ROUNDS) -> tuple[int, ...]:
        """
        Order the routed layers, the one that needs full attention most first.

        Parameters
        ----------
        rounds : int
            See ``eliminate``.
        """
        layers, done = self.routing.layers, 0
        total = sum(_left(len(layers), rounds))

        def loss(full: list[int]) -> float:
            nonlocal done
            self.progress("ranking layers", done, total)
            done += 1
            return self._ranked_loss(full)

        ranking = tuple(eliminate(loss, layers, rounds))
        self.progress("ranking layers", total, total)
        return ranking

    def judge(self, ranking: tuple[int, ...]) -> list[dict[str, Any]]:
        """
        Measure held-out loss and generated answers at each budget; answers where dense gives them.

        Raises
        ------
        CalibrationError
            See ``judge_dense``.
        """
        counts = dict.fromkeys(len(ranking) - round(budget * len(ranking)) for budget in BUDGETS[1:])
        total, rows = (len(counts) + 1) * len(self.samples.judged), self.judge_dense()
        asked = set(answered(rows))
        for count in counts:
            for family in self.samples.judged:
                self.progress("judging budgets", len(rows), total)
                rows.append(self._judged(family, sorted(ranking[:count]), len(ranking), family in asked))
        self.progress("judging budgets", total, total)
        return rows

    def judge_thresholds(self, full: Sequence[int], pattern: BlockSparse, asked: Sequence[str]) -> list[dict[str, Any]]:
        """
        Measure held-out loss and generated answers where full layers are block-sparse.

        At each threshold of ``TRIED``, then where each layer has its own, by what it alone loses (``of_layers``).

        Parameters
        ----------
        full : sequence of int
            The full layers.
        pattern : BlockSparse
            What they compute, but for the threshold.
        asked : sequence of str
            The families that answers are generated of.
        """
        rows, exact = [], self.routing.full
        thresholds = [*TRIED[pattern.select], *self._own_thresholds(sorted(full), pattern)]
        total, layers = len(thresholds) * len(self.samples.judged), len(self.routing.layers)
        try:
            for threshold in thresholds:
                for family in self.samples.judged:
                    self.progress("judging thresholds", len(rows), total)
                    # Samples may be shorter than the prompts for which selection is faster.
                    self.routing.full = watched = Watched(threshold, **rule_of(pattern), from_tokens=0)
                    rows.append(self._judged(family, sorted(full), layers, family in asked, watched))
        finally:
            self.routing.full = exact
        self.progress("judging thresholds", total, total)
        return rows

    def _own_thresholds(self, full: list[int], pattern: BlockSparse) -> list[dict[int, float]]:
        """Measure by how much each layer alone raises the loss of what ranks; return sets of thresholds by layer."""
        if len(full) == 1:
            return []
        tried, exact, base = TRIED[pattern.select], self.routing.full, self._ranked_loss(full)
        rises: dict[int, list[float]] = {layer: [] for layer in full}
        try:
            for done, (layer, threshold) in enumerate(itertools.product(rises, tried)):
                self.progress("judging layers' thresholds", done, len(rises) * len(tried))
                self.routing.full = alone = Alone(threshold, **rule_of(pattern), from_tokens=0, layer=layer)
                facts = dict(**rule_of(alone), layer=layer, threshold=threshold)
                rises[layer].append(self._ranked_loss(full, **facts) - base)
        finally:
            self.routing.full = exact
        self.progress("judging layers' thresholds", len(rises) * len(tried), len(rises) * len(tried))
        return of_layers(rises, tried)

    def _judged(
        self, family: str, full: list[int], layers: int, asks: bool, watched: Watched | None = None
    ) -> dict[str, Any]:
        facts: dict[str, Any] = dict(phase="judge", task=family, full_layers=full)
        if watched is not None:
            threshold = watched.to_dict()["threshold"]
            facts |= dict(phase="threshold", full=watched.name, **rule_of(watched), threshold=threshold)
        row = self._find(**facts)
        if row is not None:
            return row
        model, samples = self.routing.model, self.samples.judged[family]
        nats = evaluate(model, samples, self.routing, self.batch_size, full).nats
        selected = {} if watched is None else {"density": round(fmean(watched.densities), 4)}
        question, scores = samples[0].question, None
        metric = "perplexity" if question is None else question.metric
        if asks and metric in MIN_DENSE:
            scores, _ = score_answers(model, self.tokenizer, samples, self.batch_size, full, self.routing)
        return self._add(
            **facts,
            task_class=family if question is None else question.task_class,
            metric=metric,
            method="dense" if len(full) == layers and watched is None else "static-nll",
            sparsity=1 - len(full) / layers,
            nats=_finite(round(fmean(nats), 6), family),
            accuracy=None if scores is None else round(fmean(scores), 6),
            n=len(samples),
            **selected,
        )

    def judge_dense(self) -> list[dict[str, Any]]:
        """
        Measure held-out loss and generated answers with all layers full.

        Raises
        ------
        CalibrationError
            If the model answers no family well enough to tell what sparse layers lose.
        """
        rows, layers = [], sorted(self.routing.layers)
        for done, family in enumerate(self.samples.judged):
            self.progress("judging dense", done, len(self.samples.judged))
            rows.append(self._judged(family, layers, len(layers), True))
        self.progress("judging dense", len(rows), len(rows))
        asked = [row for row in rows if row["accuracy"] is not None]
        if asked and not answered(rows):
            raise CalibrationError(
                "this model answers none of the families well enough, all layers full, to tell what sparse ones lose: "
                + ", ".join(f"{row['task']} {row['accuracy']:.2f}" for row in asked)
                + "; try shorter samples, or records that it can answer"
            )
        self.counted = {*answered(rows), *(row["task"] for row in rows if row["accuracy"] is None)}
        return rows


def _asks(sample: Sample) -> bool:
    return sample.question is not None and not sample.question.is_prose


def _finite(nats: float, family: str) -> float:
    if not math.isfinite(nats):
        raise CalibrationError(
            f"the loss of {family} is {nats}: the model's hidden states have overflowed (fp16?), or its weights are "
            "damaged"
        )
    return nats


def weights_digest(model) -> str:
    """Hash a few values of each parameter (SHA-256): two models may share their name, shape and embeddings."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        values = parameter.detach().flatten()[:: max(1, parameter.numel() // 4)][:5]
        found.update(values.float().cpu().numpy().tobytes())
    return found.hexdigest()


def answered(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the families whose generated answers tell something: the model gives them, all layers full."""
    return [
        row["task"]
        for row in rows
        if row["method"] == "dense" and row["accuracy"] is not None and row["accuracy"] >= MIN_DENSE[row["metric"]]
    ]


def judged_rows(folder: Path, ranking: Sequence[int]) -> list[dict[str, Any]]:
    """Read what ``Calibrator.judge`` measured of a ranking into a folder."""
    sets = [sorted(ranking[:count]) for count in range(len(ranking) + 1)]
    rows = json.loads((folder / ROWS_FILE).read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if row["phase"] == "judge" and row["full_layers"] in sets]


def threshold_rows(folder: Path, full: Sequence[int], pattern: BlockSparse) -> list[dict[str, Any]]:
    """Read what ``Calibrator.judge_thresholds`` measured with these arguments into a folder."""
    facts = dict(phase="threshold", full_layers=sorted(full), **rule_of(pattern))
    rows = json.loads((folder / ROWS_FILE).read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if all(row.get(key) == value for key, value in facts.items())]


def rule_of(pattern: BlockSparse) -> dict[str, Any]:
    """Return how a pattern selects blocks, but for the threshold."""
    return {name: getattr(pattern, name) for name in ("select", "stride", "correct")}


def choose_budget(
    rows: Sequence[Mapping[str, Any]], answered: Sequence[str], tolerance: float = TOLERANCE, max_lost: float = MAX_LOST
) -> float:
    """
    Choose the largest budget at which nothing is lost.

    Parameters
    ----------
    rows : sequence of dict
        ``task``, ``sparsity``, ``nats`` and ``accuracy`` of each family at each budget, 0 included.
    answered : sequence of str
        Families whose accuracy and loss count; of others that are asked neither does.
    tolerance : float
        Nats a token by which no family's loss may rise above that of budget 0.
    max_lost : float
        By how much the mean accuracy may fall below that of budget 0.
    """
    dense, at = dense_of(rows, answered), {}
    for row in rows:
        at.setdefault(row["sparsity"], {})[row["task"]] = row
    return max(share for share, found in at.items() if _loses_nothing(found, dense, answered, tolerance, max_lost))


def choose_threshold(
    rows: Sequence[Mapping[str, Any]],
    dense: Mapping[str, Mapping[str, Any]],
    answered: Sequence[str],
    tolerance: float = TOLERANCE,
    max_lost: float = MAX_LOST,
) -> float | dict[str, float] | None:
    """
    Choose the threshold that selects fewest blocks of those at which nothing is lost; None where all lose.

    It may be one for all layers, or one for each.

    Parameters
    ----------
    rows : sequence of dict
        As ``Calibrator.judge_thresholds`` gives them.
    dense : dict of str to dict
        See ``dense_of``.
    answered, tolerance, max_lost
        As in ``choose_budget``; what is lost by sparse layers counts, too.
    """
    kept = [
        some
        for some in grouped(rows, dense)
        if _loses_nothing({row["task"]: row for row in some}, dense, answered, tolerance, max_lost)
    ]
    fewest = min(kept, key=lambda some: fmean(row["density"] for row in some), default=None)
    return None if fewest is None else fewest[0]["threshold"]


def dense_of(rows: Sequence[Mapping[str, Any]], answered: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Return, of each family that counts, the row with all layers full and exact."""
    return {
        row["task"]: row
        for row in rows
        if row["sparsity"] == 0 and (row["task"] in answered or row["accuracy"] is None)
    }


def _loses_nothing(found, dense, answered, tolerance, max_lost) -> bool:
    """Whether no loss of ``dense`` rises, and the answers stay; both are rows by family."""
    if not all(found[task]["nats"] - dense[task]["nats"] <= tolerance for task in dense):
        return False
    lost = [dense[task]["accuracy"] - found[task]["accuracy"] for task in answered]
    return not lost or fmean(lost) <= max_lost + 1e-9
