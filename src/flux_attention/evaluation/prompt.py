"""Writes one prompt as a page: its routes, what each layer reads and keeps, and what that saves by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

from transformers import DynamicCache

from flux_attention.evaluation.pages import TEMPLATES
from flux_attention.hf.cache.layer import RoutedLayer
from flux_attention.hf.handle import Routing
from flux_attention.hf.report import Report
from flux_attention.patterns import Full
from flux_attention.routes import Routes, unit_name

#: Letters of the prompt that the page shows of either end.
SHOWN = 220


@dataclass(frozen=True)
class Layer:
    """
    Says what one routed layer does with a prompt.

    Attributes
    ----------
    name : str
    full : bool
    margin : float or None
        The router's output for full attention less that for sparse; None where no router ran.
    reads, keeps : float
        Query-key pairs that are computed, and tokens that are kept, as shares of dense.
    tokens, kv_bytes : int
        What is kept of the prompt.
    """

    name: str
    full: bool
    margin: float | None
    reads: float
    keeps: float
    tokens: int
    kv_bytes: int


@dataclass(frozen=True)
class Costs:
    """
    Counts what a prompt and a new token behind it take; by arithmetic, so without caches, launches and waiting.

    Attributes
    ----------
    weight_flops : float
        Of the prompt's matrix products with weights: two for each weight of a layer and token.
    attention_flops, dense_attention_flops : float
        Of the routed layers' attention: four for each pair and number of a query head.
    weight_bytes : int
        That a step reads: the layers and the output embeddings.
    kv_bytes, dense_kv_bytes : int
        That a step reads.
    """

    weight_flops: float
    attention_flops: float
    dense_attention_flops: float
    weight_bytes: int
    kv_bytes: int
    dense_kv_bytes: int

    @cached_property
    def prefill(self) -> float:
        """How many times fewer operations the prompt takes."""
        return (self.weight_flops + self.dense_attention_flops) / (self.weight_flops + self.attention_flops)

    @cached_property
    def step(self) -> float:
        """How many times fewer bytes a step reads."""
        return (self.weight_bytes + self.dense_kv_bytes) / (self.weight_bytes + self.kv_bytes)


def layers_of(routes: Routes, cache: DynamicCache) -> list[Layer]:
    """
    Say what each routed layer did with a prompt.

    Parameters
    ----------
    routes : Routes
        Of one sequence.
    cache : transformers.DynamicCache
        What it left.
    """
    length, dense, found = routes.lengths[0], Full().pairs(routes.lengths[0]), []
    held = {index: layer.nbytes for index, layer in enumerate(cache.layers) if isinstance(layer, RoutedLayer)}
    for place, unit in enumerate(routes.layers):
        is_full = bool(routes.routes_BL[0, place])
        pattern = routes.full if is_full else routes.sparse
        kept = pattern.kept(length)
        shares = pattern.pairs(length) / dense, kept / length
        found.append(Layer(unit_name(unit), is_full, routes.margin(0, place), *shares, kept, held[unit]))
    return found


def costs_of(routing: Routing, report: Report) -> Costs:
    """Count what the prompt of a report takes; the report is of one sequence."""
    decoder, base = routing.model.get_decoder(), routing.config.base_model
    embeddings, output = (
        each.weight for each in (routing.model.get_input_embeddings(), routing.model.get_output_embeddings())
    )
    weights = [weight for weight in decoder.parameters() if weight is not embeddings]
    flops = 4 * base.num_heads * base.head_dim
    return Costs(
        weight_flops=2.0 * sum(weight.numel() for weight in weights) * report.routes.lengths[0],
        attention_flops=float(flops * report.pairs),
        dense_attention_flops=float(flops * report.baseline_pairs),
        weight_bytes=sum(weight.numel() * weight.element_size() for weight in [*weights, output]),
        kv_bytes=report.kv_bytes or 0,
        dense_kv_bytes=report.baseline_kv_bytes or 0,
    )


def write_prompt_page(
    path: str | Path,
    routing: Routing,
    cache: DynamicCache | None,
    report: Report,
    *,
    model: str,
    adapter: str | None = None,
    text: str = "",
    command: str | None = None,
) -> None:
    """
    Write one prompt as an HTML page that needs nothing else.

    Parameters
    ----------
    path : str or Path
        The page.
    routing : Routing
        The handle of the model, which has just read the prompt, a single sequence.
    cache : transformers.DynamicCache or None
        The KV cache that it left.
    report : Report
        Of that.
    model, adapter : str
        As they are called.
    text : str
        The prompt.
    command : str, optional
        That asks for the page.

    Raises
    ------
    ValueError
        For routers by head, as the page shows what each layer keeps.
    """
    if routing.by_head:
        raise ValueError("the page shows what each layer keeps, but heads are routed; expected routers by layer")
    routes = routing.routes
    layers = layers_of(routes, cache)
    shown = {
        "title": f"{model}: the routes of a prompt of {routes.lengths[0]:,} tokens",
        "model": model,
        "adapter": adapter,
        "command": command,
        "text": text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]}\n…\n{text[-SHOWN:]}",
        "tokens": routes.lengths[0],
        "layers": layers,
        "decided": any(layer.margin is not None for layer in layers),
        "widest": max((abs(layer.margin) for layer in layers if layer.margin is not None), default=0.0) or 1.0,
        "report": report,
        "reads": fmean(layer.reads for layer in layers),
        "others": routing.config.base_model.num_layers - len(layers),
        "costs": costs_of(routing, report),
        "experts": any(hasattr(routing.model.config, name) for name in ("num_experts", "num_local_experts")),
        "sees": routes.sparse.to_dict(),
        "limit": routes.sparse.kept(2**28),
    }
    Path(path).write_text(TEMPLATES.get_template("prompt.html.jinja").render(shown), encoding="utf-8")
