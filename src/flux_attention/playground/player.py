"""A player asks an attached model one prompt several ways, and tells what happens while it happens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from flux_attention.evaluation.base import exact_dense
from flux_attention.hf.handle import Routing
from flux_attention.hf.report import Report
from flux_attention.hf.support import max_positions
from flux_attention.hf.watching import watching
from flux_attention.tasks.encoding import encode_prompt, has_chat, joined

#: The ways of one prompt, with the routes that each forces.
WAYS = {"dense": "full", "routed": None, "sparse": "sparse"}
#: An answer's tokens at most: a laptop is to show three of them within seconds.
NEW_TOKENS = 64


class PromptError(ValueError):
    """Tells a visitor what is wrong with a prompt, and what to do."""


class Stopped(Exception):
    """Ends a generation that nobody waits for any more."""


@dataclass(frozen=True)
class LayerDecided:
    """
    Tells that a layer's route was decided, and that the layer is about to attend.

    Attributes
    ----------
    layer : int
        The layer's index in the model.
    is_full : bool
        Whether it runs full.
    margin : float or None
        The router's score of full minus that of sparse; None where no router ran.
    is_pinned : bool
        Whether the visitor forced it, whatever the router says.
    """

    layer: int
    is_full: bool
    margin: float | None
    is_pinned: bool


class Player:
    """
    Asks one model, for one visitor at a time.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With routers attached.
    tokenizer : transformers.PreTrainedTokenizerBase
    routing : Routing
        The handle that ``attach`` returned.
    name : str
        What visitors are told that the model is called.
    adapter : str, optional
        And its adapter; without one, routers are fresh: all layers run full.

    Raises
    ------
    ValueError
        For routers of KV heads, which save nothing that could be shown.
    UnsupportedModelError
        If the model cannot be routed, which a first short prompt finds out.
    """

    def __init__(self, model, tokenizer, routing: Routing, name: str, adapter: str | None = None):
        if routing.by_head:
            raise ValueError(
                "these routers decide on KV heads (granularity 'head') and save nothing; the playground shows routers "
                "of layers, or a calibrated adapter"
            )
        self.model, self.tokenizer, self.routing, self.name, self.adapter = model, tokenizer, routing, name, adapter
        self.has_chat = has_chat(tokenizer)
        # Routes belong to threads and would not mix. But prompts that ran at once would share the processor, and none
        # of the times on the page would be true; and the budget is one for all threads.
        self._turn, self._closed = threading.Lock(), threading.Event()
        # What a first call takes longer than later ones is no part of anybody's times.
        for _ in self.ask(self.encode("What is a route?", ""), "routed", new_tokens=2):
            pass

    @property
    def positions(self) -> int | None:
        """Tokens that the model reads at most."""
        return max_positions(self.model.config)

    def encode(self, text: str, question: str) -> list[int]:
        """
        Return the prompt's token ids: the text, and behind it what is asked, if anything.

        Raises
        ------
        PromptError
            If there is no text, or too much of it.
        """
        if not text.strip():
            raise PromptError("There is no text. Paste one, or pick an example, then ask.")
        prompt = self._prompt(text, " ".join(question.split()))
        ids = encode_prompt(prompt, self.tokenizer, self.has_chat)
        room = (self.positions or len(ids) + NEW_TOKENS) - NEW_TOKENS
        if len(ids) > room:
            much = 100 * (1 - room / len(ids))
            raise PromptError(
                f"The prompt is too long: it has {len(ids):,} tokens, and this model reads at most {room:,} with "
                f"{NEW_TOKENS} behind them for the answer. Take out about {much:.0f} % of the text."
            )
        return ids

    def _prompt(self, text: str, question: str) -> str:
        if not question:
            return text
        if self.has_chat:
            return joined(text, question)
        mark = "# " if self.name == "shipped" else ""  # which was trained on questions in comments
        return f"{text.rstrip()}\n{mark}Question: {question}\n{mark}Answer:"

    def count(self, text: str) -> int:
        """Return how many tokens a text has, outside a chat."""
        return len(encode_prompt(text, self.tokenizer, False))

    def ask(
        self,
        ids: list[int],
        way: str,
        pins: Mapping[int, bool] | None = None,
        budget: float | None = None,
        stop: threading.Event | None = None,
        one_line: bool = False,
        new_tokens: int = NEW_TOKENS,
    ) -> Iterator[LayerDecided | str | Report]:
        """
        Generate greedily, and yield what happens: each layer as it is decided, text as it comes, at last a report.

        Parameters
        ----------
        ids : list of int
            The prompt.
        way : str
            One of ``WAYS``.
        pins : mapping of int to bool, optional
            Layers that run full (True) or sparse (False), for ``routed``; the others are decided as ever.
        budget : float, optional
            The share of sparse layers, of an adapter that has one.
        stop : threading.Event, optional
            Ends the generation when it is set, between two layers or two tokens; there is no report then.
        one_line : bool
            Whether the answer ends with its line.
        new_tokens : int
            Tokens to generate at most.
        """
        stop, left = stop or threading.Event(), threading.Event()
        pins = (pins or {}) if way == "routed" else {}
        events = _Events(self.tokenizer, skip_prompt=True, skip_special_tokens=True)

        def is_over() -> bool:
            return stop.is_set() or left.is_set() or self._closed.is_set()

        def tell(layer: int, routes: list[bool], logits_B2: torch.Tensor | None) -> None:
            if is_over():
                raise Stopped
            margin = None if logits_B2 is None else float(logits_B2[0, 1] - logits_B2[0, 0])
            events.text_queue.put(LayerDecided(layer, routes[0], margin, layer in pins))

        def run() -> None:
            try:
                with self._turn:
                    if is_over():  # while it waited
                        raise Stopped
                    if budget is not None:
                        self.routing.budget = budget
                    with (
                        torch.no_grad(),
                        exact_dense(self.routing, way),
                        self.routing.force(WAYS[way]),
                        watching(tell, pins),
                    ):
                        self._generate(ids, events, _End(is_over, self.tokenizer if one_line else None), new_tokens)
                if not is_over():
                    events.text_queue.put(self.routing.report())  # this thread's
            except Stopped:
                pass
            except Exception as error:  # is raised where it is waited for
                events.text_queue.put(error)
            finally:
                events.text_queue.put(events.stop_signal)

        thread = threading.Thread(target=run, daemon=True)  # after Ctrl-C nobody waits for it
        thread.start()
        try:
            for event in events:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:  # also where the visitor has left
            left.set()

    def close(self) -> None:
        """End what is being generated, and wait until it has; Python cannot end well while PyTorch computes."""
        self._closed.set()
        self._turn.acquire()  # for good: nothing is generated any more

    def _generate(self, ids: list[int], streamer: _Events, end: _End, new_tokens: int) -> None:
        tokens = torch.tensor([ids], device=self.model.device)
        self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([end]),
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
        )


class _Events(TextIteratorStreamer):
    """
    Text, and all else that happens, in the order in which it happens: by one queue.

    It ends when whoever generates says so, not with the last text, as a report comes behind that.
    """

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """See ``TextIteratorStreamer``."""
        if text:
            self.text_queue.put(text)


class _End(StoppingCriteria):
    """Ends a generation that nobody waits for, or, where ``tokenizer`` is given, with the line."""

    def __init__(self, is_over: Callable[[], bool], tokenizer):
        self.is_over, self.tokenizer, self.has_begun = is_over, tokenizer, False

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        text = "" if self.tokenizer is None else self.tokenizer.decode(input_ids[0, -1:])
        self.has_begun |= bool(text.strip())
        ends = self.is_over() or (self.has_begun and "\n" in text)
        return torch.full((len(input_ids),), ends, device=input_ids.device)
