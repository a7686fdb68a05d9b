"""Routes of a batch, full attention (FA) or sparse attention (SA) per sequence and layer: as decided, and as asked for.

Shape suffixes: B batch, L routed layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.text import Text

from flux_attention import notebook
from flux_attention.patterns import Full, Pattern
from flux_attention.patterns.base import MAX_TOKENS

#: What is decided on: a routed layer's index in the model, or (layer, KV head).
Unit = int | tuple[int, int]
#: What ``Routing.force`` takes.
RouteSpec = str | float | Sequence[Unit] | torch.Tensor


@dataclass(frozen=True)
class Routes:
    """
    The routes of one prefill.

    Attributes
    ----------
    routes_BL : torch.Tensor
        bool on the CPU, True = full attention.
    logits_BL2 : torch.Tensor or None
        float32 on the CPU, the routers' outputs for [SA, FA], also of prompts shorter than ``min_tokens``, which run
        full whatever they say; None where no router ran.
    layers : tuple of int
        The model's index of each routed layer; or (layer, KV head) where heads are routed.
    lengths : tuple of int
        Real (not padding) prompt tokens of each sequence.
    sparse, full : Pattern
        What the sparse layers computed, and the full ones.
    """

    routes_BL: torch.Tensor
    logits_BL2: torch.Tensor | None
    layers: tuple[Unit, ...]
    lengths: tuple[int, ...]
    sparse: Pattern
    full: Pattern

    @property
    def kind(self) -> str:
        """What is routed, for people."""
        return "layers" if isinstance(self.layers[0], int) else "KV heads"

    @property
    def msr(self) -> list[float]:
        """Model sparsity ratio Ω_MSR of each sequence: the share of routed layers that are sparse."""
        return (~self.routes_BL).float().mean(1).tolist()

    @property
    def esr(self) -> list[float]:
        """Effective sparsity ratio Ω_ESR of each sequence: the share of causal query-key pairs not computed."""
        saved = []
        for length, ratio in zip(self.lengths, self.msr, strict=True):
            sparse, full = (1 - pattern.pairs(length) / Full().pairs(length) for pattern in (self.sparse, self.full))
            saved.append(ratio * sparse + (1 - ratio) * full)
        return saved

    @property
    def note(self) -> str | None:
        """What the ratio Ω_MSR hides: in which prompts sparse layers saw everything; None where they did in none."""
        limit = self.sparse.kept(MAX_TOKENS)
        sparse = [length for length, full in zip(self.lengths, self.routes_BL.all(1).tolist(), strict=True) if not full]
        short = [length for length in sparse if length <= limit]
        if not short:
            return None
        which = "the prompt" if len(self.lengths) == 1 else f"{len(short)} of {len(self.lengths)} prompts"
        return (
            f"nothing is saved in {which}: sparse layers see sink + window = {limit:,} tokens, and a prompt of "
            f"{max(short):,} is not longer, so that every layer computes and keeps all of it"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready entries, one a sequence, with the routes as a string of F and S in layer order."""
        return {
            "layers": list(self.layers),
            "sequences": [
                {
                    "tokens": length,
                    "routes": _strip(row),
                    "full_layers": [layer for layer, full in zip(self.layers, row.tolist(), strict=True) if full],
                    "msr": msr,
                    "esr": esr,
                    "logits": None if self.logits_BL2 is None else self.logits_BL2[index].tolist(),
                }
                for index, (length, row, msr, esr) in enumerate(
                    zip(self.lengths, self.routes_BL, self.msr, self.esr, strict=True)
                )
            ],
        }

    def __repr__(self) -> str:
        rows = ", ".join(f"{_strip(row)} Ω={msr:.2f}" for row, msr in zip(self.routes_BL, self.msr, strict=True))
        return f"Routes({rows})"

    def __str__(self) -> str:
        return self.__rich__().plain

    def _repr_html_(self) -> str:
        """Draw the strips for notebooks; a pointer on a layer is told its number, route and the router's margin."""
        return notebook.frame(self.html(), notebook.legend())

    def html(self) -> str:
        """Draw a strip of layers for each sequence, and what they hide, for a frame of ``notebook``."""
        strips = []
        for index, (row, words) in enumerate(zip(self.routes_BL.tolist(), self._words(), strict=True)):
            titles = []
            for place, (unit, full) in enumerate(zip(self.layers, row, strict=True)):
                title = f"layer {unit_name(unit)}: {'full' if full else 'sparse'}"
                if (margin := self.margin(index, place)) is not None:
                    title += f", margin {margin:+.2f}"
                titles.append(title)
            strips.append(notebook.strip(row, titles, words))
        return "".join(strips) + (notebook.line(self.note) if self.note else "")

    def margin(self, row: int, place: int) -> float | None:
        """Return a router's output for full attention less that for sparse; None where no router ran."""
        if self.logits_BL2 is None:
            return None
        sparse, full = self.logits_BL2[row, place].tolist()
        return full - sparse

    def _words(self) -> list[str]:
        return [
            f"{sum(row)}/{len(row)} {self.kind} full  Ω_MSR {msr:.2f}  Ω_ESR {esr:.2f}"
            for row, msr, esr in zip(self.routes_BL.tolist(), self.msr, self.esr, strict=True)
        ]

    def __rich__(self) -> Text:
        """Draw a strip of layers for each sequence: █ full attention, ░ sparse; ``print`` draws it too, uncoloured."""
        text = Text()
        for index, (row, words) in enumerate(zip(self.routes_BL, self._words(), strict=True)):
            if index:
                text.append("\n")
            for full in row.tolist():
                text.append("█" if full else "░", style="bold red" if full else "cyan")
            text.append(f"  {words}")
        return text


def _strip(row_L: torch.Tensor) -> str:
    return "".join("F" if full else "S" for full in row_L.tolist())


def layer_of(unit: Unit) -> int:
    """Return the layer of what is decided on."""
    return unit if isinstance(unit, int) else unit[0]


def unit_name(unit: Unit) -> str:
    """Name what is decided on, for people: a layer ``3``, a KV head ``3.1``."""
    return str(unit) if isinstance(unit, int) else ".".join(map(str, unit))


# --- What is asked for ------------------------------------------------------------------------------------------------


def read_spec(text: str, separator: str = ",") -> RouteSpec:
    """
    Read a ``RouteSpec`` from text: ``full``, ``sparse``, a ratio such as 0.75, or layers such as 3,7.

    Raises
    ------
    ValueError
        If it is none of these.
    """
    if text in ("full", "sparse"):
        return text
    try:
        return float(text) if "." in text else [int(layer) for layer in text.split(separator)]
    except ValueError:
        raise ValueError(
            f"cannot force {text!r}; expected full, sparse, a ratio such as 0.75, or layers such as 3{separator}7"
        ) from None


def parse_routes(spec: RouteSpec, batch: int, layers: Sequence[Unit]) -> torch.Tensor:
    """
    Write out the routes that ``spec`` asks for.

    Parameters
    ----------
    spec : str, float, sequence of int, or torch.Tensor
        ``"full"`` or ``"sparse"`` for every layer; a ratio Ω_MSR in [0, 1] (the full layers are spread evenly
        over the depth); the model's indices of the layers that run full; or a tensor of (L,) or (B, L), nonzero
        = full.
    batch : int
        Sequences.
    layers : sequence of int
        The model's indices of the routed layers.

    Returns
    -------
    torch.Tensor
        bool ``routes_BL``.

    Raises
    ------
    ValueError
        For anything else, with what was expected.
    """
    count = len(layers)
    routes = torch.zeros(batch, count, dtype=torch.bool, device="cpu")
    if isinstance(spec, torch.Tensor):
        rows = {1: 1, 2: len(spec)}.get(spec.ndim, 0) if spec.shape[-1:] == (count,) else 0
        if rows == 0 or batch % rows:
            raise ValueError(
                f"forced routes have shape {tuple(spec.shape)}, expected ({count},) or ({batch}, {count}): "
                "(routed layers,) or (batch, routed layers)"
            )
        # generate() repeats each sequence for beams and num_return_sequences.
        return (spec.detach().cpu() != 0).view(rows, count).repeat_interleave(batch // rows, dim=0)
    if isinstance(spec, str):
        if spec not in ("full", "sparse"):
            raise ValueError(f"cannot force {spec!r}; expected 'full', 'sparse', a ratio, layer indices or a tensor")
        return routes.fill_(spec == "full")
    if isinstance(spec, (int, float)) and not isinstance(spec, bool):
        if not 0 <= spec <= 1:
            raise ValueError(f"cannot force the ratio {spec}; Ω_MSR, the share of sparse layers, is between 0 and 1")
        full = count - round(spec * count)
        routes[:, [int((index + 0.5) * count / full) for index in range(full)]] = True
        return routes
    if isinstance(spec, Sequence):
        if any(isinstance(layer, bool) for layer in spec) or len(set(spec)) < len(spec):
            raise ValueError(f"cannot force {spec!r}: a list names each full layer once; bits are forced by a tensor")
        unknown = [layer for layer in spec if layer not in layers]
        if unknown:
            raise ValueError(f"cannot force layers {unknown} to full attention; routed layers are {list(layers)}")
        routes[:, [list(layers).index(layer) for layer in spec]] = True
        return routes
    raise ValueError(f"cannot force {spec!r}; expected 'full', 'sparse', a ratio, layer indices or a tensor")
