"""Asks a server many things at once, and judges what came back.

Each prompt hides a code of its own in real text, and asks for it at the end.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from flux_attention.serving.settings import KEY
from flux_attention.tasks.samples import Haystack, make_sample

#: How a client takes its answer: whole or piece by piece, to the end or only to somewhere in the middle.
WHOLE, STREAM, LEAVE_WHOLE, LEAVE_STREAM = "whole", "stream", "left while waiting", "left in the stream"
#: What became of a request.
ANSWERED, LEFT, REFUSED, RESTARTED, FAILED = "answered", "left by us", "refused", "hit a restart", "FAILED"


@dataclass
class Ask:
    """
    Holds one request, and what became of it.

    Attributes
    ----------
    body : dict or bytes
        What is sent.
    code : str or None
        The code that is hidden in it; None for what must be refused.
    manner : str
        How the client takes it.
    leave : float
        After how many seconds, or pieces of a stream, it leaves.
    omega : float or None
        Share of sparse layers that was asked for, if any.
    alone : str or None
        What was answered when nobody else asked.
    text : str or None
        The answer.
    asked : bool
        Whether it was sent.
    fate, reason : str or None
        One of the above, and what was wrong.
    """

    body: dict[str, Any] | bytes
    code: str | None = None
    manner: str = WHOLE
    leave: float = 0
    omega: float | None = None
    alone: str | None = None
    text: str | None = None
    asked: bool = False
    fate: str | None = None
    reason: str | None = None

    @property
    def first_line(self) -> str:
        """The answer to the question; the model goes on behind it."""
        return first_line(self.text)

    @property
    def lost_alone(self) -> bool:
        """Whether it was answered right alone, and now is not."""
        return first_line(self.alone) == self.code != self.first_line


def first_line(text: str | None) -> str:
    """Return the answer to the question in a text."""
    return (text or "").split("\n")[0].strip()


def make_asks(count: int, context: int, tokenizer: Any, haystack: Haystack, draw: random.Random) -> list[Ask]:
    """Make requests of all kinds; those with a code have each another one."""
    found, codes, seed = [], set(), draw.randrange(10**6)
    longest = 3 * context // 4
    while len(found) < count:
        seed += 1
        if draw.random() < 0.12:
            found.append(Ask(draw.choice(nonsense(context))))
            continue
        length = draw.choice([draw.randint(150, 400), draw.randint(150, longest), draw.randint(longest // 2, longest)])
        sample = make_sample("single_needle", haystack, tokenizer, length, seed)
        code = tokenizer.decode(sample.answer_ids.tolist()).strip()
        if code not in codes:
            codes.add(code)
            found.append(_ask(sample.prompt_ids.tolist(), code, context, tokenizer, draw))
    return found


def _ask(prompt: list[int], code: str, context: int, tokenizer: Any, draw: random.Random) -> Ask:
    wish, omega = draw.choice([(None, None)] * 3 + [
        ("full", 0.0), ("sparse", 1.0), (0.5, 0.5), ("0.3", 0.3), ("3,7", 0.8), (0, 0.0),
    ])  # fmt: skip
    new = draw.choice([8, 16, draw.randint(1, context // 4), context // 4])
    manner = draw.choice([WHOLE, STREAM] * 4 + [LEAVE_WHOLE, LEAVE_STREAM])
    body: dict[str, Any] = {
        "model": "shipped", "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True,
    }  # fmt: skip
    if draw.random() < 0.3:
        body |= {"prompt": tokenizer.decode(prompt), "add_special_tokens": False}
    if wish is not None:
        body["vllm_xargs"] = {"flux_routes": wish}
    if draw.random() < 0.1:
        body["logprobs"] = 2
    if manner in (STREAM, LEAVE_STREAM):
        body["stream"] = True
    if manner == LEAVE_STREAM:
        body["max_tokens"] = context // 4
    leave = draw.uniform(0, 3) if manner == LEAVE_WHOLE else draw.randint(0, 40)
    return Ask(body, code, manner, leave, omega)


def nonsense(context: int) -> list[dict[str, Any] | bytes]:
    """List what a server must refuse by 4xx."""
    good = {"model": "shipped", "prompt": "def area(width, height):", "max_tokens": 8}
    wrong = [
        {"model": "nothing"}, {"max_tokens": -5}, {"max_tokens": "many"}, {"temperature": -1}, {"top_p": 7},
        {"prompt": [5] * (context + 1)}, {"prompt": [10**7]}, {"prompt": {"text": "def"}}, {"n": 0}, {"stop": [1]},
        {"vllm_xargs": "full"}, {"vllm_xargs": {"flux_routes": {"a": 1}}},
    ]  # fmt: skip
    wishes = [
        {"flux_routes": "most"}, {"flux_routes": 2.5}, {"flux_routes": -1}, {"flux_routes": "99"},
        {"flux_routes": "3,3"}, {"flux_routes": ""}, {"flux_routes": "nan"}, {"flux_budget": 0.5},
        {"flux_budget": "half"}, {"flux_route": "full"}, {"flux_routes": "full", "flux_budget": 0.5},
    ]  # fmt: skip
    bodies = [{**good, **some} for some in wrong] + [{**good, "vllm_xargs": wish} for wish in wishes]
    return [*bodies, b"{", b"", b"[]", b'"def"', b"\xff\xfe", json.dumps(good).encode()[:-9]]


@dataclass
class Client:
    """
    Asks a server.

    Attributes
    ----------
    url : str
    epoch : int
        Grows by one when the server is about to be killed.
    up : asyncio.Event
        Whether it is there.
    """

    url: str
    session: aiohttp.ClientSession
    epoch: int = 0
    up: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask(self, ask: Ask) -> None:
        """Send a request, and note what became of it."""
        await self.up.wait()
        ask.asked, epoch = True, self.epoch
        try:
            await asyncio.wait_for(self._ask(ask), ask.leave if ask.manner == LEAVE_WHOLE else None)
        except asyncio.TimeoutError as error:
            ask.fate, ask.reason = LEFT if ask.manner == LEAVE_WHOLE else FAILED, f"timed out: {error}"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            ask.fate, ask.reason = FAILED, f"{type(error).__name__}: {error}"
        if ask.fate == FAILED and self.epoch != epoch:
            ask.fate = RESTARTED

    async def _ask(self, ask: Ask) -> None:
        data = ask.body if isinstance(ask.body, bytes) else json.dumps(ask.body).encode()
        url, headers = f"{self.url}/v1/completions", {"Content-Type": "application/json"}
        async with self.session.post(url, data=data, headers=headers) as response:
            if response.status != 200:
                # vLLM 0.25.1 says that it failed where JSON is no object: before anything of ours, and nothing is lost.
                worst = 501 if isinstance(ask.body, bytes) else 500
                refused = ask.code is None and 400 <= response.status < worst
                ask.fate, ask.reason = REFUSED if refused else FAILED, f"HTTP {response.status}"
                ask.reason += f": {(await response.text())[:300]}"
            elif ask.code is None:
                ask.fate, ask.reason = FAILED, f"answered, but should have been refused: {str(ask.body)[-200:]}"
            elif ask.manner in (WHOLE, LEAVE_WHOLE):
                self._take(ask, await response.json())
            else:
                await self._stream(ask, response)

    def _take(self, ask: Ask, answer: dict[str, Any]) -> None:
        ask.text, ask.fate = answer["choices"][0]["text"], ANSWERED
        told = (answer.get("kv_transfer_params") or {}).get(KEY, {}).get("omega_msr")
        if told is None:
            ask.fate, ask.reason = FAILED, "the answer does not say how it was routed: is the plugin there?"
        elif ask.omega is not None and abs(told - ask.omega) > 1e-6:
            ask.fate, ask.reason = FAILED, f"routed with Ω_MSR {told}, asked for {ask.omega}"

    async def _stream(self, ask: Ask, response: aiohttp.ClientResponse) -> None:
        pieces, ended = [], False
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                ended = True
                break
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(f"an error in the stream: {event['error']}")
            pieces += [choice["text"] for choice in event["choices"]]
            if ask.manner == LEAVE_STREAM and len(pieces) > ask.leave:
                response.close()
                ask.fate = LEFT
                return
        ask.text, ask.fate = "".join(pieces), ANSWERED if ended else FAILED
        ask.reason = None if ended else "the stream broke off"


async def crowd(
    client: Client, asks: Sequence[Ask], clients: int, tell: Callable[[int], Awaitable[bool]], until: float
) -> None:
    """Let so many clients ask all of them, while there is time and ``tell``, who hears how many are done, says so."""
    waiting, done = iter(asks), 0

    async def one() -> None:
        nonlocal done
        for ask in waiting:
            if time.monotonic() > until:
                return
            await client.ask(ask)
            done += 1
            if not await tell(done):
                return

    await asyncio.gather(*(one() for _ in range(clients)))


def suspicious(asks: Sequence[Ask], near: int) -> list[Ask]:
    """
    List the wrong answers of requests that ran full, and those that hold another request's code.

    That is one of at most ``near`` before or behind it: of requests that were asked long before no page is left, and a
    wrong answer is one of thousands of codes by chance.
    """
    found = []
    for place, ask in enumerate(asks):
        others = {other.code for other in asks[max(0, place - near) : place + near + 1] if other.code} - {ask.code}
        wrong = ask.omega == 0 and _complete(ask) and ask.first_line != ask.code
        if wrong or (ask.text and any(code in ask.first_line for code in others)):
            found.append(ask)
    return found


def _complete(ask: Ask) -> bool:
    """Whether the answer had room for a code."""
    return ask.fate == ANSWERED and ask.body["max_tokens"] >= 8


def fates(asks: Sequence[Ask]) -> dict[str, int]:
    """Count what became of requests that were sent."""
    return dict(Counter(ask.fate or "LOST" for ask in asks if ask.asked))


def accuracy(asks: Sequence[Ask]) -> dict[str, tuple[int, int]]:
    """Count right answers, and answers, by the routes that were asked for."""
    found: dict[str, tuple[int, int]] = {}
    for ask in asks:
        if _complete(ask):
            wish = "as routed" if ask.omega is None else f"Ω {ask.omega:g}"
            right, all_ = found.get(wish, (0, 0))
            found[wish] = right + (ask.first_line == ask.code), all_ + 1
    return dict(sorted(found.items()))
