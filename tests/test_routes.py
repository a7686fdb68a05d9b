import io

import pytest
import torch
from rich.console import Console

from flux_attention.decision import parse_routes
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


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("full", [1, 1, 1, 1]),
        ("sparse", [0, 0, 0, 0]),
        (0.0, [1, 1, 1, 1]),
        (1, [0, 0, 0, 0]),
        (0.75, [0, 0, 1, 0]),
        (0.5, [0, 1, 0, 1]),
        ([2, 6], [0, 1, 0, 1]),
        ([], [0, 0, 0, 0]),
        (torch.tensor([1, 0, 0, 1]), [1, 0, 0, 1]),
    ],
)
def test_forcing(spec, expected):
    assert parse_routes(spec, 2, LAYERS).long().tolist() == [expected] * 2


def test_forcing_each_sequence_and_its_beams():
    bits = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 1]])
    assert torch.equal(parse_routes(bits, 2, LAYERS).long(), bits)
    assert torch.equal(parse_routes(bits, 6, LAYERS).long(), bits.repeat_interleave(3, 0))


@pytest.mark.parametrize("spec", ["dense", 1.5, -0.1, [1], [99], torch.ones(3), torch.ones(3, 4), None, True, {}])
def test_wrong_requests_are_refused(spec):
    with pytest.raises(ValueError, match="force"):
        parse_routes(spec, 2, LAYERS)


@pytest.mark.parametrize("count", range(1, 41))
def test_a_ratio_gives_that_many_distinct_layers(count):
    for sparse in range(count + 1):
        routes = parse_routes(sparse / count, 1, range(count))
        assert int((~routes).sum()) == sparse
