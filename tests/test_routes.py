"""What was decided: its ratios, and how it prints."""

import io

import pytest
import torch
from rich.console import Console

from flux_attention.patterns import Full, Streaming, Triangle
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
    drawn = console.export_text().splitlines()
    assert drawn[0].startswith("█░░░  1/4 layers full  Ω_MSR 0.75") and str(routes).splitlines() == drawn
    as_dict = routes.to_dict()
    assert as_dict["sequences"][0]["routes"] == "FSSS" and as_dict["sequences"][0]["full_layers"] == [0]
    assert repr(routes) == "Routes(FSSS Ω=0.75, FFFF Ω=0.00)"


@pytest.mark.parametrize("pattern", [Streaming(4, 16), Triangle(4, 16, 8)], ids=lambda pattern: pattern.name)
def test_short_prompts_save_nothing_and_say_so(pattern):
    bits = torch.tensor([[False] * 4, [True] * 4, [False] * 4])
    for length in (1, 19, 20, 21, 60):
        computes_all = torch.equal(pattern.mask(length), Full().mask(length))
        for count in (1, 3):
            routes = Routes(bits[:count], None, LAYERS, (length, 5, 300)[:count], pattern, Full())
            assert (routes.esr[0] == 0) == computes_all
            assert (routes.note is not None) == (length <= 20)
            if routes.note:
                assert f"sink + window = 20 tokens, and a prompt of {length}" in routes.note and routes.esr[0] == 0
                assert ("in the prompt" if count == 1 else "in 1 of 3 prompts") in routes.note
    assert Routes(bits[1:2], None, LAYERS, (5,), pattern, Full()).note is None  # it says itself that none is sparse
