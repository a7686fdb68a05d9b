"""Writes what stands below a command's options in its help: examples, and of ``eval`` methods and families."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from rich.console import Group
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from flux_attention.cli.console import out


class _Command(TyperCommand):
    """Shows examples below its help, and what ``more`` gives, which is imported no earlier."""

    examples: tuple[str, ...] = ()
    more: Callable[[], Iterable] = tuple

    def format_help(self, ctx, formatter) -> None:
        """See ``click.Command.format_help``."""
        super().format_help(ctx, formatter)
        out.print(" [bold]Examples[/]")
        for line in self.examples:
            out.print(f" [dim]$[/] flux-attention {escape(line)}", highlight=False, soft_wrap=True)
        out.print()
        if more := list(type(self).more()):
            out.print(Padding(Group(*more), (0, 1)))


def with_examples(*lines: str, more: Callable[[], Iterable] = tuple) -> type[TyperCommand]:
    """Make the class of a command with these examples: calls, without the program's name."""
    return type("Command", (_Command,), {"examples": lines, "more": staticmethod(more)})


def methods_and_families() -> Iterator[Table | Text]:
    """List methods, with what each has full, and families by their task class."""
    from flux_attention.evaluation.methods import ABOUT
    from flux_attention.tasks.families import EVERY_FAMILY
    from flux_attention.tasks.questions import NATURAL

    classes: dict[str, list[str]] = {}
    for name, family in NATURAL.items():
        classes.setdefault(family.task_class, []).append(name)
    in_words = {task_class: ", ".join(names) for task_class, names in classes.items()}
    yield from _listed("Methods, and what is full in each", ABOUT)
    yield from _listed("Families of questions in words, for chat models, by task class", in_words)
    yield from _listed("Families for any model, hidden in source code", {"all": ", ".join(EVERY_FAMILY)})


def _listed(title: str, entries: dict[str, str]) -> Iterator[Table | Text]:
    yield Text(title, style="bold")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for name, about in entries.items():
        table.add_row(name, Text(about))
    yield table
    yield Text()
