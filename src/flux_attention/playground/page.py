"""The playground's page: what stands on it, and what its buttons do."""

import threading
from collections import deque
from collections.abc import Iterator
from html import escape
from pathlib import Path

import gradio as gr

from flux_attention.hf.report import Report
from flux_attention.playground import drawing
from flux_attention.playground.documents import IN_MENU, documents
from flux_attention.playground.drawing import Card
from flux_attention.playground.examples import EXAMPLES, FACTS, example_text, right_answer
from flux_attention.playground.player import WAYS, LayerDecided, Player, PromptError

STYLE = Path(__file__).parent / "style.css"
#: Routed first, as its layers are what a visitor waits to see.
ORDER = ("routed", "dense", "sparse")
#: How events run: nothing spins, and no other program calls them.
QUIET = dict(show_progress="hidden", api_visibility="private")
#: A click on a layer tells its number; the button that was clicked keeps the keyboard when the strip is drawn anew.
CLICKS = """
let clicked = null;
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-layer]');
  if (button) { clicked = button.dataset.layer; trigger('click', {layer: Number(clicked)}); }
});
watch('value', () => {
  if (clicked !== null) { element.querySelector(`button[data-layer="${clicked}"]`)?.focus(); clicked = null; }
});
"""


class Visit:
    """
    Remembers what one visitor sees; each browser tab has its own.

    Attributes
    ----------
    about : tuple of str or None
        Text and question that layers and answers are about; None before there are any.
    prompt : list of int
        What was asked last.
    answer : str
        What is right, if it is known.
    notice : str
        What the visitor is told while something runs.
    decided : dict of int to LayerDecided
        How it was routed.
    cards : dict of str to Card
        What was answered.
    pins : dict of int to bool
        Layers that the visitor forces.
    stop : threading.Event
        Ends what runs for this visitor.
    is_running : bool
        Whether something does, or waits for its turn.
    asked : deque of bool
        Of each click that has yet to reach ``ask``, whether it is to be answered.
    """

    def __init__(self):
        self.pins: dict[int, bool] = {}
        self.stop, self.is_running, self.asked = threading.Event(), False, deque[bool]()
        self.clear()

    def clear(self, about: tuple[str, str] | None = None) -> None:
        """Forget layers and answers: they were about another text or question."""
        self.about, self.prompt = about, list[int]()
        self.decided: dict[int, LayerDecided] = {}
        self.cards = {way: Card(way) for way in WAYS}
        self.answer = self.notice = ""


class Page:
    """
    Makes the page for a player, and answers its events.

    Parameters
    ----------
    player : Player
        The model that answers.
    """

    def __init__(self, player: Player):
        self.player, self.text = player, example_text()
        self.visits: dict[str, Visit] = {}
        self.source = "prompt" if player.routing.config.ranking is None else "budget"

    def visit(self, request: gr.Request) -> Visit:
        """Return what the visitor who sent a request sees."""
        return self.visits.setdefault(str(request.session_hash), Visit())

    # What stands on the page.

    def blocks(self) -> gr.Blocks:
        """Lay the page out, and connect what is on it."""
        routing, pages = self.player.routing, documents()
        with gr.Blocks(title="flux-attention playground", analytics_enabled=False) as blocks:
            gr.Navbar(visible=bool(pages), main_page_name="Playground")
            gr.HTML(self._introduction())
            with gr.Row(elem_classes="asking"):
                with gr.Column(scale=3):
                    text = gr.Textbox(self.text, label="Text", lines=8, max_lines=8, elem_id="text")
                    planted = gr.HTML(self._planted(), elem_id="planted")
                with gr.Column(scale=2):
                    question = gr.Textbox(
                        EXAMPLES[0].question, label="Question about it (none: continue the text)", elem_id="question"
                    )
                    gr.HTML('<p class="small">Examples, all about one text; a click asks:</p>')
                    with gr.Row(elem_classes="examples"):
                        examples = [gr.Button(example.name, size="sm", min_width=80) for example in EXAMPLES]
                    budget = gr.Slider(
                        0,
                        1,
                        routing.budget or 0,
                        step=0.05,
                        label="Budget: share of sparse layers",
                        visible=routing.budget is not None,
                        elem_id="budget",
                    )
                    with gr.Row(elem_classes="buttons"):
                        ask = gr.Button("Ask", variant="primary", min_width=80, elem_id="ask")
                        stop = gr.Button("Stop", min_width=80, elem_id="stop")
            message = gr.HTML(elem_id="message")
            strip = gr.HTML(
                drawing.strip(routing.layers, {}, {}) + drawing.PRESS,
                html_template=f"<h2>Layers</h2>{drawing.legend(routing.sparse)}${{value}}",
                js_on_load=CLICKS,
                elem_id="strip",
                elem_classes=[] if routing.config.ranking is None else "unrouted",
            )
            free = gr.Button("Let all layers go", size="sm", visible=False, elem_id="free")
            cards = gr.HTML(
                drawing.cards(Visit().cards, self.source),
                html_template=f"<h2>Answers</h2>{drawing.times('performance' in pages)}${{value}}",
                elem_id="cards",
            )
            gr.HTML(self._onwards(pages))
            self._connect_asking(ask, examples, [text, question, budget], [message, strip, cards])
            text.change(lambda text: gr.update(visible=text == self.text), text, planted, queue=False, **QUIET)
            stop.click(self.stop, queue=False, **QUIET)
            strip.click(self.pin, outputs=[message, strip, free], queue=False, **QUIET)
            free.click(self.free, outputs=[message, strip, free], queue=False, **QUIET)
            blocks.unload(self.leave)
        for address, (name, content) in pages.items():
            with blocks.route(name, address, show_in_navbar=address in IN_MENU):
                gr.Navbar(main_page_name="Playground")
                gr.Markdown(content)
        return blocks

    def _connect_asking(self, ask: gr.Button, examples: list[gr.Button], inputs: list, shown: list) -> None:
        """Connect all that asks, one after the other, and what takes answers away."""
        text, question, _ = inputs
        boxes = [text, question]

        def run(begun: gr.events.Dependency) -> None:
            begun.then(self.ask, inputs, shown, concurrency_limit=1, concurrency_id="ask", **QUIET)

        run(gr.on([ask.click, question.submit], self.begin, boxes, shown, queue=False, **QUIET))
        for button, example in zip(examples, EXAMPLES, strict=True):
            filled = button.click(
                lambda example=example: (self.text, example.question), outputs=boxes, queue=False, **QUIET
            )
            run(filled.then(self.begin, boxes, shown, queue=False, **QUIET))
        typed = dict(queue=False, trigger_mode="always_last", **QUIET)
        gr.on([text.input, question.input], self.edit, boxes, shown, **typed)

    def _introduction(self) -> str:
        player, routing = self.player, self.player.routing
        change = "question"
        if player.adapter is None:
            source = "no routers were trained yet, so all layers run full until you force some"
        elif routing.config.ranking is not None:
            source = "calibration chose which layers are full, the same for every prompt"
            change = "budget"
        else:
            source = "a small <em>router</em> beside each layer decides, from the prompt, while it is read"
        facts = [
            f"Model: <b>{escape(player.name)}</b>",
            *([f"adapter: <b>{escape(player.adapter)}</b>"] if player.adapter else []),
            f"{player.model.num_parameters() / 1e6:,.0f} M parameters",
            f"{len(routing.layers)} routed layers",
            f"on {player.model.device.type}",
        ]
        return (
            "<h1>Which layers does a prompt need?</h1>"
            "<p>In a language model every layer looks back at the whole prompt, and keeps it in memory for every new "
            "token. Many prompts do not need that. A <b>route</b> is one bit for each prompt and layer: "
            '<b class="full">full</b>, a token sees all tokens before it, or <b class="sparse">sparse</b>, it sees '
            f"{drawing.reach(routing.sparse)}: less to compute, and less to keep. Here {source}. "
            f'Ask, and watch the layers light up; then change the {change} and ask again.</p><p class="model">'
            f"{', '.join(facts)}</p>"
        )

    def _planted(self) -> str:
        places = {fact: self.player.count(self.text[: self.text.index(fact)].rstrip(" ")) for fact in FACTS}
        named = tuple(fact for example in EXAMPLES for fact in example.facts)
        return drawing.planted(places, named, self.player.count(self.text), self.player.routing.sparse)

    def _onwards(self, pages: dict[str, tuple[str, str]]) -> str:
        steps = (
            ("serve", "Serve a model", "FLUX_ATTENTION_ROUTERS=ADAPTER vllm serve MODEL", "faster, in less memory"),
            ("calibrate", "Calibrate yours", "flux-attention calibrate MODEL --output DIR", "in minutes, no data"),
            ("train", "Train routers", "flux-attention train RECIPE.yaml", "layers by the prompt"),
        )

        def title(address: str, name: str) -> str:
            return f'<a href="/{address}">{name}</a>' if address in pages else name

        boxes = "".join(
            f"<li><b>{title(address, name)}</b> <small>{says}</small><code>{command}</code></li>"
            for address, name, command, says in steps
        )
        words = ' Words are in the <a href="/glossary">glossary</a>.' if "glossary" in pages else ""
        return (
            f'<h2>Where to go from here</h2><ul class="onwards">{boxes}</ul><p class="small">The three ways run one '
            f"after the other, so that their times can be compared.{words}</p>"
        )

    # What its buttons do.

    def _drawn(self, visit: Visit, error: str = "", is_reading: bool = False) -> tuple[str, str, str]:
        strip = drawing.strip(self.player.routing.layers, visit.decided, visit.pins, is_reading)
        summary = drawing.PRESS
        if visit.about is not None:
            summary = drawing.summary(visit.cards["routed"], visit.cards["dense"], visit.pins, visit.answer)
        return drawing.message(error or visit.notice), strip + summary, drawing.cards(visit.cards, self.source)

    def edit(self, text: str, question: str, request: gr.Request):
        """Take away, with what runs, layers and answers that are not about what now stands in the boxes."""
        visit = self.visit(request)
        if visit.about is None or visit.about == (text, question):
            return (gr.skip(),) * 3
        visit.stop.set()
        visit.stop, visit.is_running = threading.Event(), False
        visit.asked = deque([False] * len(visit.asked))
        visit.clear()
        return self._drawn(visit)

    def begin(self, text: str, question: str, request: gr.Request):
        """Show at once that answers are to come, as other visitors may be first; what runs makes way."""
        visit = self.visit(request)
        visit.stop.set()
        if visit.about != (text, question):
            visit.clear((text, question))
        visit.stop, visit.is_running = threading.Event(), True
        visit.asked = deque([False] * len(visit.asked) + [True])
        visit.cards = {way: card.changed(state="waiting for its turn") for way, card in visit.cards.items()}
        return self._drawn(visit)

    def ask(self, text: str, question: str, budget: float, request: gr.Request) -> Iterator[tuple]:
        """Answer by every way; again by those only that pins and budget change, where the prompt is as before."""
        visit, error = self.visits.get(str(request.session_hash)), ""
        if visit is None or not (visit.asked and visit.asked.popleft()):  # the visitor has left, or asked otherwise
            yield (gr.skip(),) * 3
            return
        stop = visit.stop
        try:
            prompt = self.player.encode(text, question)
            todo = ORDER[:1] if prompt == visit.prompt and all(card.report for card in visit.cards.values()) else ORDER
            visit.prompt, visit.answer = prompt, right_answer(text, question)
            for way, card in visit.cards.items():
                visit.cards[way] = Card(way, "waiting for its turn") if way in todo else card.changed(state="")
            for way in todo:
                if stop.is_set():
                    break
                yield from self._answer(visit, way, budget, is_question=bool(question.strip()))
        except PromptError as problem:
            error = str(problem)
            if visit.stop is stop:
                visit.clear()
        except Exception as problem:  # such as too little memory: the page lives on
            error = f"The model failed, {type(problem).__name__}: {problem}. Try a shorter text."
        finally:
            if visit.stop is stop:  # else another question waits already
                visit.is_running, visit.notice = False, ""
        if visit.stop is stop:
            for way, card in visit.cards.items():
                visit.cards[way] = card.changed(state="stopped" if stop.is_set() and not card.report else "")
        yield self._drawn(visit, error)

    def _answer(self, visit: Visit, way: str, budget: float, is_question: bool) -> Iterator[tuple]:
        player, routing = self.player, self.player.routing
        options = dict(
            pins=visit.pins,
            budget=budget if routing.budget is not None else None,
            stop=visit.stop,
            one_line=is_question and not player.has_chat,
        )
        cards, decided = visit.cards, visit.decided  # what a later question begins anew with is not written to
        if way == "routed":
            decided.clear()
        cards[way] = card = Card(way, "reading")
        yield self._drawn(visit, is_reading=way == "routed")
        layers = 0
        for event in player.ask(visit.prompt, way, **options):
            if isinstance(event, LayerDecided):
                layers += 1
                card = card.changed(state=f"reading, {layers}/{len(routing.layers)}")
                if way == "routed":
                    decided[event.layer] = event
            elif isinstance(event, Report):
                card = card.changed(state="", report=event)
            else:
                card = card.changed(state="writing", text=card.text + event)
            cards[way] = card
            yield self._drawn(visit, is_reading=way == "routed" and not card.text)

    def stop(self, request: gr.Request) -> None:
        """End what runs for this visitor."""
        self.visit(request).stop.set()

    def leave(self, request: gr.Request) -> None:
        """End what runs for a visitor who closed the page, and forget it."""
        if visit := self.visits.pop(str(request.session_hash), None):
            visit.stop.set()

    def pin(self, request: gr.Request, event: gr.EventData):
        """Force a layer to be what it was not; or let it go."""
        visit, layer = self.visit(request), event.layer
        if visit.is_running:
            visit.notice = "Layers can be forced when the answers are there: wait, or press Stop."
            return drawing.message(visit.notice), gr.skip(), gr.skip()
        if layer in visit.pins:
            del visit.pins[layer]
        elif layer in self.player.routing.layers:
            known = visit.decided.get(layer)
            visit.pins[layer] = known is None or not known.is_full
        return self._pinned(visit)

    def free(self, request: gr.Request):
        """Let all layers go."""
        visit = self.visit(request)
        if not visit.is_running:
            visit.pins.clear()
        return self._pinned(visit)

    def _pinned(self, visit: Visit):
        strip, summary = drawing.strip(self.player.routing.layers, visit.decided, visit.pins), drawing.PRESS
        if visit.about is not None:
            says = "Layers are forced: ask again to see what that does." if visit.pins else "Ask again."
            summary = f'<p class="summary">{says}</p>'
        return "", strip + summary, gr.update(visible=bool(visit.pins))


def theme() -> gr.Theme:
    """Make the theme: fonts that the reader has, as none is fetched, and the figures' colours."""
    system = ["-apple-system", "Segoe UI", "Helvetica", "Arial", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    base = gr.themes.Base(primary_hue="orange", neutral_hue="gray", font=system, font_mono=mono)
    return base.set(
        body_background_fill="#ffffff",
        input_background_fill="#f6f8fa",
        input_background_fill_dark="#0d1117",
        button_secondary_background_fill_dark="#262d36",
        button_secondary_background_fill_hover_dark="#323b46",
        body_background_fill_dark="#0d1117",
        block_background_fill_dark="#151b23",
        slider_color="#d1480d",
        slider_color_dark="#f47d43",
        button_primary_background_fill="#d1480d",
        button_primary_background_fill_hover="#b53d0a",
        button_primary_text_color="#ffffff",
        button_primary_background_fill_dark="#f47d43",
        button_primary_background_fill_hover_dark="#ff9460",
        button_primary_text_color_dark="#0d1117",
    )


def launch(player: Player, port: int | None = None) -> tuple[gr.Blocks, str]:
    """
    Serve the page from a thread of its own, to this machine alone unless ``GRADIO_SERVER_NAME`` says otherwise.

    Parameters
    ----------
    player : Player
        The model that answers.
    port : int, optional
        Default: ``GRADIO_SERVER_PORT``, or the first free one from 7860 on.

    Returns
    -------
    gradio.Blocks
        Ends with ``close()``.
    str
        The page's address.

    Raises
    ------
    ValueError
        If the port is taken.
    """
    blocks = Page(player).blocks()
    try:
        _, address, _ = blocks.launch(
            server_port=port,
            theme=theme(),
            css_paths=STYLE,
            footer_links=[],
            share=False,  # nothing leaves this machine, and nothing is fetched
            ssr_mode=False,
            enable_monitoring=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        if "empty port" not in str(error):
            raise
        wanted = "the ports from 7860 on are" if port is None else f"port {port} is"
        raise ValueError(f"{wanted} taken, by another playground perhaps; end that, or give another port") from None
    return blocks, address
