"""Reads and checks arguments that several commands take, before anything is loaded."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flux_attention.cli.console import UserError
from flux_attention.files import check_writable

#: Groups of options, in the order in which help shows them.
ASKED, ROUTES, RESULT, MACHINE = "What is asked", "Which layers run full", "Result", "Machine"
#: What options take, in help.
FILE, FOLDER, NUMBER, SHARE, NAMES = "FILE", "FOLDER", "N", "SHARE", "A,B,…"


def asked(help: str, *names: str, **more: Any) -> Any:
    """Make an option about what is asked."""
    return typer.Option(*names, help=help, rich_help_panel=ASKED, **more)


def about_routes(help: str, *names: str, **more: Any) -> Any:
    """Make an option about the layers that run full."""
    return typer.Option(*names, help=help, rich_help_panel=ROUTES, **more)


def about_result(help: str, *names: str, **more: Any) -> Any:
    """Make an option about what is left or printed."""
    return typer.Option(*names, help=help, rich_help_panel=RESULT, **more)


def about_machine(help: str, *names: str, **more: Any) -> Any:
    """Make an option about where and how the model runs."""
    return typer.Option(*names, help=help, rich_help_panel=MACHINE, **more)


Model = Annotated[
    str, typer.Argument(help="Folder, Hub id or GGUF file of a causal LM; 'shipped' for the one that comes along.")
]
Text = Annotated[str | None, typer.Argument(help="File with the prompt, or - for standard input.")]
Chat = Annotated[
    bool | None, asked("Put prompts through the chat template; default: if there is one.", "--chat/--no-chat")
]
Routers = Annotated[str | None, about_routes("Folder or Hub id of an adapter.", metavar="ADAPTER")]
Force = Annotated[
    str | None,
    about_routes(
        "Ignore the routers: 'full', 'sparse', a ratio with a point (0.75), or the full layers (3,7).", metavar="ROUTES"
    ),
]
Budget = Annotated[
    float | None,
    about_routes("Share of sparse layers, of an adapter that has a budget.", min=0, max=1, metavar=SHARE),
]
Decide = Annotated[
    str | None,
    about_routes("When routers read the prompt: prefill, or ends, its two ends beforehand.", metavar="WHEN"),
]
Json = Annotated[bool, about_result("Print JSON, for programs.", "--json")]
Device = Annotated[str | None, about_machine("cpu, cuda, cuda:1 …; default: cuda if there is one.", metavar="NAME")]
Dtype = Annotated[
    str,
    about_machine(
        "float32, bfloat16, float16, or auto: the checkpoint's own, but float32 on a CPU without fast bfloat16.",
        metavar="NAME",
    ),
]


def command_line() -> str:
    """Return the call at work, for pages that say where they are from."""
    return shlex.join(["flux-attention", *sys.argv[1:]])


def check_page(path: Path) -> None:
    """Refuse a page that cannot be written, before a model is loaded."""
    if path.is_dir():
        raise UserError(f"--html is {path}, a folder; expected a file, such as {path / 'routes.html'}")
    check_writable(path.parent)


def read_text(source: str | None) -> str:
    """Read the prompt, without the newline that editors put at a file's end."""
    if source in (None, "-"):
        if source is None and sys.stdin.isatty():
            raise UserError("no prompt: name a file, or - to read standard input")
        source, content = "standard input", sys.stdin.buffer.read()
    else:
        path = Path(source)
        if not path.exists() or path.is_dir():
            raise UserError(f"{source} is not a file; name a text file, or - for standard input")
        content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source} is not UTF-8 text (byte {error.start}); expected text, so convert it first"
        ) from None
    if not text.strip():
        raise UserError(f"the prompt in {source} is empty; expected some text")
    return text.removesuffix("\n")


def read_force(spec: str | None) -> Any:
    """Read what ``Routing.force`` takes."""
    if spec is None:
        return None
    from flux_attention.routes import read_spec

    return read_spec(spec)


def read_numbers(text: str, kind: type, minimum: float, maximum: float) -> list:
    """Read numbers separated by commas; lengths may end in K."""
    try:
        numbers = [kind(float(part[:-1]) * 1024) if part[-1] in "kK" else kind(part) for part in text.split(",")]
    except (ValueError, IndexError):
        raise UserError(f"{text!r} is not a list of numbers such as 1K,32K or 0.5,0.75") from None
    if not all(minimum <= number <= maximum for number in numbers):
        raise UserError(f"{text!r} has a number that is not between {minimum} and {maximum}")
    return numbers
