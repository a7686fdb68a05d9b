"""Runs routed models in lm-evaluation-harness (``lm-eval``) as its model ``flux``, and its tasks by method.

lm-eval finds models of other packages only once they are imported. In Python, import this module; on the command line,
run this module instead of ``lm_eval``, with the same arguments::

    python -m flux_attention.evaluation.lm_harness --model flux \
        --model_args pretrained=DIR_OR_ID,routers=DIR_OR_ID --tasks hellaswag
"""

from __future__ import annotations

import logging
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from flux_attention import __version__
from flux_attention.config import FluxConfig
from flux_attention.evaluation.base import AdapterEvaluation, exact_dense
from flux_attention.evaluation.methods import DEFAULT_METHODS
from flux_attention.evaluation.progress import Progress, Tally, silent
from flux_attention.evaluation.savings import mean_kv
from flux_attention.hf.attach import attach
from flux_attention.routes import RouteSpec, parse_routes, read_spec, unit_name
from flux_attention.tasks.scoring import Scores

try:
    import lm_eval
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError(
        f"evaluation by lm-eval needs packages that are missing or too old ({error}); "
        "pip install 'flux-attention[eval]'"
    ) from error

#: Below lm-eval's own logger, so that its handler and its level hold.
logger = logging.getLogger("lm_eval.flux_attention")


@register_model("flux")
class FluxLM(HFLM):
    """
    Serves a model with routers attached to lm-eval, whose own ``hf`` model loads, batches and scores it.

    ``loglikelihood`` and multiple choice: routes are decided by the context alone, as lm-eval splits and truncates it,
    so all continuations of a context get the same routes, and the continuation's tokens see what they would in decode.
    Requests share a batch if their contexts have equally many tokens.

    ``generate_until``: by the model's own ``generate``.

    ``loglikelihood_rolling`` (perplexity of plain text) has no prompt: the routers read each window's whole text, so
    routes depend on text that is then scored. Compare such numbers between routers, not with those of a model that
    only looks back.

    Parameters
    ----------
    pretrained : str or transformers.PreTrainedModel
        The base model.
    routers : str, os.PathLike or FluxConfig
        Trained routers as a directory or a Hub id; or, with ``force``, the sizes of sparse attention.
    force : str, float, int or sequence of int, optional
        Routes for the whole evaluation instead of the routers' own: ``full``, ``sparse``, a ratio Ω_MSR with a decimal
        point (``0.75``), or the layers that run full, separated by semicolons (``3;7``). Default: the routers decide.
    compile : bool
        See ``attach``.
    **kwargs
        What lm-eval's ``hf`` model takes: ``dtype``, ``batch_size``, ``max_length``, ``parallelize``, …. With
        ``batch_size="auto"`` the size is found once for all requests of a kind, by the longest.

    Attributes
    ----------
    routing : Routing
        The attached routers' handle.
    routed : list of list of bool
        For each sequence that the model ran, in order: which layers (or heads) were full.
    forced : what ``Routing.force`` takes, or None
        Routes of all that is run from now on; None lets the routers decide.
    drawn : int or None
        Instead of ``force``: so many full layers are drawn for each context, the same ones whenever it comes.

    Raises
    ------
    ValueError
        If ``force`` is none of these; and what ``attach`` raises.
    """

    def __init__(
        self,
        pretrained,
        routers: str | os.PathLike | FluxConfig,
        force: RouteSpec | None = None,
        compile: bool = False,
        **kwargs,
    ):
        super().__init__(pretrained, **kwargs)
        self.routers, self.force = routers, force
        self.routing = attach(self.model, routers, compile=compile)
        routes = _parse_force(force)
        if routes is not None:
            parse_routes(routes, 1, self.routing.layers)  # a wrong request fails here, not after the first batch
        self.forced = routes
        self.routed: list[list[bool]] = []
        self.esr: list[float] = []  # Ω_ESR of each sequence that the model ran, in order
        self.lengths: list[int] = []  # tokens of each one's context, in order
        self.drawn: int | None = None
        self._split: tuple[int, int] | None = None

    @property
    def msr(self) -> list[float]:
        """Ω_MSR of each sequence that the model ran, in order."""
        return [1 - fmean(full) for full in self.routed]

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes into its results, and ``flux_attention``: routers, force and the mean Ω_MSR."""
        mean = fmean(self.msr) if self.msr else None
        if mean is not None:
            logger.info(f"mean Ω_MSR of {len(self.msr)} sequences: {mean:.3f}")
        facts = {
            "version": __version__,
            "routers": str(self.routers),
            "force": None if self.force is None else str(self.force),
            # Of this process's sequences. Continuations of a context count one by one, unless they share a forward.
            "mean_msr": mean,
            "sequences": len(self.msr),
        }
        return {**super().get_model_info(), "flux_attention": facts}

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # One call of the base class for each place at which inputs are split into context and continuation. It tells
        # ``_model_call`` nothing but the tokens, and lets requests with the same tokens share a forward even if they
        # are split at different places.
        if self.batch_size == "auto" and override_bs is None and requests:
            longest = max(requests, key=lambda request: len(request[1]) + len(request[2]))
            override_bs = self._detect_batch_size([longest])
            self.batch_sizes = {0: override_bs}
        groups = defaultdict(list)
        for index, request in enumerate(requests):
            groups[self._split_of(*request)].append(index)
        answers: list[Any] = [None] * len(requests)
        silent = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=silent, desc="Running loglikelihood requests") as bar:
            for split in sorted(groups, reverse=True):  # the longest first: if memory fails, it does so early
                self._split = split
                try:
                    scored = super()._loglikelihood_tokens(
                        [requests[index] for index in groups[split]], disable_tqdm=True, override_bs=override_bs
                    )
                finally:
                    self._split = None
                for index, answer in zip(groups[split], scored, strict=True):
                    answers[index] = answer
                bar.update(len(scored))
        return answers

    def _split_of(self, texts: tuple[str, str] | None, context: list[int], continuation: list[int]) -> tuple[int, int]:
        """Count the tokens of a request's input that routers read; find the first position whose logits are scored."""
        # As the base class makes the input: truncated on the left, without the last token.
        length = min(len(context) + len(continuation), self.max_length + 1) - 1
        first = length - len(continuation)
        return (length if texts is None else first + 1), first  # windows of a rolling likelihood come without texts

    def _model_call(self, inps, attn_mask=None, labels=None) -> torch.Tensor:
        if self._split is None:  # the base class looks for the largest batch
            return super()._model_call(inps, attn_mask, labels)
        read, first = self._split
        mixed = self.mixed_precision_dtype
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None),
            self._forcing(inps[:, :read].tolist()),
        ):
            # The base class counts positions from the end, so the logits of the context, which may be large, can go.
            logits = self.model(
                inps, use_cache=False, prompt_lengths=[read] * len(inps), logits_to_keep=inps.shape[1] - first
            ).logits
        self._note_routes()
        return logits

    def _model_generate(self, context, *args, **kwargs) -> torch.Tensor:
        real = kwargs.get("attention_mask", torch.ones_like(context)).bool()
        with self._forcing([row[mask].tolist() for row, mask in zip(context, real, strict=True)]):
            output = super()._model_generate(context, *args, **kwargs)
        self._note_routes()
        return output

    def _note_routes(self) -> None:
        self.routed += self.routing.routes.routes_BL.tolist()
        self.esr += self.routing.routes.esr
        self.lengths += self.routing.routes.lengths

    def _forcing(self, contexts: Sequence[list[int]]):
        """Return a context manager that forces the routes of these contexts; what is in force stays if none are."""
        if self.drawn is None:
            return nullcontext() if self.forced is None else self.routing.force(self.forced)
        layers, routes = self.routing.layers, torch.zeros(len(contexts), len(self.routing.layers))
        for row, context in zip(routes, contexts, strict=True):
            row[random.Random(str(context)).sample(range(len(layers)), self.drawn)] = 1
        return self.routing.force(routes)


def _parse_force(force: Any) -> RouteSpec | None:
    """Read what ``Routing.force`` takes, from what lm-eval makes of ``force=…``: numbers, and lists cut at commas."""
    return read_spec(str(force), ";") if isinstance(force, (str, int)) else force


class TaskEvaluation(AdapterEvaluation):
    """
    Measures some methods on lm-eval's tasks.

    Parameters
    ----------
    model, tokenizer, adapters
        As in ``AdapterEvaluation``.
    tasks : sequence of str
        lm-eval's tasks or groups of tasks, by name.
    methods : sequence of str
        Of ``quality.DEFAULT_METHODS``.
    samples, batch_size : int
        Documents of each task at most; sequences a forward.
    choose : callable, optional
        What picks the full layers of ``static``, or the heads of ``head-static``: of the attached routers' handle, how
        many, and what to tell how far it is; gives a list, or bool (heads).
    include_path : str, optional
        A folder with more task files.
    **shared
        ``config``, ``budgets`` and ``force`` as in ``AdapterEvaluation``.

    Raises
    ------
    ValueError
        For unknown methods or tasks, and no adapter and no pattern.
    """

    def __init__(
        self,
        model,
        tokenizer,
        adapters: Sequence[str],
        tasks: Sequence[str],
        methods: Sequence[str] = DEFAULT_METHODS,
        samples: int = 100,
        batch_size: int = 1,
        choose: Callable[[Any, int, Progress], list[int] | torch.Tensor] | None = None,
        include_path: str | os.PathLike | None = None,
        **shared: Any,
    ):
        if unknown := sorted(set(methods) - set(DEFAULT_METHODS)):
            raise ValueError(f"methods {unknown} are not for lm-eval's tasks, expected some of {list(DEFAULT_METHODS)}")
        super().__init__(model, tokenizer, adapters, methods, samples, batch_size, **shared)
        # lm-eval 0.4.10 takes text alone.
        self.manager = TaskManager(include_path=None if include_path is None else str(include_path))
        if missing := sorted(set(tasks) - set(self.manager.match_tasks(list(tasks)))):
            raise ValueError(f"lm-eval has no tasks {missing}; `lm_eval ls tasks` lists them")
        self.tasks, self.choose = list(tasks), choose

    @property
    def settings(self) -> dict[str, Any]:
        """See ``AdapterEvaluation.settings``."""
        return {**super().settings, "tasks": self.tasks, "lm_eval": lm_eval.__version__}

    def rows(self, done: Sequence[dict[str, Any]] = (), progress: Progress = silent) -> Iterator[dict]:
        """Yield result rows as they are measured; see ``quality.Evaluation.rows``."""
        tally = Tally("running tasks", {1: self.kinds * len(self.tasks)}, progress)
        for place, (name, routers) in enumerate(self.subjects):
            lm = FluxLM(self.model, routers=routers, tokenizer=self.tokenizer, batch_size=self.batch_size)
            try:
                yield from self._of_adapter(lm, name, place == 0, done, tally)
            finally:
                lm.routing.detach()

    def _of_adapter(self, lm: FluxLM, adapter: str | None, first: bool, done, tally: Tally) -> Iterator[dict]:
        rows = partial(self._task, lm, done, tally, adapter)
        for choice in self.beforehand(lm.routing, first):
            named = choice.facts if choice.method == "static-nll" else {**choice.facts, "routers": None}
            for task in self.tasks:
                yield from rows(task, choice.method, choice.routes, **named)
        method = self.deciding.get(adapter)
        if method is None or not {method, "head-static" if method == "head" else "static", "random"} & set(
            self.methods
        ):
            return
        ratios = []
        for task in self.tasks:
            measured = rows(task, method, None)
            ratios.append(measured[0]["sparsity"])
            yield from measured
        by_head = method == "head"
        count = math.ceil((1 - fmean(ratios)) * len(lm.routing.units) - 1e-3)
        method, kept = ("head-static", "full_heads") if by_head else ("static", "full_layers")
        if method in self.methods and self.choose is not None:
            known = (row[kept] for row in done if (row["method"], row["routers"]) == (method, adapter))
            chosen = next(known, None)
            if chosen is None:
                chosen = self.choose(lm.routing, count, tally.progress)
            names = [unit_name(unit) for unit in lm.routing.units]
            if isinstance(chosen, torch.Tensor):
                chosen = [name for name, full in zip(names, chosen.tolist(), strict=True) if full]
            routes = torch.tensor([name in map(str, chosen) for name in names])
            for task in self.tasks:
                yield from rows(task, method, routes, **{kept: chosen})
        if "random" in self.methods and not by_head:
            for task in self.tasks:
                yield from rows(task, "random", count)

    def _task(
        self, lm: FluxLM, done, tally: Tally, adapter: str | None, task: str, method: str, routes, **more
    ) -> list[dict]:
        """Measure a method on a task or a group of tasks, if that is not there yet; see ``Evaluation._row``."""
        facts = dict(method=method, routers=adapter, asked=task) | more
        kind = {fact: facts.get(fact) for fact in ("method", "routers", "asked", "budget", "force")}
        if known := [row for row in done if all(row.get(fact) == value for fact, value in kind.items())]:
            tally.leave_out(1, 1)
            return known
        counted, began = tally.start(1, f"{task}: {method}"), time.perf_counter()
        for seen in (lm.routed, lm.esr, lm.lengths):
            seen.clear()
        lm.forced, lm.drawn = (None, routes) if method == "random" else (routes, None)
        with exact_dense(lm.routing, method):
            found = lm_eval.simple_evaluate(
                model=lm, tasks=[task], limit=self.samples, bootstrap_iters=1000, task_manager=self.manager
            )
            saved = mean_kv(lm.routing, lm.routed, lm.lengths)
        counted(1)
        documents = sum(counts["effective"] for counts in found["n-samples"].values())
        rates = map(fmean, zip(*lm.routed, strict=True))
        facts |= dict(
            sparsity=round(fmean(lm.msr), 4),
            esr=round(fmean(lm.esr), 8),
            seconds=round((time.perf_counter() - began) / max(1, documents), 4),
            **saved,
            fa_rate={unit_name(unit): round(rate, 4) for unit, rate in zip(lm.routing.units, rates, strict=True)},
            model=self.model_name,
        )
        return [{**row, **facts} for row in _task_rows(found)]


def _task_rows(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for each task in lm-eval's results: its first metric, with a 95 % interval, and all of them."""
    for task, counts in results["n-samples"].items():
        found = results["results"][task]
        # "metric,filter"; RULER has -1 for lengths that it did not ask for.
        metrics = {
            name: value
            for name, value in found.items()
            if "," in name and "_stderr," not in name and isinstance(value, (int, float)) and value != -1
        }
        first, value = next(iter(metrics.items()))
        metric, filter_ = first.split(",", 1)
        samples = [sample for sample in results["samples"][task] if sample.get("filter", filter_) == filter_]
        scores = [sample.get(metric) for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        more, low, high = {}, None, None
        if all(score in (0, 1) for score in scores):  # right or wrong: methods are compared by document
            low, high = Scores(right=scores).accuracy_interval
            more["scores"] = list(map(int, scores))
        elif isinstance(error := found.get(f"{metric}_stderr,{filter_}"), (int, float)):
            low, high = value - 1.96 * error, value + 1.96 * error
        yield {
            "task": task,
            "seq_len": None,
            "n": counts["effective"],
            "metric": metric,
            "perplexity" if "perplexity" in metric else "accuracy": round(value, 4),
            "low": None if low is None else round(low, 4),
            "high": None if high is None else round(high, 4),
            "metrics": {name.removesuffix(",none"): round(value, 4) for name, value in metrics.items()},
            **more,
        }


def main() -> None:
    """Run the command line of lm-eval, which then knows the model ``flux``."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
