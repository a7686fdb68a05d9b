"""What the page's buttons do, without a browser."""

from types import SimpleNamespace

import pytest

pytest.importorskip("gradio", reason="the extra playground is not installed")

from flux_attention.playground.page import Page
from flux_attention.playground.player import Player
from flux_attention.shipped import load_shipped

VISITOR = SimpleNamespace(session_hash="one")


@pytest.fixture(scope="module")
def page():
    return Page(Player(*load_shipped(), "shipped", "shipped"))


def test_what_was_stopped_before_its_turn_makes_way_for_the_next_question(page):
    page.begin(VISITOR)
    page.stop(VISITOR)
    page.begin(VISITOR)
    first = list(page.ask("text one " * 90, "", 0.0, VISITOR))
    assert len(first) == 1 and page.visits["one"].is_running  # it is the second question's turn
    list(page.ask("text two " * 90, "", 0.0, VISITOR))
    visit = page.visits["one"]
    assert visit.prompt == page.player.encode("text two " * 90, "") and not visit.is_running
    assert all(card.report for card in visit.cards.values())


def test_what_runs_makes_way_for_the_next_question(page):
    page.begin(VISITOR)
    answers = page.ask("text three " * 90, "", 0.0, VISITOR)
    next(answers)
    page.begin(VISITOR)
    list(answers)
    visit = page.visits["one"]
    assert visit.is_running and not all(card.report for card in visit.cards.values())
    list(page.ask("text four " * 90, "", 0.0, VISITOR))
    assert visit.prompt == page.player.encode("text four " * 90, "") and not visit.is_running
    assert all(card.report for card in visit.cards.values())


def test_who_has_left_is_not_remembered(page):
    page.begin(VISITOR)
    page.leave(VISITOR)
    list(page.ask("text", "", 0.0, VISITOR))
    assert not page.visits
