"""The player: what is asked and refused, what happens in order, threads that do not mix; without a page."""

import threading

import pytest
import torch
from helpers.models import CONFIG, tiny_model
from transformers import AutoTokenizer

from flux_attention import FluxConfig, attach
from flux_attention.hf.report import Report
from flux_attention.names import BACKBONE
from flux_attention.patterns import BlockSparse
from flux_attention.playground.examples import EXAMPLES, FACTS, example_text, right_answer
from flux_attention.playground.player import WAYS, LayerDecided, Player, PromptError
from flux_attention.shipped import load_shipped

SHORT = "\n".join(f"x{i} = compute({i})" for i in range(80))


@pytest.fixture(scope="module")
def player():
    return Player(*load_shipped(), "shipped", "shipped")


def asked(player, ids, way, **options):
    events = list(player.ask(ids, way, new_tokens=4, **options))
    layers = [event for event in events if isinstance(event, LayerDecided)]
    return layers, "".join(event for event in events if isinstance(event, str)), events[-1]


def test_layers_come_first_then_text_then_the_report(player):
    ids = player.encode(SHORT, "")
    for way, routes in WAYS.items():
        events = list(player.ask(ids, way, new_tokens=4))
        kinds = [type(event) for event in events]
        assert kinds == sorted(kinds, key=[LayerDecided, str, Report].index) and kinds.count(Report) == 1
        layers, report = events[:10], events[-1]
        assert [one.layer for one in layers] == list(player.routing.layers)
        assert [one.is_full for one in layers] == report.routes.routes_BL[0].tolist()
        if routes is None:
            assert all((one.margin > 0) is one.is_full for one in layers)
        else:
            assert all(one.margin is None and one.is_full is (routes == "full") for one in layers)
        with player.routing.force(routes):
            tokens = player.model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, pad_token_id=0)
        text = player.tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True)
        assert "".join(events[10:-1]) == text and report.new_tokens == 4


def test_dense_is_exact_whatever_the_adapters_full_layers_compute():
    model, tokenizer, routing = load_shipped()
    blocks = {"pattern": "block_sparse", "threshold": 0.05, "select": "mass"}
    routing.detach()
    routing = attach(model, FluxConfig(full=blocks, sink=64, window=448))
    player = Player(model, tokenizer, routing, "shipped")
    seen, prefill = [], BlockSparse.prefill
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockSparse, "prefill", lambda self, *states: seen.append(1) or prefill(self, *states))
        asked(player, player.encode(SHORT, ""), "dense")
        assert not seen
        asked(player, player.encode(SHORT, ""), "routed")
        assert seen


def test_pinned_layers_run_so_and_the_others_are_decided(player):
    ids = player.encode(SHORT, "")
    free, _, _ = asked(player, ids, "routed")
    layers, _, report = asked(player, ids, "routed", pins={0: True, 9: False})
    assert report.routes.routes_BL[0, [0, 9]].tolist() == [True, False]
    assert [one.layer for one in layers if one.is_pinned] == [0, 9]
    assert layers[0].margin == free[0].margin and layers[1].margin != free[1].margin  # read behind a full layer
    assert not any(one.is_pinned for one in asked(player, ids, "sparse", pins={0: True})[0])


def test_an_answer_ends_with_its_line(player):
    ids = player.encode(SHORT, "What is x3?")
    assert player.tokenizer.decode(ids).endswith("\n# Question: What is x3?\n# Answer:")
    text = "".join(e for e in player.ask(ids, "dense", one_line=True) if isinstance(e, str))
    assert text.endswith("\n") and text.count("\n") == 1


def test_empty_and_too_long_texts_are_told_what_to_do(player):
    for text in ("", " \n\t"):
        with pytest.raises(PromptError, match=r"no text\. Paste one, or pick an example"):
            player.encode(text, "What is asked?")
    with pytest.raises(PromptError, match=r"has [\d,]+ tokens, and this model reads at most 8,128 .* about 6\d % of"):
        player.encode(SHORT * 24, "")


def test_a_stopped_prompt_gives_no_report_and_leaves_the_model_free(player):
    ids, stop, seen = player.encode(SHORT, ""), threading.Event(), []
    for event in player.ask(ids, "routed", stop=stop):
        seen.append(event)
        stop.set()
    assert seen and not any(isinstance(event, (str, Report)) for event in seen) and len(seen) < 10
    left = player.ask(ids, "routed")
    next(left)
    left.close()  # a visitor who went away
    assert isinstance(asked(player, ids, "dense")[2], Report)


def test_a_closed_player_ends_what_runs_and_asks_nothing_more():
    player = Player(*load_shipped(), "shipped", "shipped")
    ids = player.encode(SHORT, "")
    events = player.ask(ids, "routed")
    first = next(events)
    player.close()
    assert isinstance(first, LayerDecided) and not any(isinstance(event, Report) for event in events)


def test_a_model_with_a_chat_template_is_asked_through_it():
    model, tokenizer, routing = load_shipped()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    player = Player(model, tokenizer, routing, "mine")
    assert tokenizer.decode(player.encode("some text", " What? ")).endswith("<user>some text\n\nWhat?<end>")


def test_visitors_at_once_do_not_mix(player):
    ids, found, ways = player.encode(SHORT, ""), {}, ("dense", "sparse", "routed")
    alone = {way: asked(player, ids, way) for way in ways}
    threads = [
        threading.Thread(target=lambda way=way, place=place: found.update({(way, place): asked(player, ids, way)}))
        for place in range(2)
        for way in ways
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (way, _), (layers, text, report) in found.items():
        expected_layers, expected_text, expected = alone[way]
        assert layers == expected_layers and text == expected_text
        assert torch.equal(report.routes.routes_BL, expected.routes.routes_BL) and report.kv_bytes == expected.kv_bytes


def test_budgets_are_each_prompts_own():
    model, tokenizer, routing = load_shipped()
    routing.detach()
    config = FluxConfig(sink=16, window=64, ranking=tuple(range(10)), budget=0.5)
    player = Player(model, tokenizer, attach(model, config), "shipped", "mine")
    ids = player.encode(SHORT, "")
    for budget, full in ((0.2, 8), (0.9, 1), (None, 1)):
        layers, _, report = asked(player, ids, "routed", budget=budget)
        assert int(report.routes.routes_BL.sum()) == full and all(one.margin is None for one in layers)


def test_routers_of_heads_are_refused():
    model = tiny_model("qwen3")
    routing = attach(model, FluxConfig(sink=4, window=9, pool_size=6, granularity="head"))
    with pytest.raises(ValueError, match="save nothing; the playground shows routers of layers"):
        Player(model, AutoTokenizer.from_pretrained(BACKBONE), routing, "tiny")


def test_what_fails_is_raised_where_it_is_waited_for():
    model = tiny_model("qwen3")
    with pytest.raises(IndexError):  # the tokenizer of another model
        Player(model, AutoTokenizer.from_pretrained(BACKBONE), attach(model, CONFIG), "tiny")


def test_examples_hide_their_answers_in_the_text(player):
    text = example_text()
    assert all(f"# {fact}\n" in text for fact in FACTS)
    limit = player.routing.sparse.kept(10**6)
    for example in EXAMPLES:
        assert len(player.encode(text, example.question)) > 4 * limit
        assert right_answer(text, example.question) == example.answer
    assert right_answer("other text", EXAMPLES[0].question) == ""
