"""Holds the templates of pages, and how they write numbers."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader

#: What full and sparse layers are drawn in everywhere, on light and dark ground.
FULL, SPARSE = {"light": "#d1480d", "dark": "#f47d43"}, {"light": "#9ec5ea", "dark": "#2f5f8f"}


def in_units(value: float, unit: str) -> str:
    """Write a number with three digits and its power of ten: 1.23 TFLOP."""
    power = next((place for place in (12, 9, 6, 3) if value >= 10**place), 0)
    prefix = {12: "T", 9: "G", 6: "M", 3: "k", 0: ""}[power]
    number = value / 10**power
    return f"{number:.0f} {prefix}{unit}" if number >= 100 or power == 0 else f"{number:.3g} {prefix}{unit}"


def in_bytes(count: int) -> str:
    """Write bytes as reports do: 1.2 MiB."""
    power, unit = (30, "GiB") if count >= 2**30 else (20, "MiB") if count >= 2**20 else (10, "KiB")
    return f"{count / 2**power:.1f} {unit}"


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=lambda name: ".html" in name,
    trim_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.globals |= {"colours": {"full": FULL, "sparse": SPARSE}}
TEMPLATES.filters |= {"in_bytes": in_bytes, "in_units": in_units}
