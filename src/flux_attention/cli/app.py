"""Lists the application's commands, and ends its errors."""

import os
import sys
import traceback
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.markup import escape

from flux_attention import __version__
from flux_attention.cli.bench import bench
from flux_attention.cli.calibrate import calibrate
from flux_attention.cli.console import UserError, err
from flux_attention.cli.demo import demo
from flux_attention.cli.evaluate import evaluate
from flux_attention.cli.help import methods_and_families, with_examples
from flux_attention.cli.importing import import_checkpoint
from flux_attention.cli.info import info
from flux_attention.cli.playground import playground
from flux_attention.cli.show import generate, inspect
from flux_attention.cli.train import train

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Full or sparse attention, decided per input and layer, for frozen Hugging Face language models.",
)
USE, MAKE, OTHER = "Use a model", "Choose or train its layers", "About this library"
#: Each command: its group in help, its function, and examples.
COMMANDS = {
    "inspect": (
        USE,
        inspect,
        (
            "inspect shipped README.md",
            "inspect MODEL prompt.txt --routers ADAPTER --html routes.html",
            "inspect MODEL prompt.txt --force 0.75 --json",
        ),
    ),
    "generate": (
        USE,
        generate,
        (
            "generate shipped README.md",
            "generate MODEL prompt.txt --routers ADAPTER --max-new-tokens 256",
            "generate MODEL - --no-chat < prompt.txt",
        ),
    ),
    "playground": (
        USE,
        playground,
        ("playground", "playground MODEL --routers ADAPTER"),
    ),
    "eval": (
        USE,
        evaluate,
        (
            "eval shipped --samples 10",
            "eval MODEL --force 0.5 --force 3,7,12 --lengths 16K --batch-size 4",
            "eval MODEL --routers ADAPTER --budgets 0.5,0.75 --lengths 16K",
            "eval MODEL --routers ADAPTER --records mine.jsonl",
            "eval MODEL --routers ADAPTER --tasks gsm8k --samples 100",
        ),
    ),
    "calibrate": (
        MAKE,
        calibrate,
        (
            "calibrate MODEL --output runs/model --length 16K --batch-size 8",
            "calibrate MODEL --output runs/model --records mine.jsonl",
        ),
    ),
    "train": (
        MAKE,
        train,
        ("train recipes/quickstart.yaml", "train recipes/models/qwen3-8b.yaml --dry-run"),
    ),
    "import": (
        MAKE,
        import_checkpoint,
        ("import CHECKPOINT --output runs/imported",),
    ),
    "demo": (OTHER, demo, ("demo", "demo --samples 4 --length 4096 --seed 1")),
    "info": (OTHER, info, ("info", "info --json")),
    "bench": (
        OTHER,
        bench,
        (
            "bench memory --gpu-gb 80",
            "bench prefill --compile --lengths 8K,32K --sparsities 0,0.75 --batches 1",
        ),
    ),
}
for name, (group, function, lines) in COMMANDS.items():
    more = methods_and_families if name == "eval" else tuple
    app.command(name=name, cls=with_examples(*lines, more=more), rich_help_panel=group)(function)


@dataclass
class Settings:
    """Holds the options that stand before a command."""

    debug: bool = False


def tell_version(asked: bool) -> None:
    """Print this library's version, if asked, and end."""
    if asked:
        print(f"flux-attention {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=tell_version, help="Show the version and exit.")
    ] = False,
):
    context.ensure_object(Settings).debug = debug


def tell_error(error: Exception) -> None:
    """Print an error as one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    kind = "" if isinstance(error, (UserError, ValueError)) else f"{type(error).__name__}: "
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        kind, text = "", f"not enough memory ({text[:120]}); use a shorter prompt, a smaller dtype, or routers"
    err.print(f"[bold red]error:[/] {escape(kind + text)}", highlight=False, soft_wrap=True)


def run() -> None:
    """Run the command line: errors are one line on standard error; exit with 0, 1 (failed), 2 (usage), 130 (Ctrl-C)."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Read when PyTorch is imported: threads that wait actively take three times as long on cores that others use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    settings = Settings()
    try:
        code = app(standalone_mode=False, obj=settings)
        sys.stdout.flush()
        if code == 130:  # newer versions of typer catch Ctrl-C themselves
            raise KeyboardInterrupt
        sys.exit(code or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (KeyboardInterrupt, typer.Abort):
        err.print("interrupted")
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error of click, or of typer's copy of it
            error.show()
            sys.exit(error.exit_code)
        if settings.debug:
            traceback.print_exc()
        else:
            tell_error(error)
        sys.exit(1)
