"""Counts the samples of an evaluation, and which share of its work they are."""

from __future__ import annotations

from collections.abc import Callable

from flux_attention.progress import Progress


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
