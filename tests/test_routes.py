"""What was decided: its ratios, and how it prints."""

import io

import pytest
import torch
from rich.console import Console

from flux_attention.patterns import Full, Streaming
from flux_attention.routes import Routes

LAYERS = (0, 2, 4, 6)


def test_ratios_and_rendering():
    pattern = Streaming(4, 16)
    bits = torch.tensor([[True, False, False, False], [True, True, True, True]])
    routes = Routes(bits, None, LAYERS, (100, 10), pattern, Full())
    assert routes.msr == [0.75, 0.0]
    assert routes.esr == pytest.approx([0.75 * (1 - pattern.pairs(100) / Full().pairs(100)), 0.0])
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(routes)
    assert console.export_text().splitlines()[0].startswith("█░░░  1/4 layers full  Ω_MSR 0.75")
    as_dict = routes.to_dict()
    assert as_dict["sequences"][0]["routes"] == "FSSS" and as_dict["sequences"][0]["full_layers"] == [0]
    assert repr(routes) == "Routes(FSSS Ω=0.75, FFFF Ω=0.00)"


def test_short_prompts_save_nothing():
    assert Routes(torch.zeros(1, 4, dtype=torch.bool), None, LAYERS, (20,), Streaming(4, 16), Full()).esr == [0.0]
