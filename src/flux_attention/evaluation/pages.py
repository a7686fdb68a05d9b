"""Holds the templates of pages, and how they write numbers."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from flux_attention.hf.report import in_bytes
from flux_attention.notebook import DARK, LIGHT

#: What full and sparse layers are drawn in everywhere, on light and dark ground.
FULL, SPARSE = ({"light": light, "dark": dark} for light, dark in zip(LIGHT, DARK, strict=True))


def in_units(value: float, unit: str) -> str:
    """Write a number with three digits and its power of ten: 1.23 TFLOP."""
    power = next((place for place in (12, 9, 6, 3) if value >= 10**place), 0)
    prefix = {12: "T", 9: "G", 6: "M", 3: "k", 0: ""}[power]
    number = value / 10**power
    return f"{number:.0f} {prefix}{unit}" if number >= 100 or power == 0 else f"{number:.3g} {prefix}{unit}"


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=lambda name: ".html" in name,
    trim_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.globals |= {"colours": {"full": FULL, "sparse": SPARSE}}
TEMPLATES.filters |= {"in_bytes": in_bytes, "in_units": in_units}
