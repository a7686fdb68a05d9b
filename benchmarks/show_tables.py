"""Reads result files, writes markdown tables and generated pages, for all show scripts."""

import json
import re
import textwrap
from pathlib import Path

from flux_attention.evaluation.figures import svg

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
IMAGES = ROOT / "docs/images"
LABELS = {"qwen3-8b": "Qwen3-8B", "llama-3.1-8b": "Llama-3.1-8B"}
#: Plots have a ground of their own, light or dark as the reader's system is, so that they suit either kind of page.
PAPER = """<style>
svg { color: #1f2328; --ground: #ffffff; }
@media (prefers-color-scheme: dark) { svg { color: #f0f6fc; --ground: #0d1117; } }
</style>
<rect width="100%" height="100%" fill="var(--ground)"/>
"""


def load(name):
    """Read the result file of that name; an empty one where nothing was measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"meta": {}, "rows": []}


def table(columns, lines):
    """Write a markdown table; nothing where there are no lines."""
    if not lines:
        return ""
    cells = [columns, ["---"] * len(columns), *lines]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in cells)


def prose(part):
    """Wrap a part of a page, if it is no table, heading or image."""
    if part.startswith(("|", "#", "!")):
        return part.strip("\n")
    return textwrap.fill(" ".join(part.split()), 110, break_long_words=False, break_on_hyphens=False)


def page(name, title, *parts):
    """Make a page beside ``results/NAME.json``: title, where it comes from, and its parts."""
    meta = load(name)["meta"]
    versions = ", ".join(
        f"{package} {meta[package]}" for package in ("torch", "triton", "transformers") if meta[package]
    )
    source = f"""
    From [{name}.json]({name}.json): {meta["device"]}, {versions}, commit {meta["commit"][:7]}, {meta["date"]}.
    Written by `python benchmarks/show_pages.py`; do not edit. Words are in the [glossary](../../docs/glossary.md),
    all result files in the [list](README.md).
    """
    return "\n\n".join([f"# {title}", *(prose(part) for part in (source, *parts) if part)]) + "\n"


def save(figure, name):
    """Write a plot to docs/images."""
    start, end, rest = svg(figure).partition(">\n")
    (IMAGES / f"{name}.svg").write_text(start + end + PAPER + rest, encoding="utf-8")


def filled(text, parts):
    """Return a page's text with each part between ``<!-- NAME -->`` and ``<!-- end -->`` written anew."""
    for name, part in parts.items():
        pattern = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda match, part=part: match[1] + part + match[2], text, flags=re.S)
        if found != 1:
            raise ValueError(f"the page has {found} places for {name!r}, expected one: <!-- {name} --> … <!-- end -->")
    return text


def label(tokens):
    """Write a length short: 4 K of 4,096."""
    return f"{tokens // 1024} K"


def row_of(name, **facts):
    """Find the first row of a result file that has these facts."""
    return next(row for row in load(name)["rows"] if facts.items() <= row.items())
