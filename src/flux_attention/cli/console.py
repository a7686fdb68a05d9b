"""Holds what commands print to, how they show that they are at work, and the error that a user can mend."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.status import Status
from rich.table import Column, Table
from rich.text import Text

out, err = Console(), Console(stderr=True)
#: Seconds between lines of progress where there is no terminal to draw a bar on.
LINE_SECONDS = 20


class UserError(Exception):
    """Tells of something that the user can mend."""


@contextmanager
def working(text: str) -> Iterator[Status]:
    """
    Show what is at work: by a spinner, or where there is no terminal by a line, if PyTorch is to be imported first.

    That takes seconds, in which a command that says nothing seems to hang.
    """
    if not err.is_terminal and "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
        err.print(f"{text} …", highlight=False, markup=False, soft_wrap=True)
    with err.status(escape(text)) as status:
        yield status


class Bars:
    """
    Shows how far a command is: a bar for each thing that it does, or where there is no terminal a line now and then.

    It is what ``progress`` of calibrations, training and evaluations takes, within a ``with`` block. Nothing is drawn
    before the first call: of processes that train together one tells, and the others have the same terminal.
    """

    def __init__(self) -> None:
        now = TextColumn("[dim]{task.fields[now]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
        columns = TextColumn("{task.description}"), BarColumn(16), TextColumn("{task.fields[count]}"), _Left(), now
        # What is printed meanwhile goes above the bars, but not out of a file that it is written to.
        options = dict(console=err, transient=True, expand=True, redirect_stdout=out.is_terminal)
        self._progress, self._tasks = Progress(*columns, **options), {}
        self._told = time.monotonic()

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_) -> None:
        if self._tasks:  # else nothing was begun, but an empty line would end it
            self._progress.stop()

    def __call__(self, what: str, done: int, total: int, now: str = "", share: float | None = None) -> None:
        """See ``flux_attention.progress.Progress``."""
        self._progress.start()
        share = done / max(1, total) if share is None else share
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=1.0, now="", count="")
        task, count = self._tasks[what], f"{done:,} of {total:,}"
        if share < self._progress.tasks[task].completed:  # the same again, of another length
            self._progress.reset(task)
        self._progress.update(task, completed=min(1.0, share), count=count, now=escape(now))
        if err.is_terminal or time.monotonic() - self._told < LINE_SECONDS:
            return
        self._told = time.monotonic()
        left = time_left(self._progress.tasks[task].elapsed, share)
        text = ", ".join(filter(None, (f"{what}: {count}", left, now)))
        err.print(text, highlight=False, markup=False, soft_wrap=True)


class _Left(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(time_left(task.elapsed, task.completed), style="cyan")


def time_left(elapsed: float | None, share: float) -> str:
    """Say how long the rest takes, if it goes on as so far; nothing before that is known, or where there is none."""
    if not elapsed or not 0 < share < 1:
        return ""
    seconds = elapsed * (1 - share) / share
    if seconds < 60:
        return f"{max(1, round(seconds))} s left"
    minutes = round(seconds / 60)
    return f"{minutes} min left" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min left"


#: Longer names in tables are broken between words.
NAME_WIDTH = 18


def print_table(heading: Sequence[str], lines: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Print a table; one that is too wide for the terminal in parts, each with the first column."""
    columns = list(zip(heading, *lines, strict=True))
    for number, part in enumerate(_parts([_least(*column) for column in columns])):
        table = Table(title=None if number else title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.show_edge, room = False, out.width - sum(width + GAP for _, width in part)
        for place, width in part:
            is_text = _is_text(columns[place][1:])
            more = max(0, min(room, max(map(len, columns[place])) - width)) if is_text else 0
            room -= more
            table.add_column(escape(heading[place]), justify="left" if is_text else "right", width=width + more)
        for line in lines:
            table.add_row(*(escape(line[place]) for place, _ in part))
        out.print(table)
        out.print()


GAP = 2


def _parts(widths: list[int]) -> list[list[tuple[int, int]]]:
    """Split columns, of which these are the least widths: (place, width) of those that fit beside one another."""
    first, *others = enumerate(widths)
    parts = [[first]]
    for place, width in others:
        if len(parts[-1]) > 1 and sum(each + GAP for _, each in parts[-1]) + width > out.width:
            parts.append([first])
        parts[-1].append((place, width))
    return parts


def _is_text(cells: Sequence[str]) -> bool:
    return any(character.isalpha() for cell in cells for character in cell)


def _least(heading: str, *cells: str) -> int:
    """Return how narrow a column may be: headings and names are broken between words, numbers are not."""
    longest = max(map(len, (*heading.split(), " ")))
    if not _is_text(cells):
        return max(longest, *map(len, cells), 1)
    words = [word for cell in cells for word in cell.split()]
    return max(longest, *map(len, words), min(NAME_WIDTH, max(map(len, cells))))
