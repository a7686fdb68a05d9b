"""What the playground shows, as HTML: the strip of layers, its legend, and a card for each way of answering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from html import escape

from flux_attention.hf.report import Report
from flux_attention.patterns import Pattern
from flux_attention.playground.player import LayerDecided

TITLES = {
    "dense": ("Dense", "every layer full"),
    "routed": ("Routed", "layers by the {source}"),
    "sparse": ("Sparse", "every layer sparse"),
}

#: Stands where layers and answers of the text and the question will be.
PRESS = '<p class="summary press">Press <b>Ask</b> to see which layers this text and question need.</p>'
#: New tokens from which their speed says something.
TIMED = 8


@dataclass(frozen=True)
class Card:
    """
    Holds what is known of one way of answering.

    Attributes
    ----------
    way : str
        One of ``TITLES``.
    state : str
        What is going on, in a word or two; empty when it is done.
    text : str
        The answer, as far as it has come.
    report : Report, optional
        When it is done.
    """

    way: str
    state: str = ""
    text: str = ""
    report: Report | None = None

    def changed(self, **changes) -> Card:
        """Return this card with something else on it."""
        return replace(self, **changes)

    def same(self, other: Card) -> bool:
        """Whether both answers read the same."""
        return self.text.strip() == other.text.strip()


def reach(pattern: Pattern) -> str:
    """Say in words what a sparse layer sees."""
    sizes = pattern.later.to_dict()
    return f"only the first {sizes['sink']:,} and the latest {sizes['window']:,}"


def planted(places: Mapping[str, int], named: tuple[str, ...], length: int, pattern: Pattern) -> str:
    """
    Say where an example's facts are, and whether sparse layers see them when they answer.

    Parameters
    ----------
    places : mapping of str to int
        The tokens before each fact.
    named : tuple of str
        Those that are asked for; the others are counted.
    length : int
        Of the text, in tokens.
    pattern : Pattern
        Of the sparse layers.
    """
    sizes = pattern.later.to_dict()
    hidden = sum(sizes["sink"] <= place < length - sizes["window"] for place in places.values())
    facts = ", ".join(f"<q>{escape(fact)}</q> (token {places[fact]:,})" for fact in named)
    which = {len(places): "All lie outside", 0: "None lies outside"}.get(hidden, f"{hidden} of them lie outside")
    return (
        f'<p class="small">Planted in this text of {length:,} tokens: {facts} and {len(places) - len(named)} more. '
        f"{which} the first {sizes['sink']:,} and latest {sizes['window']:,} tokens, which is all that a sparse layer "
        "sees.</p>"
    )


def legend(pattern: Pattern) -> str:
    """Explain the strip's colours and bars."""
    entries = {
        "full": "<b>full</b>: a token sees all tokens before it",
        "sparse": f"<b>sparse</b>: it sees {reach(pattern)}",
        "of-routers": "<b>margin</b>: the router's score of full minus that of sparse; above the line it runs full",
        "pinned": "<b>forced</b>, by you: click a layer to turn it, again to let it go",
    }
    lines = "".join(
        f'<li class="{name}"><i class="swatch {name}"></i><span>{says}</span></li>' for name, says in entries.items()
    )
    return f'<ul class="legend">{lines}</ul>'


def strip(
    layers: tuple[int, ...],
    decided: Mapping[int, LayerDecided],
    pins: Mapping[int, bool],
    is_reading: bool = False,
) -> str:
    """
    Draw a button for each layer: its margin, what it sees, its number.

    Parameters
    ----------
    layers : tuple of int
        The routed layers' indices.
    decided : mapping of int to LayerDecided
        What is known of them.
    pins : mapping of int to bool
        Layers that the visitor forces.
    is_reading : bool
        Whether the prompt is being read, so that the latest layer in ``decided`` is at work.
    """
    margins = [abs(one.margin) for one in decided.values() if one.margin is not None]
    scale, latest = max([1.0, *margins]), next(reversed(decided), None) if is_reading else None
    buttons = [_layer(layer, decided.get(layer), pins.get(layer), scale, layer == latest) for layer in layers]
    columns = ";".join(f"--{name}:{_columns(len(layers), most)}" for name, most in (("wide", 16), ("narrow", 6)))
    return f'<div class="strip" role="group" aria-label="layers" style="{columns}">{"".join(buttons)}</div>'


def _columns(count: int, most: int) -> int:
    """Return columns for ``count`` things in rows that are about equally long."""
    rows = -(-count // most)
    return -(-count // rows)


def _layer(layer: int, decided: LayerDecided | None, pin: bool | None, scale: float, is_latest: bool) -> str:
    is_full = pin if pin is not None else decided and decided.is_full
    route = "undecided" if is_full is None else "full" if is_full else "sparse"
    margin = decided.margin if decided else None
    says = f"layer {layer}: {route}"
    number = bar = ""
    if margin is not None:
        number = (f"{margin:+.1f}" if abs(margin) < 10 else f"{margin:+.0f}").replace("-", "\N{MINUS SIGN}")
        says += f", margin {number}"
        side, colour = ("bottom", "full") if margin > 0 else ("top", "sparse")
        bar = f'<i class="{colour}" style="{side}:50%;height:{max(4, 50 * abs(margin) / scale):.0f}%"></i>'
    if pin is not None:
        says += ", forced by you; click to let it go"
    else:
        says += f"; click to force it {'sparse' if is_full else 'full'}"
    classes = f"layer {route}{' pinned' if pin is not None else ''}{' latest' if is_latest else ''}"
    return (
        f'<button type="button" class="{classes}" data-layer="{layer}" aria-label="{says}" title="{says}" '
        f'aria-pressed="{"false" if pin is None else "true"}"><span class="number">{number}</span>'
        f'<span class="margin">{bar}</span><span class="cell"></span><span class="index">{layer}</span></button>'
    )


def summary(card: Card, dense: Card, pins: Mapping[int, bool], answer: str) -> str:
    """Say in a sentence or two what routing did to this prompt; ``answer`` is the right one, if it is known."""
    report = card.report
    if report is None:
        return '<p class="summary"></p>'
    count, full = len(report.routes.layers), int(report.routes.routes_BL.sum())
    text = f"<b>{full} of {count} layers ran full</b> for this prompt of {report.routes.lengths[0]:,} tokens"
    if pins:
        text += f" ({len(pins)} forced by you)"
    text += f"; the KV cache keeps {100 * report.kv_bytes / report.baseline_kv_bytes:.0f} % of what dense keeps"
    if dense.report is not None:
        text += f"; the answer is {'the same as' if card.same(dense) else 'not that of'} dense"
    text += f". The text says: <b>{escape(answer)}</b>." if answer else "."
    if report.routes.note:
        text += f" But {escape(report.routes.note)}."
    return f'<p class="summary">{text}</p>'


def times(has_page: bool) -> str:
    """Say what to expect of the cards' times, as docs/performance.md has it, which may have a page."""
    pays = '<a href="/performance">pay</a>' if has_page else "pay"
    return (
        "<p>At a few thousand tokens the three times hardly differ; the KV cache does. In time sparse layers "
        f"{pays} from 8,000 tokens on a GPU, and by 16,000 on a CPU.</p>"
    )


def cards(shown: Mapping[str, Card], source: str) -> str:
    """Draw the ways' cards beside each other; ``source`` is what routes depend on, in a word."""
    return '<div class="ways">' + "".join(_card(shown[way], shown["dense"], source) for way in TITLES) + "</div>"


def _card(card: Card, dense: Card, source: str) -> str:
    title, says = TITLES[card.way]
    says = says.format(source=source)
    state = f'<span class="state">{escape(card.state)}</span>' if card.state else ""
    if card.report is not None and card.way != "dense" and dense.report is not None:
        kind = "same" if card.same(dense) else "another"
        state = f'<span class="state {kind}">{kind} answer</span>'
    answer = escape(card.text.strip()) or "&nbsp;"
    return (
        f'<section class="way" data-way="{card.way}" aria-label="{title}"><header><h3>{title}</h3><small>{says}</small>'
        f'{state}</header><pre class="answer" tabindex="0" aria-label="answer">{answer}</pre>{_facts(card.report)}'
        "</section>"
    )


def _facts(report: Report | None) -> str:
    held = prompt = speed = "–"
    of_dense, share = "", 0.0
    if report is not None:
        held = f"{report.kv_bytes / 2**20:.1f} MiB"
        share = 100 * report.kv_bytes / report.baseline_kv_bytes
        of_dense = f"{share:.0f} % of dense"
        prompt = f"{report.prefill_s:.2f} s"
        few = not report.token_s or report.new_tokens < TIMED
        speed = "too few tokens to time" if few else f"{1 / report.token_s:.0f} tokens/s"
    return (
        f"<dl><div><dt>KV cache</dt><dd>{held} <small>{of_dense}</small></dd></div>"
        f'<div class="meter" aria-hidden="true"><i style="width:{share:.1f}%"></i></div>'
        f"<div><dt>reading the prompt</dt><dd>{prompt}</dd></div><div><dt>then</dt><dd>{speed}</dd></div></dl>"
    )


def message(text: str) -> str:
    """Draw what went wrong, and what to do."""
    return f'<p class="problem" role="alert">{escape(text)}</p>' if text else ""
