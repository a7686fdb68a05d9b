"""Draws README's picture: two prompts, the layers that each needs, and the KV cache that each keeps.

Run by ``python benchmarks/show_pages.py``, from benchmarks/results/two_prompts.json, which ``two_prompts.py``
writes. Two drawings, for light and dark pages, each on a ground of its own.
"""

from html import escape

from show_tables import IMAGES, load

from flux_attention.evaluation.pages import FULL, SPARSE

THEMES = {
    "light": dict(ground="#ffffff", edge="#d0d7de", ink="#1f2328", faint="#59636e", box="#f6f8fa", full=FULL["light"]),
    "dark": dict(ground="#0d1117", edge="#3d444d", ink="#f0f6fc", faint="#9198a1", box="#151b23", full=FULL["dark"]),
}
WIDTH, HEIGHT, ROW, CELL, BAR = 860, 292, 108, 24, 150
STRIP_LEFT, BAR_LEFT = 352, 652


def text(x, y, content, colour, size=13, anchor="start", more=""):
    place = f'x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}"{more}>{escape(content)}</text>'


def rectangle(x, y, width, height, fill, edge="none", radius=3):
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" fill="{fill}" stroke="{edge}"/>'
    )


def prompt_box(row, top, ink):
    """Draw the prompt's end, as it was given."""
    mono = ' font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"'
    yield rectangle(16, top, 304, 76, ink["box"], ink["edge"], 6)
    yield text(28, top + 20, f"{row['seq_len']:,} tokens of source code …", ink["faint"], 12, more=mono)
    if row["question"]:
        yield text(28, top + 42, f"# Question: {row['question']}", ink["ink"], 12, more=mono)
        yield text(28, top + 60, "# Answer:", ink["ink"], 12, more=mono)
    else:
        yield text(28, top + 42, "(no question: continue it)", ink["ink"], 12, more=mono)
    yield f'<path d="M326 {top + 38}h16m-6 -5l6 5l-6 5" fill="none" stroke="{ink["faint"]}" stroke-width="1.5"/>'


def layers(row, top, ink, sparse):
    """Draw a cell for each layer: full ones whole, sparse ones the first tokens and the window of the latest."""
    for place, layer in enumerate(row["layers"]):
        x, y = STRIP_LEFT + place * (CELL + 3), top + 16
        if layer in row["full_layers"]:
            yield rectangle(x, y, CELL, 44, ink["full"])
        else:
            yield rectangle(x, y, CELL, 44, ink["box"], ink["edge"])
            yield rectangle(x + 0.5, y + 0.5, CELL - 1, 4, sparse, radius=1)
            yield rectangle(x + 0.5, y + 34, CELL - 1, 9.5, sparse, radius=1)
        yield text(x + CELL / 2, y + 58, str(layer), ink["faint"], 11, "middle")


def cache_bar(row, top, ink):
    """Draw the bytes that are kept, of those that all layers in full would keep."""
    held, dense = row["kv_bytes"], row["baseline_kv_bytes"]
    yield rectangle(BAR_LEFT, top + 24, BAR, 26, ink["box"], ink["edge"])
    yield rectangle(BAR_LEFT, top + 24, BAR * held / dense, 26, ink["full"])
    yield text(BAR_LEFT + BAR + 10, top + 42, f"{held / dense:.0%}", ink["ink"], 15, more=' font-weight="600"')
    yield text(BAR_LEFT, top + 68, f"{held / 1e6:.1f} MB of {dense / 1e6:.1f}", ink["faint"], 12)


def draw(theme):
    """Return the drawing as SVG text."""
    rows, ink, sparse = load("two_prompts")["rows"], THEMES[theme], SPARSE[theme]
    bold = ' font-weight="600"'
    parts = [rectangle(0.5, 0.5, WIDTH - 1, HEIGHT - 1, ink["ground"], ink["edge"], 8)]
    for x, title in ((16, "the same text, two prompts"), (STRIP_LEFT, "layers"), (BAR_LEFT, "KV cache, of dense")):
        parts.append(text(x, 30, title, ink["ink"], 14, more=bold))
    for number, row in enumerate(rows):
        top = 48 + number * ROW
        parts += [*prompt_box(row, top, ink), *layers(row, top, ink, sparse), *cache_bar(row, top, ink)]
    y = HEIGHT - 22
    parts += [
        rectangle(STRIP_LEFT, y - 11, 14, 14, ink["full"]),
        text(STRIP_LEFT + 20, y, "full: all tokens", ink["ink"]),
    ]
    x = STRIP_LEFT + 140
    parts += [
        rectangle(x, y - 11, 14, 14, ink["box"], ink["edge"]),
        rectangle(x + 0.5, y - 10.5, 13, 2, sparse, radius=0),
        rectangle(x + 0.5, y - 2, 13, 4.5, sparse, radius=0),
        text(x + 20, y, "sparse: the first 64 and latest 704 tokens", ink["ink"]),
    ]
    full = [len(row["full_layers"]) for row in rows]
    title = (
        f"Two prompts with the same text: {full[0]} of {len(rows[0]['layers'])} layers read all tokens, or {full[1]}."
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        f' role="img" font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n<title>{title}</title>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def images():
    """Write both drawings."""
    for theme in THEMES:
        (IMAGES / f"idea_{theme}.svg").write_text(draw(theme), encoding="utf-8")
