"""Each source of routes on its own, without a model; and what may be forced."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_attention import UnsupportedModelError
from flux_attention.decision import Forced, Routed, Soft, Static
from flux_attention.router import LayerRouter, Pooling
from flux_attention.routes import parse_routes, read_spec

LAYERS = (0, 2, 4, 6)
HEADS = ((1, 0), (1, 1), (5, 0))
UNITS = pytest.mark.parametrize("units", [LAYERS, HEADS], ids=["layers", "heads"])
DIM, POOL = 8, 5
#: Tokens of each prompt: longer than both ends together, shorter than one, between.
LENGTHS = [30, 3, 7]


def undecided(units):
    """Routers that are not sure of themselves, so that inputs tell."""
    torch.manual_seed(0)
    routers = {unit: LayerRouter(DIM) for unit in units}
    for router in routers.values():
        torch.nn.init.normal_(router.head[-1].weight, std=3)
        torch.nn.init.zeros_(router.head[-1].bias)
    return routers


def queries(units, seed=0, lengths=LENGTHS):
    """Query states of each unit, the rows left-aligned."""
    generator = torch.Generator().manual_seed(seed)
    return {unit: 3 * torch.randn(len(lengths), max(lengths), 2, DIM, generator=generator) for unit in units}


def expected_logits(routers, states, lengths=LENGTHS):
    """What the routers say (B, U, 2), with the pooling written out row by row."""
    rows = []
    for row, length in enumerate(lengths):
        size = min(POOL, length)
        ends = [*range(size), *range(length - size, length)]
        rows.append(torch.stack([router(states[unit][row, ends].mean((0, 1))) for unit, router in routers.items()]))
    return torch.stack(rows)


def decide(decision, states):
    """Show a decision every unit's queries, and ask it for their routes (B, U), in the order of a forward pass."""
    found = []
    for unit, query in states.items():
        decision.observe(unit, query)
        found.append(decision.routes(unit))
    return torch.tensor(found).T


@UNITS
def test_forced_routes_are_those_given(units):
    routes = torch.arange(2 * len(units)).view(2, -1) % 3 == 0
    decision = Forced(units, routes)
    assert not decision.reads_queries
    assert [decision.routes(unit) for unit in units] == routes.T.tolist()
    assert all(decision.gate(unit) is None for unit in units)
    decided = decision.finish()
    assert torch.equal(decided.routes_BU, routes) and decided.logits_BU2 is None and decided.gates_BU is None
    with pytest.raises(RuntimeError, match="Forced reads no query states"):
        decision.observe(units[0], torch.zeros(2, 1, 1, DIM))


@UNITS
def test_a_static_set_is_full_for_every_sequence(units):
    decision = Static(units, units[1:2], [False] * 3)
    assert [decision.routes(unit) for unit in units] == [[unit == units[1]] * 3 for unit in units]
    assert decision.finish().routes_BU.tolist() == [[unit == units[1] for unit in units]] * 3
    assert Static(units, (), [False]).finish().routes_BU.tolist() == [[False] * len(units)]


@UNITS
def test_routers_decide_by_the_prompts_ends(units):
    routers, states = undecided(units), queries(units)
    decision = Routed(units, routers, Pooling(LENGTHS, POOL), [False] * 3)
    assert decision.reads_queries
    routes = decide(decision, states)
    logits = expected_logits(routers, states)
    assert torch.equal(routes, logits[..., 1] > logits[..., 0])
    assert 0 < routes.sum() < routes.numel()
    decided = decision.finish()
    torch.testing.assert_close(decided.logits_BU2, logits.detach(), atol=1e-5, rtol=1e-5)
    assert torch.equal(decided.routes_BU, routes) and decided.gates_BU is None
    assert not decided.logits_BU2.requires_grad and decision.gate(units[0]) is None


def test_short_prompts_run_full_whatever_their_routers_say():
    routers, states = undecided(LAYERS), queries(LAYERS)
    decision = Routed(LAYERS, routers, Pooling(LENGTHS, POOL), [False, True, False])
    routes, logits = decide(decision, states), expected_logits(routers, states)
    said = logits[..., 1] > logits[..., 0]
    assert routes[1].all() and not said[1].all()
    assert torch.equal(routes[[0, 2]], said[[0, 2]])
    decided = decision.finish()
    assert torch.equal(decided.routes_BU, routes)
    torch.testing.assert_close(decided.logits_BU2, logits.detach(), atol=1e-5, rtol=1e-5)  # they are still told


@pytest.mark.parametrize("asked", [False, True], ids=["at once", "after its routes"])
@pytest.mark.parametrize("kind", [Routed, Soft])
def test_a_query_that_is_computed_twice_is_refused(kind, asked):
    decision = kind(LAYERS, undecided(LAYERS), Pooling(LENGTHS, POOL), [False] * 3 if kind is Routed else 1.0)
    query = queries(LAYERS)[2]
    decision.observe(2, query)
    if asked:
        decision.routes(2)
    with pytest.raises(UnsupportedModelError, match="layer 2 computes its query twice"):
        decision.observe(2, query)


def test_a_query_that_never_came_is_named():
    decision = Routed(HEADS, undecided(HEADS), Pooling(LENGTHS, POOL), [False] * 3)
    with pytest.raises(UnsupportedModelError, match=r"layer 5\.0 did not show its query states"):
        decision.routes((5, 0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_queries_that_are_not_finite_are_named(value):
    decision = Routed(LAYERS, undecided(LAYERS), Pooling(LENGTHS, POOL), [False] * 3)
    query = queries(LAYERS)[4]
    query[0, 15], query[1, 2] = value, value  # the first lies between the ends that are read
    decision.observe(4, query)
    with pytest.raises(ValueError, match=r"router of layer 4 read NaN or infinite query states in sequences \[1\]"):
        decision.routes(4)


@UNITS
def test_soft_gates_are_a_sample_with_the_soft_gradient(units):
    routers, states = undecided(units), queries(units)
    noise = -torch.empty(len(LENGTHS), len(units), 2).exponential_().log()
    decision = Soft(units, routers, Pooling(LENGTHS, POOL), 2.0, noise)
    routes = decide(decision, states)
    logits = expected_logits(routers, states)
    soft = ((logits + noise) / 2.0).softmax(-1)[..., 1]
    assert torch.equal(routes, soft > 0.5)
    gates = torch.stack([decision.gate(unit) for unit in units], 1)
    decided = decision.finish()
    assert torch.equal(decided.routes_BU, routes)
    torch.testing.assert_close(gates.detach(), routes.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(decided.gates_BU, gates)
    torch.testing.assert_close(decided.logits_BU2, logits.detach(), atol=1e-5, rtol=1e-5)
    weights = torch.randn(gates.shape)
    parameters = [parameter for router in routers.values() for parameter in router.parameters()]
    found = torch.autograd.grad((decided.gates_BU * weights).sum(), parameters)
    for ours, plain in zip(found, torch.autograd.grad((soft * weights).sum(), parameters), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


def test_a_soft_layer_that_is_computed_again_gives_the_same_gate_once():
    """As gradient checkpointing does after the decision is finished."""
    states = queries(LAYERS)
    decision = Soft(LAYERS, undecided(LAYERS), Pooling(LENGTHS, POOL), 1.0, torch.zeros(3, 4, 2))
    decide(decision, states)
    decided = decision.finish()
    decision.observe(2, states[2])
    again = decision.gate(2)
    assert again.requires_grad and torch.equal(again, decided.gates_BU[:, 1])
    with pytest.raises(KeyError):  # nothing keeps the gate's graph
        decision.gate(2)


def test_soft_decisions_refuse_what_cannot_train():
    units, pooling = LAYERS, Pooling(LENGTHS, POOL)
    with pytest.raises(ValueError, match=r"the noise has shape \(4, 3, 2\), expected \(3, 4, 2\)"):
        Soft(units, undecided(units), pooling, 1.0, torch.zeros(4, 3, 2))
    decision = Soft(units, undecided(units), pooling, 1.0)
    with torch.no_grad():
        decide(decision, queries(units))
    with pytest.raises(ValueError, match="the gates carry no gradient"):
        decision.finish()
    with torch.no_grad():  # where none is wanted, none is missed
        assert not decision.finish().gates_BU.requires_grad


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(0, 9))
def test_a_sequences_routes_do_not_depend_on_its_batch(lengths, seed):
    routers, states = undecided(LAYERS), queries(LAYERS, seed, lengths)
    together = decide(Routed(LAYERS, routers, Pooling(lengths, POOL), [False] * len(lengths)), states)
    for row, length in enumerate(lengths):
        alone = {unit: query[row : row + 1, :length] for unit, query in states.items()}
        decision = Routed(LAYERS, routers, Pooling([length], POOL), [False])
        assert torch.equal(decide(decision, alone)[0], together[row])


# --- What is forced ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, separator, spec",
    [
        ("full", ",", "full"),
        ("sparse", ";", "sparse"),
        ("0.75", ",", 0.75),
        ("1.", ",", 1.0),
        ("3", ",", [3]),
        ("3,7", ",", [3, 7]),
        ("3;7", ";", [3, 7]),
    ],
)
def test_reading_a_request(text, separator, spec):
    found = read_spec(text, separator)
    assert found == spec and type(found) is type(spec)


@pytest.mark.parametrize("text", ["", "dense", "3;7", "3,", "0.5,1", "0.x"])
def test_requests_that_are_none(text):
    with pytest.raises(ValueError, match=r"cannot force .* expected full, sparse, a ratio such as 0.75, or layers"):
        read_spec(text)


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
