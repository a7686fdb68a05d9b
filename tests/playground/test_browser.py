"""The page in a headless Chromium: visitors ask, force layers, make mistakes and come two at a time."""

import os
import re
import shutil

import pytest

from flux_attention import FluxConfig, attach
from flux_attention.playground.examples import EXAMPLES
from flux_attention.playground.player import Player
from flux_attention.shipped import load_shipped

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytest.importorskip("gradio", reason="the page needs gradio; `make test-playground` installs it")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright; `make test-playground` installs it")
if CHROMIUM is None:
    pytest.skip("needs Chromium on this machine; set CHROMIUM to where it is", allow_module_level=True)

from flux_attention.playground.page import launch  # noqa: E402  (behind what it needs)

OPTIONS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
#: A question, as answers to these end with their line, soon.
QUESTION = "What is x3?"
SHORT = "\n".join(f"x{i} = compute({i})" for i in range(40))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as manager:
        browser = manager.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address():
    """Of a page that shows the shipped model."""
    blocks, address = launch(Player(*load_shipped(), "shipped", "shipped"))
    yield address
    blocks.close(verbose=False)


class Visitor:
    """A browser's window on the page, and what a person does with it."""

    def __init__(self, browser, address, **options):
        self.context = browser.new_context(**options)
        self.page, self.fetched, self.complaints = self.context.new_page(), [], []
        self.page.set_default_timeout(30_000)
        self.page.on("request", lambda request: self.fetched.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else 0)
        self.page.goto(address)
        self.page.wait_for_selector("#ask")

    def write(self, text, question):
        self.page.fill("#text textarea", text)
        self.page.fill("#question textarea, #question input", question)

    def ask(self):
        self.page.click("#ask")

    def wait(self):
        """Until no answer is to come any more."""
        self.page.wait_for_selector(".way .state:not(.same):not(.another)", state="attached", timeout=5000)
        self.page.wait_for_selector(".way .state:not(.same):not(.another)", state="detached")

    def answers(self):
        return [text.strip() for text in self.page.locator(".way .answer").all_inner_texts()]

    def routes(self):
        return [re.findall("full|sparse|undecided", name)[0] for name in self.layers("class")]

    def layers(self, attribute):
        return [layer.get_attribute(attribute) for layer in self.page.locator(".layer").all()]

    def message(self):
        return self.page.locator("#message p").inner_text()

    def background(self):
        return self.page.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.fixture
def visit(browser, address):
    visitors = []

    def come(**options):
        visitors.append(Visitor(browser, options.pop("address", address), **options))
        return visitors[-1]

    yield come
    for visitor in visitors:
        visitor.context.close()


def test_an_example_runs_from_end_to_end(visit):
    visitor = visit(color_scheme="light")
    assert visitor.routes() == ["undecided"] * 10 and visitor.answers() == [""] * 3
    assert "Press Ask" in visitor.page.locator(".summary").inner_text()
    assert "Gustav is a guest of Otto in secret." in visitor.page.locator("#planted").inner_text()
    visitor.page.click("text=One fact")  # which asks
    filled = "text => document.querySelector('#question textarea').value == text"
    visitor.page.wait_for_function(filled, arg=EXAMPLES[1].question)
    visitor.page.wait_for_selector(".layer.latest")  # they light up one by one
    assert "undecided" in visitor.routes()
    visitor.wait()
    dense, routed, sparse = visitor.answers()
    assert dense == routed == EXAMPLES[1].answer != sparse
    assert {"full", "sparse"} == set(visitor.routes())
    numbers = [float(text.replace("−", "-")) for text in visitor.page.locator(".layer .number").all_inner_texts()]
    assert [number > 0 for number in numbers] == [route == "full" for route in visitor.routes()]
    cards = visitor.page.locator(".way").all_inner_texts()
    for card, share in zip(cards, ("100 %", r"\d\d %", r"1\d %"), strict=True):
        assert re.search(rf"MiB {share} of dense", card) and re.search(
            r"\d\.\d\d s\s.*too few tokens to time", card, re.S
        ), card
    assert "The text says: 48213." in visitor.page.locator(".summary").inner_text()
    assert all(url.startswith(("http://127.0.0.1", "data:", "blob:")) for url in visitor.fetched)
    assert not visitor.complaints and visitor.background() == "rgb(255, 255, 255)"


def test_dark_and_as_narrow_as_a_phone(visit):
    visitor = visit(color_scheme="dark", viewport={"width": 390, "height": 844})
    assert visitor.background() == "rgb(13, 17, 23)"
    visitor.write(SHORT, QUESTION)
    visitor.ask()
    visitor.wait()
    assert visitor.page.evaluate("document.documentElement.scrollWidth") == 390
    lefts = [box["x"] for box in (way.bounding_box() for way in visitor.page.locator(".way").all())]
    assert len(set(lefts)) == 1  # below each other
    boxes = [layer.bounding_box() for layer in visitor.page.locator(".layer").all()]
    assert all(box["width"] >= 44 and box["height"] >= 44 and box["x"] + box["width"] <= 390 for box in boxes)
    assert visitor.page.evaluate("getComputedStyle(document.querySelector('.layer.sparse .cell')).backgroundImage")


def test_by_keyboard_alone_layers_are_forced_and_let_go(visit):
    visitor = visit()
    visitor.write(SHORT, QUESTION)
    press = visitor.page.keyboard.press
    visitor.page.focus("#question textarea, #question input")
    press("Enter")
    visitor.wait()
    before, dense = visitor.routes(), visitor.answers()[0]
    assert before[0] == "sparse"
    for _ in range(30):
        press("Tab")
        if visitor.page.evaluate("document.activeElement.dataset.layer") == "0":
            break
    press("Enter")
    visitor.page.wait_for_selector('.layer.pinned[data-layer="0"]:focus')  # the keyboard stays where it was
    assert visitor.layers("aria-pressed") == ["true"] + ["false"] * 9 and visitor.routes()[0] == "full"
    assert "ask again" in visitor.page.locator(".summary").inner_text()
    visitor.page.focus("#ask")
    press("Space")
    visitor.wait()
    assert "1 forced by you" in visitor.page.locator(".summary").inner_text() and visitor.answers()[0] == dense
    assert "full" in visitor.layers("class")[0] and "pinned" in visitor.layers("class")[0]
    visitor.page.focus("#free")
    press("Enter")
    visitor.page.wait_for_selector(".layer.pinned", state="detached")
    visitor.page.focus("#ask")
    press("Space")
    visitor.wait()
    assert visitor.routes() == before


def test_empty_and_too_long_texts_and_stopping(visit):
    visitor = visit()
    visitor.write("  ", "What is asked?")
    visitor.ask()
    visitor.page.wait_for_selector("#message [role=alert]")
    assert visitor.message() == "There is no text. Paste one, or pick an example, then ask."
    visitor.write("word " * 20_000, "")  # browsers take long to type lines
    visitor.ask()
    visitor.page.wait_for_selector("text=too long")
    assert "reads at most 8,128 with 64 behind them" in visitor.message() and visitor.answers() == [""] * 3
    visitor.page.click("text=No question")  # which asks
    visitor.page.wait_for_selector(".layer.latest")
    visitor.page.click('.layer[data-layer="9"]')
    visitor.page.wait_for_selector("text=wait, or press Stop")
    visitor.page.click("#stop")
    visitor.page.wait_for_selector("text=stopped")
    visitor.write(SHORT, QUESTION)  # the page goes on
    visitor.ask()
    visitor.page.wait_for_selector(".summary:has-text('layers ran full')")


def test_what_one_types_takes_old_answers_away(visit):
    visitor = visit()
    visitor.write(SHORT, QUESTION)
    visitor.page.wait_for_selector("#planted p", state="hidden")  # it is not about this text
    visitor.ask()
    visitor.wait()
    assert "undecided" not in visitor.routes() and all(visitor.answers())
    visitor.page.focus("#question textarea, #question input")
    visitor.page.keyboard.type(" And x4?", delay=20)
    visitor.page.wait_for_selector(".summary:has-text('Press Ask')")
    assert visitor.routes() == ["undecided"] * 10 and visitor.answers() == [""] * 3
    visitor.page.keyboard.press("Enter")
    visitor.page.wait_for_selector(".layer.latest")
    visitor.page.keyboard.type(" And x5?", delay=20)  # while it runs
    visitor.page.wait_for_selector(".summary:has-text('Press Ask')")
    visitor.page.wait_for_timeout(1500)
    assert visitor.routes() == ["undecided"] * 10 and visitor.answers() == [""] * 3
    visitor.page.click("text=Two look-ups")
    visitor.wait()
    assert visitor.answers()[0] == EXAMPLES[0].answer
    assert visitor.page.locator("#planted p").is_visible() and not visitor.complaints


def test_two_visitors_at_once_do_not_mix(visit):
    one, other = visit(), visit()
    one.write(SHORT + "\n# The secret code of the red fox is 31337.", "What is the secret code of the red fox?")
    other.write(SHORT + "\n# Otto lives in Durban.", "In which city does Otto live?")
    other.page.click('.layer[data-layer="9"]')
    other.page.wait_for_selector(".layer.pinned")
    one.ask()
    other.ask()
    waiting = "[...document.querySelectorAll('.way .state')].filter(e => e.innerText == 'waiting for its turn').length"
    other.page.wait_for_function(f"{waiting} == 3")
    for visitor, answer in ((one, "31337"), (other, "Durban")):
        visitor.page.wait_for_selector(".way[data-way=sparse] .state.same, .way[data-way=sparse] .state.another")
        assert visitor.answers()[0] == answer
    assert "pinned" in other.layers("class")[9] and not any("pinned" in name for name in one.layers("class"))
    assert "forced by you" not in one.page.locator(".summary").inner_text()


def test_a_calibrated_adapter_has_a_budget_and_the_page_leads_on(visit):
    model, tokenizer, routing = load_shipped()
    routing.detach()
    config = FluxConfig(sink=16, window=64, ranking=tuple(range(10)), budget=0.5)
    blocks, address = launch(Player(model, tokenizer, attach(model, config), "shipped", "<mine>"))
    try:
        visitor = visit(address=address)
        assert "adapter: <mine>" in visitor.page.locator(".model").inner_text()
        visitor.write(SHORT, QUESTION)
        visitor.page.fill("#budget input[type=number]", "0.8")
        visitor.page.keyboard.press("Tab")
        visitor.ask()
        visitor.wait()
        assert visitor.routes() == ["full"] * 2 + ["sparse"] * 8
        assert visitor.page.locator(".layer .number").all_inner_texts() == [""] * 10
        links = [link.get_attribute("href") for link in visitor.page.locator(".onwards a").all()]
        assert links == ["/serve", "/calibrate", "/train"]
        visitor.page.click(f".onwards a[href='{links[0]}']")
        visitor.page.wait_for_selector("h1:has-text('Start: serve a model')")
    finally:
        blocks.close(verbose=False)
