"""The pure parts of serving's benchmarks: what is set beside what, and how requests arrive and are judged."""

import itertools
import statistics

import pytest
import torch
from served.models import BLOCKS_OF_ALL, make_model, make_ranking, make_routers
from served.rows import arrivals, concurrency, joined, latencies, spread

from flux_attention import adapters
from flux_attention.router import hard_route
from flux_attention.routes import parse_routes

STOCK = dict(shape="s", engine="vllm", method="dense", sparsity=0.0)
ROUTED = dict(shape="s", engine="flux-vllm", method="routed-ends", sparsity=0.75)


def served(facts, measure, **numbers):
    return dict(facts, measure=measure, phase="serve", seq_len=64, output_tokens=8, **numbers)


def test_rows_stand_beside_the_stock_engines_of_the_same_measurement():
    times = [dict(spread([4.0, 2.0, 3.0]), seq_len=64, batch=1, phase=phase) for phase in ("prefill", "decode")]
    twice = [{**row, **spread([6.0])} for row in times]
    rows = [
        *({**STOCK, **row} for row in twice),
        served(STOCK, "throughput", requests_per_s=2.0, concurrency=3),
        served(STOCK, "load", rate=0.5, requests_per_s=0.5, ttft_ms=9.0),
        *({**ROUTED, **row} for row in times),
        served(ROUTED, "throughput", requests_per_s=5.0, concurrency=11),
        served(ROUTED, "load", rate=0.5, requests_per_s=0.5, ttft_ms=3.0),
    ]
    found = joined(rows)
    assert (
        found[:4] == rows[:4] and [{key: row[key] for key in own} for row, own in zip(found, rows, strict=True)] == rows
    )
    for row in found[4:6]:
        assert (row["baseline"], row["baseline_ms"], row["ms"], row["speedup"]) == ("vllm-dense", 6.0, 3.0, 2.0)
    throughput, load = found[6:]
    assert (throughput["baseline_concurrency"], throughput["speedup"]) == (3, 2.5)
    assert load["baseline_ttft_ms"] == 9.0 and "speedup" not in load


@pytest.mark.parametrize("other", [dict(seq_len=65), dict(output_tokens=9), dict(shape="t"), dict(measure="load")])
def test_other_measurements_are_no_baseline(other):
    rows = [served(STOCK, "throughput", requests_per_s=2.0), served(ROUTED, "throughput", requests_per_s=5.0)]
    rows[1] |= other
    assert joined(rows) == rows


def test_arrivals_are_a_poisson_process_and_the_same_for_all_engines():
    times = arrivals(4000, rate=2.5)
    between = [later - time for time, later in itertools.pairwise([0.0, *times])]
    assert times == arrivals(4000, rate=2.5) != arrivals(4000, rate=2.5, seed=1)
    assert min(between) > 0
    assert statistics.mean(between) == pytest.approx(0.4, rel=0.05) == statistics.stdev(between)


def test_latencies_are_medians_and_95th_percentiles():
    assert latencies("ttft_ms", list(range(101))) == {"ttft_ms": 50, "ttft_ms_p95": 95}
    assert latencies("tpot_ms", [1.0, 2.0]) == {"tpot_ms": 1.5, "tpot_ms_p95": 1.95}
    assert latencies("tpot_ms", []) == {}


def test_concurrency_is_weighted_by_time():
    steps = [(0.0, 2, 5, 0), (1.0, 6, 1, 1), (1.5, 4, 0, 2)]
    assert concurrency(steps, 4.0) == {"concurrency": 6, "concurrency_mean": 3.75, "preemptions": 3}
    assert concurrency([], 4.0) == {}


def test_an_answer_with_another_requests_code_is_told():
    soak = pytest.importorskip("served.soak")
    own, wrong, other, more, full, short = (
        soak.Ask({"max_tokens": room}, code, omega=omega, text=text, asked=True, fate=soak.ANSWERED)
        for code, omega, text, room in [
            ("11111", None, " 11111\n# 22222", 9), ("22222", 1.0, " 99999\n", 9), ("33333", 1.0, " 11111\n", 9),
            ("44444", 0.0, "", 9), ("55555", 0.0, " 55555\n", 9), ("66666", 0.0, " 6", 2),
        ]
    )  # fmt: skip
    lost = soak.Ask(b"{", asked=True)
    asks = [own, wrong, other, more, full, short, lost]
    assert soak.suspicious(asks, 2) == [other, more]  # the last is wrong with all layers full
    assert soak.suspicious(asks, 1) == [more]  # the other's code was asked for long before
    assert soak.suspicious([other, own], 1) == [other]  # or behind it
    own.alone, wrong.alone, other.alone = " 11111\n# 3", " 22222\n", " 44444\n"
    assert [ask.lost_alone for ask in (own, wrong, other, more)] == [False, True, False, False]
    assert soak.fates([own, lost, soak.Ask(b"{")]) == {"answered": 1, "LOST": 1}
    assert soak.accuracy([own, wrong, other, more]) == {"as routed": (1, 1), "Ω 0": (0, 1), "Ω 1": (0, 2)}


def test_adapters_of_models_without_weights_decide_what_would_be_forced(tmp_path):
    base = make_model(tmp_path / "model", "tiny", 128, "float32")
    routes = parse_routes(0.5, 3, base.routed_layers)
    assert make_routers(tmp_path / "routers", base, 0.5, 8, 16) == 0.5
    config, routers = adapters.load(tmp_path / "routers", base)
    pooled = torch.randn(3, base.head_dim)
    found = torch.stack([hard_route(router(pooled)) for router in routers.values()], dim=1)
    assert torch.equal(found, routes) and config.decide == "ends"
    assert config.full == {"pattern": "full"}
    make_routers(tmp_path / "blocks", base, 0.5, 8, 16, BLOCKS_OF_ALL)
    assert adapters.load(tmp_path / "blocks", base)[0].full["pattern"] == "block_sparse"
    assert make_ranking(tmp_path / "ranking", base, 0.5, 8, 16) == 0.5
    config, _ = adapters.load(tmp_path / "ranking", base)
    assert list(config.full_layers) == routes[0].nonzero().flatten().tolist() != [0, 1]
