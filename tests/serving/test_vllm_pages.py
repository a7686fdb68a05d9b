"""Pages by layer, under random traffic, beside vLLM's own managers."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from flux_attention.patterns import Streaming
from flux_attention.serving.pages import LayerSpec, PageCoordinator, gap, pages_kept

PAGE = 16
OWN = FullAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=8, dtype=torch.float32)


def manager(layers, pages, routes, sink=0, window=1, routed=True, unrouted=0, expected=None, in_flight=0):
    specs = [LayerSpec.of(OWN, layer) if routed else OWN for layer in range(layers)]
    if unrouted:
        specs.insert(1, OWN)
    groups = [KVCacheGroupSpec([f"layers.{place}"], spec) for place, spec in enumerate(specs)]
    found = KVCacheManager(KVCacheConfig(pages, [], groups), 10_000, PAGE, PAGE, enable_caching=False)
    if routed:
        own = found.coordinator
        found.coordinator = PageCoordinator(own, range(layers), sink, window, routes, expected, in_flight)
    return found


def request(name, tokens):
    return Request(name, [1] * tokens, SamplingParams(max_tokens=999), None)


def test_layers_that_are_routed_share_no_block_table():
    specs = {f"layers.{layer}": LayerSpec.of(OWN, layer) for layer in range(5)}
    assert all(spec.page_size_bytes == OWN.page_size_bytes for spec in specs.values())
    assert specs["layers.3"].merge([specs["layers.3"]]) == specs["layers.3"]
    with pytest.raises(AssertionError):
        specs["layers.3"].merge(list(specs.values()))
    assert not specs["layers.3"].is_uniform_with_collection(specs)

    class Config:
        class scheduler_config:
            disable_hybrid_kv_cache_manager = False

        class cache_config:
            @staticmethod
            def get_resolved_kv_cache_layout():
                class layout:
                    is_block_outermost = False

                return layout

        speculative_config = None

    groups = get_kv_cache_groups(Config, specs)
    assert [group.layer_names for group in groups] == [[name] for name in specs]


@given(st.integers(1, 3000), st.sampled_from([16, 64]), st.integers(0, 300), st.integers(1, 700))
def test_what_is_given_back_is_seen_by_no_later_token(tokens, page, sink, window):
    first, last = gap(tokens, page, sink, window)
    seen = Streaming(sink, window).mask(tokens + 1)[-1]  # the next token, and all after it see less
    for number in range(first, last):
        assert not seen[number * page : (number + 1) * page].any()
    kept = pages_kept(tokens, page, sink, window)
    assert kept <= max(1, -(-sink // page)) + -(-window // page) + 1  # the first one stays: routes are kept by it
    assert kept <= -(-tokens // page)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_under_any_traffic_requests_keep_what_they_see_and_no_page_is_lost(data):
    layers, sink, window = 3, data.draw(st.sampled_from([0, 20, 64])), data.draw(st.sampled_from([1, 40, 100]))
    routes, running, pages = {}, {}, 150
    own = manager(layers, pages, routes, sink, window)
    free = own.block_pool.get_num_free_blocks()
    for number in itertools.count():
        if number == 60:
            break
        kind = data.draw(st.sampled_from(["start", "step", "step", "step", "learn", "end"]))
        if kind == "start":
            new = request(f"r{number}", data.draw(st.integers(1, 300)))
            running[new.request_id] = new
            kind = "step"
        if not running:
            continue
        name = data.draw(st.sampled_from(sorted(running)))
        mine = running[name]
        if kind == "learn":  # at any time, a step or two after the start
            routes.setdefault(name, [data.draw(st.booleans()) for _ in range(layers)])
        elif kind == "end":
            own.free(mine)
            routes.pop(name, None)
            del running[name]
        else:
            left = mine.num_tokens - mine.num_computed_tokens
            if left == 0:
                mine.append_output_token_ids(1)
                left = 1
            count = data.draw(st.integers(1, left))
            before = own.block_pool.get_num_free_blocks()
            if own.allocate_slots(mine, count) is None:  # full: as a preempted one, with its routes
                own.free(mine)
                mine.num_computed_tokens = 0
                continue
            assert own.block_pool.get_num_free_blocks() <= before + layers * pages
            seen = mine.num_computed_tokens
            mine.num_computed_tokens += count
            used = set()
            for layer, blocks in enumerate(own.get_blocks(name).blocks):
                full = routes.get(name, [True] * layers)[layer]
                ids = [block.block_id for block in blocks]
                assert len(ids) == -(-mine.num_computed_tokens // PAGE)
                for place, block in enumerate(ids):
                    tokens = range(place * PAGE, min((place + 1) * PAGE, mine.num_computed_tokens))
                    # What the step's first token sees of what was there, and what the step writes.
                    needed = full or place == 0 or any(t < sink or t > seen - window or t >= seen for t in tokens)
                    assert block != 0 or not needed
                real = [block for block in ids if block]
                assert not used & set(real)
                used |= set(real)
                if not full:
                    assert len(real) <= max(1, -(-sink // PAGE)) + -(-(window + count) // PAGE) + 1
    for mine in running.values():
        own.free(mine)
    assert own.block_pool.get_num_free_blocks() == free
    assert not own.coordinator.held and not own.coordinator.freed


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 90)), max_size=40), st.integers(20, 90))
def test_where_all_is_full_pages_go_as_in_vllm(steps, pages):
    routes = {f"r{name}": [True, True] for name in range(4)}
    ours, theirs = manager(2, pages, routes, expected=2), manager(2, pages, routes, routed=False)
    requests = [{f"r{name}": request(f"r{name}", 200) for name in range(4)} for _ in range(2)]
    for name, count in steps:
        found = []
        for own, some in zip((ours, theirs), requests, strict=True):
            mine = some[f"r{name}"]
            if mine.num_computed_tokens + count > mine.num_tokens:
                own.free(mine)
                mine.num_computed_tokens = 0
                found.append("freed")
                continue
            got = own.allocate_slots(mine, count, full_sequence_must_fit=True)
            if got is not None:
                mine.num_computed_tokens += count
            found.append(got and [[block.block_id for block in group] for group in got.blocks])
        assert found[0] == found[1] or {str(found[0]), str(found[1])} == {"[[], []]", "[]"}
        assert ours.block_pool.get_num_free_blocks() == theirs.block_pool.get_num_free_blocks()


def test_a_request_is_let_in_if_it_fits_as_it_will_be_routed():
    routes = {}
    own = manager(4, 120, routes, sink=16, window=32)
    long = request("long", 640)  # 40 pages a layer: 160 in all
    assert own.allocate_slots(long, 16, full_sequence_must_fit=True) is None
    own.coordinator.learn({"others": [True, False, False, False]})
    assert own.allocate_slots(long, 16, full_sequence_must_fit=True) is not None
    # 40 + 3 × 4 pages, of which it has one a layer.
    needed = own.coordinator.get_num_blocks_to_allocate("long", 640, apply_admission_cap=True)
    assert needed == 40 + 3 * 4 - 4 and pages_kept(640, PAGE, 16, 32) <= 4
    routes["long"] = [True, True, True, True]
    assert own.coordinator.get_num_blocks_to_allocate("long", 640, apply_admission_cap=True) == 160 - 4


@settings(deadline=None, max_examples=100)
@given(
    st.integers(60, 400), st.integers(0, 300), st.integers(1, 600), st.integers(1, 200), st.integers(0, 40),
    st.integers(1, 100), st.lists(st.booleans(), min_size=3, max_size=3), st.booleans(),
)  # fmt: skip
def test_a_request_that_is_let_in_gets_all_its_pages_if_no_other_takes_them(
    pages, others, tokens, chunk, sink, window, full, known
):
    routes = {"other": [True] * 3, **({"mine": full} if known else {})}
    own = manager(3, pages, routes, sink, window, expected=sum(full), in_flight=chunk)
    other, mine = request("other", max(1, others)), request("mine", tokens)
    own.allocate_slots(other, other.num_tokens)
    while mine.num_computed_tokens < tokens:
        count = min(chunk, tokens - mine.num_computed_tokens)
        got = own.allocate_slots(mine, count, full_sequence_must_fit=not mine.num_computed_tokens)
        if got is None:
            assert mine.num_computed_tokens == 0
            return
        mine.num_computed_tokens += count
        routes["mine"] = full


def test_layers_that_are_not_routed_keep_their_pages():
    routes = {"r": [False, False]}
    own = manager(2, 200, routes, sink=16, window=16, unrouted=1)
    mine = request("r", 500)
    for _ in range(25):
        own.allocate_slots(mine, 20)
        mine.num_computed_tokens += 20
    first, unrouted, last = ([block.block_id for block in blocks] for blocks in own.get_blocks("r").blocks)
    assert all(unrouted) and sum(map(bool, first)) == sum(map(bool, last)) < 6


def test_pages_that_were_given_back_can_be_asked_for():
    routes = {"r": [False, True]}
    own = manager(2, 200, routes, sink=16, window=16)
    own.coordinator.returned = []
    mine = request("r", 320)
    for _ in range(20):
        own.allocate_slots(mine, 16)
        mine.num_computed_tokens += 16
    sparse, full = ([block.block_id for block in blocks] for blocks in own.get_blocks("r").blocks)
    given = own.coordinator.take_returned()
    assert len(given) == sparse.count(0) > 10 and own.coordinator.take_returned() == []
    assert not set(given) & set(full)
    own.free(mine)
    assert sorted(own.coordinator.take_returned()) == sorted(page for page in sparse + full if page)
