"""Tells how far an evaluation is: what is being done, how many samples of it, and which share of the work that is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """
    Takes what is being done, how much of it is done and how much there is.

    ``now`` says more of what is at work, ``share`` which part of the work is done, where that is not ``done / total``.
    """

    def __call__(self, what: str, done: int, total: int, now: str = "", share: float | None = None) -> object: ...


def silent(what: str, done: int, total: int, now: str = "", share: float | None = None) -> None:
    """Show nothing."""


class Tally:
    """
    Counts samples; one of twice the tokens is twice the work.

    Parameters
    ----------
    what : str
        What is counted.
    work : dict of int
        How many samples there are, by their tokens.
    progress : Progress
    """

    def __init__(self, what: str, work: dict[int, int], progress: Progress):
        self.what, self.progress = what, progress
        self.total, self.work = sum(work.values()), sum(tokens * count for tokens, count in work.items())
        self.done, self.worked = 0, 0

    def leave_out(self, count: int, tokens: int) -> None:
        """Do not count samples that an earlier run has measured."""
        self.total -= count
        self.work -= count * tokens

    def start(self, tokens: int, now: str) -> Callable[[int], None]:
        """Say what is at work; return what counts its samples as they are done."""

        def count(samples: int) -> None:
            self.done += samples
            self.worked += samples * tokens
            self.progress(self.what, self.done, self.total, now, self.worked / max(1, self.work))

        count(0)
        return count
