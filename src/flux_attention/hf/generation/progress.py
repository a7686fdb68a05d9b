"""Notes how far a generation is, by the host's clock and between the calls that it makes anyway."""

from __future__ import annotations

import time
from collections.abc import Sequence


class Progress:
    """
    Notes when a generation's prompt was begun and done, and how long it was.

    Only the clock is read, so no device is waited for. The prompt is done when the call for the second new token
    begins, or, where steps are captured, when the first token is there: ``generate`` has by then waited for that token
    itself, as it has to know whether to stop.

    Attributes
    ----------
    began, done : float or None
        Seconds of ``time.perf_counter`` at which the prompt's first forward call began, and the prompt was done.
    past, lengths : list of int
        Real tokens of each sequence that were cached before, and those with the prompt.
    """

    def __init__(self):
        self.began: float | None = None
        self.done: float | None = None
        self.past: list[int] = []
        self.lengths: list[int] = []

    def call(self, began: float, is_prompt: bool, past: Sequence[int], lengths: Sequence[int]) -> None:
        """
        Note a forward call.

        Parameters
        ----------
        began : float
            When it began, seconds of ``time.perf_counter``.
        is_prompt : bool
            Whether it reads the prompt, or a chunk of it.
        past, lengths : sequence of int
            Real tokens of each sequence before the call, and with the prompt.
        """
        if self.began is None:
            self.began, self.past = began, list(past)
        elif not is_prompt:
            self.finish_prompt(began)
        if self.done is None:
            self.lengths = list(lengths)

    def finish_prompt(self, now: float | None = None) -> None:
        """Note that the prompt is done, ``now`` or at this moment; the first note counts."""
        if self.done is None:
            self.done = time.perf_counter() if now is None else now

    def times(self, ended: float, new_tokens: int) -> tuple[float, float | None]:
        """Return the seconds of the prompt, and those of each new token behind the first, if there is one."""
        done = ended if self.done is None else self.done
        return done - self.began, (ended - done) / (new_tokens - 1) if new_tokens > 1 else None
