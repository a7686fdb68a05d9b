"""The report says what a generation kept, computed and took, beside the stock model with all layers full.

Shape suffixes: B batch, L routed layers.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from transformers import DynamicCache

from flux_attention import notebook
from flux_attention.hf.cache.layer import RoutedLayer
from flux_attention.hf.cache.size import dense_kv_bytes, kv_bytes
from flux_attention.hf.context import AttachedModel
from flux_attention.patterns import Full
from flux_attention.routes import Routes

#: Where the words of a report are explained, in the repository.
GLOSSARY = "docs/glossary.md"


@dataclass(frozen=True)
class Report:
    """
    Says what one call of ``generate`` kept, computed and took; "dense" is the same with all layers full.

    Attributes
    ----------
    routes : Routes
        What its sequences ran with, a row for each of the KV cache (so of each beam), with the prompts' lengths in
        tokens, earlier turns included.
    new_tokens : int
        Generated for each sequence, padding behind the shorter ones included; 0 where the prompt alone was read.
    kv_bytes, baseline_kv_bytes : int or None
        Bytes of keys and values that the KV cache held at the end, and dense; None without a cache.
    pairs, baseline_pairs : int
        Query-key pairs that were computed for the prompts' tokens, and dense, of one head, over all sequences and
        routed layers. Of a further turn, the new tokens'.
    prefill_s : float or None
        Seconds from the prompt's first forward call to the first new token, by the host's clock. Includes compilation,
        where this call was the first to need it.
    token_s : float or None
        Seconds for each new token behind the first; None if there is none.
    """

    routes: Routes
    new_tokens: int
    kv_bytes: int | None
    baseline_kv_bytes: int | None
    pairs: int
    baseline_pairs: int
    prefill_s: float | None
    token_s: float | None

    @property
    def esr(self) -> float:
        """Effective sparsity ratio Ω_ESR of all sequences together: the share of pairs not computed."""
        return 1 - self.pairs / self.baseline_pairs if self.baseline_pairs else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report JSON-ready: ``Routes.to_dict`` with the numbers beside it."""
        numbers = ("new_tokens", "kv_bytes", "baseline_kv_bytes", "pairs", "baseline_pairs", "prefill_s", "token_s")
        return {**self.routes.to_dict(), **{name: getattr(self, name) for name in numbers}}

    def lines(self) -> list[str]:
        """Write the report for people, a sentence a line; the routes are not drawn."""
        count, msr = len(self.routes.layers), self.routes.msr
        sparse = fmean(msr) * count
        mean = "" if len(set(msr)) == 1 else "on average "
        kept = "no KV cache kept"
        if self.kv_bytes is not None and self.baseline_kv_bytes is not None:
            share = 100 * self.kv_bytes / self.baseline_kv_bytes
            kept = f"KV {share:.0f} % of dense ({in_bytes(self.kv_bytes)} of {in_bytes(self.baseline_kv_bytes)})"
        said = [
            f"{mean}{sparse:.3g} of {count} {self.routes.kind} sparse (Ω_MSR {fmean(msr):.2f}), {kept}, "
            f"{100 * (1 - self.esr):.0f} % of the prompt's query-key pairs computed (Ω_ESR {self.esr:.2f})"
        ]
        if self.prefill_s is not None:
            prompts = len(self.routes.lengths)
            tokens = f"{sum(self.routes.lengths):,} tokens" + (f" of {prompts} prompts" if prompts > 1 else "")
            said.append(f"{tokens} in {_time(self.prefill_s)}")
            if self.token_s is not None:
                said[-1] += f", then {_time(self.token_s)} a token"
        if self.routes.note:
            said.append(self.routes.note)
        return [*said, f"words: {GLOSSARY}"]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        """Draw routes and report for notebooks."""
        return notebook.frame(self.html(), notebook.legend())

    def html(self) -> str:
        """Draw routes, what was kept and what was computed beside dense, for a frame of ``notebook``."""
        bars = ""
        if self.kv_bytes is not None and self.baseline_kv_bytes:
            words = f"{in_bytes(self.kv_bytes)} of {in_bytes(self.baseline_kv_bytes)}"
            bars += notebook.bar("KV cache, of dense", self.kv_bytes / self.baseline_kv_bytes, words)
        bars += notebook.bar("pairs, of dense", 1 - self.esr, f"{100 * (1 - self.esr):.0f} %")
        return self.routes.html() + bars + "".join(notebook.line(words) for words in self.lines())


class ReportMixin:
    """Gives a handle the report of what generated last; by thread, as routes are."""

    _published: threading.local
    _latest_report: Report | None = None

    @property
    def _last_report(self) -> Report | None:
        return getattr(self._published, "report", self._latest_report)

    def report(self) -> Report:
        """
        Say what this thread's last ``generate`` (or ``pipeline``) kept, computed and took, beside dense.

        Of any thread, where this one generated nothing. It prints for people; ``to_dict`` is for programs.

        Raises
        ------
        RuntimeError
            If nothing was generated yet.
        """
        report = self._last_report
        if report is None:
            raise RuntimeError(
                "there is nothing to report: nothing was generated yet while routers were attached; call "
                "model.generate(...) or a pipeline first (of forward calls of your own see routing.routes and kv_bytes)"
            )
        return report

    def publish_report(self, report: Report) -> None:
        """Make the report of a generation that has ended this thread's, and the latest."""
        self._published.report = self._latest_report = report


def make_report(
    routing: AttachedModel,
    cache: DynamicCache | None,
    past: Sequence[int],
    lengths: Sequence[int],
    new_tokens: int = 0,
    prefill_s: float | None = None,
    token_s: float | None = None,
) -> Report:
    """
    Make the report of what was computed and is cached now; by arithmetic, so without waiting for the device.

    Parameters
    ----------
    routing : AttachedModel
        The handle of the model that ran.
    cache : transformers.DynamicCache or None
        Its KV cache.
    past, lengths : sequence of int
        Real tokens of each sequence before the prompt (in earlier turns), and with it.
    new_tokens, prefill_s, token_s
        See ``Report``.
    """
    if cache is None:
        routes, kept = replace(routing.routes, logits_BL2=None, lengths=tuple(lengths)), (None, None)
    else:
        # Of a further turn they were decided in an earlier one, maybe in another thread: the cache knows them.
        rows = [layer.routes for layer in cache.layers if isinstance(layer, RoutedLayer)]
        routes_BL = torch.tensor(rows, device="cpu").transpose(0, 1).flatten(1)  # of heads, a layer's together
        routes = Routes(routes_BL, None, routing.units, tuple(lengths), routing.sparse, routing.full)
        kept = kv_bytes(cache), dense_kv_bytes(cache)
    return Report(routes, new_tokens, *kept, *_pairs(routes, past), prefill_s, token_s)


def _pairs(routes: Routes, past: Sequence[int]) -> tuple[int, int]:
    """Count the pairs that were computed for the tokens behind ``past`` cached ones, and those of full layers."""
    computed = dense = 0
    for row, length, before in zip(routes.routes_BL.tolist(), routes.lengths, past, strict=True):
        for is_full in row:
            pattern = routes.full if is_full else routes.sparse
            if before:  # behind a prompt its pattern no longer is
                pattern = pattern.later
            computed += pattern.pairs(length) - pattern.pairs(before)
            dense += Full().pairs(length) - Full().pairs(before)
    return computed, dense


def in_bytes(count: int) -> str:
    """Write bytes as reports do: 1.2 MiB."""
    power, unit = (30, "GiB") if count >= 2**30 else (20, "MiB") if count >= 2**20 else (10, "KiB")
    return f"{count / 2**power:.1f} {unit}"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"
