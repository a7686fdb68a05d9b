"""Draws the figures of docs/how-it-works.md: what layers see, how a route is decided, and why layers and not heads.

Run by ``python benchmarks/show_pages.py``. Drawn by the definitions, not measured; each for light and dark pages, on a
ground of its own.
"""

from show_idea import THEMES, rectangle, text
from show_tables import IMAGES

from flux_attention.evaluation.pages import SPARSE

SINK = {"light": "#3d7ab8", "dark": "#6fa8dc"}
BOLD = ' font-weight="600"'

# Figure 1: few tokens, so that each pair is a cell.
TOKENS, SINK_TOKENS, WINDOW_TOKENS, LAST_ROWS, CELL = 20, 3, 6, 4, 12


def seen(pattern, query, key):
    """Say as what a query sees a key: by full attention, as sink, in the window; None if it does not."""
    if key > query:
        return None
    if pattern == "full" or (pattern == "triangle" and query >= TOKENS - LAST_ROWS):
        return "full"
    if query - key < WINDOW_TOKENS:
        return "window"
    return "sink" if key < SINK_TOKENS else None


def pairs(pattern):
    return sum(seen(pattern, query, key) is not None for query in range(TOKENS) for key in range(TOKENS))


def kept(pattern, key):
    """Say as what a key stays in the KV cache, for tokens behind the prompt."""
    if pattern == "full":
        return "full"
    if key < SINK_TOKENS:
        return "sink"
    return "window" if key >= TOKENS - WINDOW_TOKENS else None


def cell(x, y, kind, ink, size=CELL, height=None):
    fill = ink[kind] if kind else ink["box"]
    return rectangle(x, y, size - 1, (height or size) - 1, fill, "none" if kind else ink["edge"], 1)


def patterns(ink):
    """Draw three masks, each with what it leaves in the KV cache."""
    yield text(16, 30, "which earlier tokens a token sees, in a prompt of 20", ink["ink"], 14, more=BOLD)
    names = {
        "full": ("full layer", "all tokens before it"),
        "streaming": ("sparse layer: streaming", "sink and window"),
        "triangle": ("sparse layer: triangle", "the last rows see everything"),
    }
    for place, (pattern, (name, says)) in enumerate(names.items()):
        left, top = 46 + place * 276, 88
        yield text(left, 62, name, ink["ink"], 13, more=BOLD)
        yield text(left, 79, says, ink["faint"], 12)
        for query in range(TOKENS):
            for key in range(query + 1):
                yield cell(left + key * CELL, top + query * CELL, seen(pattern, query, key), ink)
        y = top + TOKENS * CELL + 14
        for key in range(TOKENS):
            yield cell(left + key * CELL, y, kept(pattern, key), ink, height=16)
        count = sum(kept(pattern, key) is not None for key in range(TOKENS))
        # Short: fonts that a reader lacks are replaced by wider ones.
        yield text(left, y + 34, f"{pairs(pattern)} of {pairs('full')} pairs, {count} tokens kept", ink["ink"])
    middle = 88 + TOKENS * CELL / 2
    turned = f' transform="rotate(-90 32 {middle:g})"'
    yield text(32, middle, "prompt, top to bottom", ink["faint"], 12, "middle", turned)
    y = 88 + TOKENS * CELL + 26
    yield text(40, y, "kept", ink["faint"], 12, "end")
    x = 46
    for kind, says in (("full", "full"), ("sink", "sink: the first 3"), ("window", "window: the latest 6")):
        yield rectangle(x, 402, 14, 14, ink[kind])
        yield text(x + 20, 414, says, ink["ink"])
        x += 40 + 8 * len(says)
    yield text(x, 414, "real sizes: sink 128, window 1,024", ink["faint"], 12)


# Figure 2.
ROUTES = (0, 0, 1, 0, 1, 0)


def arrow(x, y, ink):
    return f'<path d="M{x} {y}h18m-6 -5l6 5l-6 5" fill="none" stroke="{ink["faint"]}" stroke-width="1.5"/>'


def small_mask(x, y, is_full, ink, side=32):
    """Draw a mask's outline: the triangle of pairs, and of it what is seen."""
    fill = ink["full"] if is_full else ink["box"]
    yield f'<path d="M{x} {y}v{side}h{side}z" fill="{fill}" stroke="{ink["edge"]}"/>'
    if not is_full:
        yield f'<path d="M{x} {y}v{side}h5v-{side - 5}z" fill="{ink["sink"]}"/>'
        yield f'<path d="M{x} {y}v9l{side - 9} {side - 9}h9z" fill="{ink["window"]}"/>'


def routes(ink):
    """Draw the way of one prompt through six layers."""
    columns = (
        (76, "the prompt’s ends,", "as the layer’s queries"),
        (306, "router", "a small MLP: one bit"),
        (448, "prefill", "the layer attends"),
        (594, "KV cache", "what each new token will read"),
    )
    for x, title, says in columns:
        yield text(x, 30, title, ink["ink"], 14, more=BOLD)
        yield text(x, 47, says, ink["faint"], 12)
    for layer, route in enumerate(ROUTES):
        y = 64 + layer * 42
        yield text(16, y + 21, f"layer {layer}", ink["ink"])
        for token in range(24):
            is_end = token < 4 or token >= 20
            fill = ink["faint"] if is_end else ink["box"]
            yield rectangle(76 + token * 8, y + 8, 7, 16, fill, "none" if is_end else ink["edge"], 1)
        yield arrow(276, y + 16, ink)
        name = "full" if route else "sparse"
        yield rectangle(306, y + 2, 92, 28, ink["box"], ink["full"] if route else ink["window"], 14)
        yield text(352, y + 21, f"{route} · {name}", ink["ink"], 13, "middle", BOLD if route else "")
        yield arrow(412, y + 16, ink)
        yield from small_mask(448, y, route, ink)
        yield arrow(552, y + 16, ink)
        yield rectangle(594, y + 8, 240, 16, ink["full"] if route else ink["ground"], ink["edge"], 2)
        if not route:
            yield rectangle(594, y + 8, 12, 16, ink["sink"], radius=2)
            yield rectangle(606, y + 8, 32, 16, ink["window"], radius=2)
            yield text(648, y + 21, "sink + window, at any length", ink["faint"], 12)
    says = "Decided once, by the prompt, and fixed as long as the KV cache lives: 2 of 6 layers full, Ω_MSR 0.67."
    yield text(16, 64 + len(ROUTES) * 42 + 18, says, ink["ink"])


# Figure 3: how long each head of each layer takes, in pixels; the same number of sparse heads both ways.
LONG, SHORT, HEAD = 190, 40, 13
BY_HEAD = [[LONG if head == layer else SHORT for head in range(4)] for layer in range(4)]
BY_LAYER = [[SHORT] * 4, [LONG] * 4, [SHORT] * 4, [SHORT] * 4]


def lanes(top, lengths, ink):
    """Draw layers one after the other, each as long as its slowest head; return the end."""
    x, parts = 40, []
    for layer, heads in enumerate(lengths):
        longest = max(heads)
        parts.append(
            text(
                x + longest / 2,
                top - 6,
                f"layer {layer}" if longest > SHORT else str(layer),
                ink["faint"],
                11,
                "middle",
            )
        )
        for head, length in enumerate(heads):
            y = top + head * (HEAD + 3)
            if length < longest:
                more = f' stroke="{ink["faint"]}" stroke-dasharray="3 3"'
                parts.append(f'<rect x="{x}" y="{y}" width="{longest - 1}" height="{HEAD}" fill="none"{more}/>')
            fill = ink["full"] if length == LONG else ink["window"]
            parts.append(rectangle(x, y, length - 1, HEAD, fill, radius=1))
        x += longest + 6
    return x - 6, parts


def layers(ink):
    """Draw the same number of sparse heads, spread over all layers or in whole layers."""
    for top, title, lengths in ((72, "by head", BY_HEAD), (206, "by layer", BY_LAYER)):
        says = "12 of 16 heads sparse, a row each: the same bytes in the KV cache"
        yield text(16, top - 32, title, ink["ink"], 14, more=BOLD)
        yield text(16 + 9 * len(title), top - 32, says, ink["faint"], 12)
        end, parts = lanes(top, lengths, ink)
        yield from parts
        yield f'<path d="M{end} {top - 4}v72" stroke="{ink["ink"]}" stroke-width="1.5"/>'
        yield text(end + (-8 if end > 600 else 8), top + 78, "done", ink["ink"], 12, "end" if end > 600 else "start")
    yield text(40, 300, "time →", ink["faint"], 12)
    x = 40
    for kind, says in (("full", "a head that reads all"), ("window", "a head that reads sink + window")):
        yield rectangle(x, 316, 14, 14, ink[kind])
        yield text(x + 20, 328, says, ink["ink"])
        x += 40 + 7 * len(says)
    yield f'<rect x="{x}" y="316" width="14" height="14" fill="none" stroke="{ink["faint"]}" stroke-dasharray="3 3"/>'
    yield text(x + 20, 328, "waits for the layer’s slowest head", ink["ink"])


#: Name: (what draws it, its title for those who do not see it, height).
FIGURES = {
    "patterns": (
        patterns,
        "Three masks: full layers see all earlier tokens, sparse ones sink and window, triangle's last rows all.",
        434,
    ),
    "routes": (
        routes,
        "In each layer a router reads the prompt's ends and decides: all tokens, or sink and window, in the cache too.",
        346,
    ),
    "layers": (
        layers,
        "With full heads spread over all layers each layer waits for its slowest head; whole sparse layers end early.",
        346,
    ),
}
WIDTH = 860


def draw(name, theme):
    """Return one figure as SVG text."""
    figure, title, height = FIGURES[name]
    ink = {**THEMES[theme], "window": SPARSE[theme], "sink": SINK[theme]}
    ground = rectangle(0.5, 0.5, WIDTH - 1, height - 1, ink["ground"], ink["edge"], 8)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        f' role="img" font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n<title>{title}</title>\n'
        + "\n".join([ground, *figure(ink)])
        + "\n</svg>\n"
    )


def drawings():
    """Return {name of the file in docs/images: SVG text}."""
    return {f"how_{name}_{theme}.svg": draw(name, theme) for name in FIGURES for theme in THEMES}


def images():
    """Write all figures."""
    for name, drawn in drawings().items():
        (IMAGES / name).write_text(drawn, encoding="utf-8")
