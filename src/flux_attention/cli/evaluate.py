"""``eval`` scores a model by every way of choosing full layers."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from flux_attention.cli.arguments import Device, Dtype, Model, read_numbers, read_text
from flux_attention.cli.console import UserError, err, out
from flux_attention.cli.subject import Subject, check_precision
from flux_attention.files import check_writable


def _names(listed: str | None, default: tuple[str, ...]) -> list[str]:
    return listed.split(",") if listed else list(default)


def _print(rows: list[dict], page: Path) -> None:
    from flux_attention.evaluation.report import label, short_names, summary, tokens

    table = Table("method", "tokens", "mean accuracy", "perplexity", "mean Ω_MSR")
    for each in summary(rows):
        numbers = [each["accuracy"], each["perplexity"], each["sparsity"]]
        cells = ["" if number is None else f"{number:.3f}" for number in numbers]
        table.add_row(label(each, short_names(rows)), tokens(each["seq_len"]), *cells)
    out.print(table)
    out.print(f"the report is {page}", highlight=False, soft_wrap=True)


def evaluate(
    model: Model,
    routers: Annotated[list[str] | None, typer.Option(help="Adapter; may be given several times.")] = None,
    families: Annotated[str | None, typer.Option(help="Default: all; for 'shipped' those it has learnt.")] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval's tasks, instead of generated questions.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with more of lm-eval's task files.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of a sample.")] = "4K",
    methods: Annotated[str | None, typer.Option(help="Of full layers; default: all but best-static*.")] = None,
    samples: Annotated[int, typer.Option(min=2, help="Samples of each family and length, or task.")] = 100,
    calibration: Annotated[int, typer.Option(min=1, help="Samples of each family to choose static layers on.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 1,
    text: Annotated[Path | None, typer.Option(help="File to hide questions in; default: local source text.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for quality.json and the report.")] = Path("runs/eval"),
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew; else go on where a run stopped.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
):
    """Score a model on generated questions or lm-eval's tasks by every way of choosing full layers; write a report."""
    from flux_attention.evaluation.methods import DEFAULT_METHODS, METHODS, check_adapters, check_lengths
    from flux_attention.tasks.families import EVERY_FAMILY, FAMILIES
    from flux_attention.validation import check_known

    if tasks and families:
        raise UserError(
            "--tasks and --families are both there: lm-eval's tasks and generated questions take a run each"
        )
    if tasks and find_spec("lm_eval") is None:
        raise UserError("lm-eval is missing, which has the tasks: pip install 'flux-attention[eval]'")
    if find_spec("matplotlib") is None:  # known now, not at the end
        raise UserError("matplotlib is missing, which draws the report: pip install 'flux-attention[eval]'")
    sizes, chosen = read_numbers(lengths, int, 256, 2**24), _names(methods, DEFAULT_METHODS)
    named = _names(families, tuple(FAMILIES if model == "shipped" else EVERY_FAMILY))
    check_known("families", named, EVERY_FAMILY)
    check_known("methods", chosen, METHODS)
    given = read_text(str(text)) if text else None
    check_precision(device, dtype)
    check_writable(output)
    subject = Subject(model, routers or [], device, dtype)

    check_adapters(subject.adapters)
    if not tasks:
        check_lengths(sizes, subject.positions)

    from flux_attention.evaluation.run import run_evaluation

    loaded, tokenizer = subject.load(), subject.tokenizer
    with err.status("reading text") as status:
        rows, page = run_evaluation(
            loaded,
            tokenizer,
            subject.adapters,
            output,
            tasks=tasks.split(",") if tasks else None,
            include_path=include_path,
            text=given,
            families=named,
            lengths=sizes,
            methods=chosen,
            samples=samples,
            calibration=calibration,
            batch_size=batch_size,
            restart=restart,
            tell=lambda text: status.update(escape(text)),
        )
    _print(rows, page)
