"""What the page's buttons do, without a browser."""

import re
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio", reason="the extra playground is not installed")

from flux_attention.playground.drawing import PRESS
from flux_attention.playground.examples import FACTS
from flux_attention.playground.page import Page
from flux_attention.playground.player import Player
from flux_attention.shipped import load_shipped

VISITOR = SimpleNamespace(session_hash="one")
TEXT = "text five " * 90


@pytest.fixture(scope="module")
def page():
    return Page(Player(*load_shipped(), "shipped", "shipped"))


def test_what_was_stopped_before_its_turn_makes_way_for_the_next_question(page):
    page.begin("text one " * 90, "", VISITOR)
    page.stop(VISITOR)
    page.begin("text two " * 90, "", VISITOR)
    first = list(page.ask("text one " * 90, "", 0.0, VISITOR))
    assert len(first) == 1 and page.visits["one"].is_running  # it is the second question's turn
    list(page.ask("text two " * 90, "", 0.0, VISITOR))
    visit = page.visits["one"]
    assert visit.prompt == page.player.encode("text two " * 90, "") and not visit.is_running
    assert all(card.report for card in visit.cards.values())


def test_what_runs_makes_way_for_the_next_question(page):
    page.begin("text three " * 90, "", VISITOR)
    answers = page.ask("text three " * 90, "", 0.0, VISITOR)
    next(answers)
    page.begin("text four " * 90, "", VISITOR)
    list(answers)
    visit = page.visits["one"]
    assert visit.is_running and not all(card.report for card in visit.cards.values())
    list(page.ask("text four " * 90, "", 0.0, VISITOR))
    assert visit.prompt == page.player.encode("text four " * 90, "") and not visit.is_running
    assert all(card.report for card in visit.cards.values())


def test_who_has_left_is_not_remembered(page):
    page.begin("text", "", VISITOR)
    page.leave(VISITOR)
    list(page.ask("text", "", 0.0, VISITOR))
    assert not page.visits


def asked(page, text, question=""):
    page.begin(text, question, VISITOR)
    return list(page.ask(text, question, 0.0, VISITOR))[-1]


def is_empty(shown):
    _, strip, cards = shown
    return PRESS in strip and strip.count("layer undecided") == 10 and cards.count("&nbsp;") == 3 and "MiB" not in cards


def test_what_was_asked_otherwise_is_not_shown_any_more(page):
    _, strip, cards = asked(page, TEXT)
    assert PRESS not in strip and "undecided" not in strip and cards.count("MiB") == 3
    nothing = page.edit(TEXT, "", VISITOR)  # edited, and as it was again
    assert all(update["__type__"] == "update" and len(update) == 1 for update in nothing)
    assert is_empty(page.edit(TEXT, "Who", VISITOR)) and not page.visits["one"].is_running
    assert asked(page, TEXT)[2].count("MiB") == 3
    _, strip, cards = page.begin("text six " * 90, "", VISITOR)  # while it waits, too
    assert "undecided" in strip and "MiB" not in cards and cards.count("waiting for its turn") == 3
    list(page.ask("text six " * 90, "", 0.0, VISITOR))


def test_asking_once_more_keeps_what_pins_do_not_change(page):
    dense = asked(page, TEXT) and page.visits["one"].cards["dense"].report
    asked(page, TEXT)
    assert page.visits["one"].cards["dense"].report is dense


def test_what_runs_ends_with_an_edit_and_writes_nothing_more(page):
    page.begin(TEXT, "", VISITOR)
    answers = page.ask(TEXT, "", 0.0, VISITOR)
    for _ in range(4):
        next(answers)
    assert page.visits["one"].decided
    assert is_empty(page.edit(TEXT + "more", "", VISITOR))
    assert is_empty(list(answers)[-1]) and not page.visits["one"].is_running
    assert asked(page, TEXT + "more")[2].count("MiB") == 3  # the page goes on


def test_what_is_asked_and_then_edited_before_its_turn_is_not_answered(page):
    page.begin(TEXT, "", VISITOR)
    page.edit(TEXT, "Who", VISITOR)
    assert len(list(page.ask(TEXT, "", 0.0, VISITOR))) == 1 and page.visits["one"].prompt == []


def test_a_prompt_that_is_refused_takes_old_answers_away(page):
    asked(page, TEXT)
    shown = asked(page, "word " * 20_000)
    assert "too long" in shown[0] and is_empty(shown)


def test_the_reader_is_told_where_the_facts_are(page):
    said = page._planted()
    ids = page.player.encode(page.text, "")
    places = re.findall(r"<q>([^<]+)</q> \(token ([\d,]+)\)", said)
    assert len(places) == 3 and "and 6 more" in said and f"of {len(ids):,} tokens" in said
    for fact, place in places:
        behind = page.player.tokenizer.decode(ids[int(place.replace(",", "")) :])
        assert fact in FACTS and behind.lstrip().startswith(fact)
    assert "All lie outside the first 64 and latest 704 tokens, which is all that a sparse layer sees" in said
