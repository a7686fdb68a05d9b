"""Tells how far long work is: what is being done, and how much of it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """
    Takes what is being done, how much of it is done and how much there is.

    ``now`` says more of what is at work, ``share`` which part of the work is done, where that is not ``done / total``.
    """

    def __call__(self, what: str, done: int, total: int, now: str = "", share: float | None = None) -> object: ...


def silent(what: str, done: int, total: int, now: str = "", share: float | None = None) -> None:
    """Show nothing."""
