"""``calibrate`` finds which layers of a model need full attention, without training."""

import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from flux_attention.cli.arguments import Device, Dtype, Json, Model, read_numbers, read_text
from flux_attention.cli.console import UserError, err, out
from flux_attention.cli.subject import Subject, check_precision

#: Seconds between lines of progress where there is no terminal to draw a bar on.
LINE_SECONDS = 20


class _Bar:
    """Draws one progress bar for each stage of a calibration; where there is no terminal it prints lines."""

    def __init__(self, progress: Progress):
        self.progress, self.tasks, self.told = progress, {}, time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if not err.is_terminal:
            if time.monotonic() - self.told > LINE_SECONDS:
                self.told = time.monotonic()
                err.print(f"{what}: {done} of {total}", highlight=False)
            return
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what, total=total)
        self.progress.update(self.tasks[what], completed=done, total=total)


def _table(points: list[dict], key: str, title: str, style: str) -> Table:
    """Make a table with a row for each class of task and a column for each budget."""
    budgets = sorted({point["sparsity"] for point in points})
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("budget", no_wrap=True)
    for budget in budgets:
        table.add_column(f"{budget:.2f}", justify="right", no_wrap=True)
    for name in dict.fromkeys(point["task_class"] for point in points):
        values = {point["sparsity"]: point[key] for point in points if point["task_class"] == name}
        if any(value is not None for value in values.values()):
            table.add_row(
                name, *("" if values[budget] is None else format(values[budget], style) for budget in budgets)
            )
    return table


def _columns() -> tuple:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return *columns, TimeRemainingColumn()


def _tell(config, output: Path, as_json: bool) -> None:
    """Print what was found, as the output folder has it."""
    from flux_attention.calibration.calibrator import PLOT_FILE, ROWS_FILE, answered, judged_rows
    from flux_attention.calibration.plot import by_class

    rows = judged_rows(output, config.ranking)
    told = answered(rows)
    untold = list(dict.fromkeys(row["task"] for row in rows if row["accuracy"] is not None and row["task"] not in told))
    points = by_class(rows, told)
    settings = json.loads((output / ROWS_FILE).read_text(encoding="utf-8"))["meta"]["settings"]
    left_out = settings.get("left_out", 0)
    if as_json:
        facts = {"ranking": config.ranking, "budget": config.budget, "not_answered": untold, "left_out": left_out}
        print(json.dumps({**facts, "budgets": points}))
        return
    out.print(_table(points, "rise", "loss above dense, nats a token, of the worst family", ".2f"))
    if any(point["accuracy"] is not None for point in points):
        out.print(_table(points, "accuracy", "score of generated answers", ".2f"))
    if left_out:
        out.print(f"{left_out} records left out: sparse layers would see more than half of them", highlight=False)
    if untold:
        out.print(f"not judged, as dense does not answer it either: {', '.join(untold)}", highlight=False)
    if not any(row["accuracy"] is not None for row in rows):
        out.print("chosen by the loss alone, which misleads: check it with flux-attention eval", highlight=False)
    full = len(config.full_layers)
    if full == len(config.ranking):
        text = "no budget that was tried keeps loss and answers: the adapter changes nothing until it is given a budget"
        out.print(f"{text}; longer samples or a larger window may help", highlight=False, soft_wrap=True)
    text = f"default budget {config.budget:.3g}: {full} of {len(config.ranking)} layers full, the rest sparse"
    out.print(text, highlight=False)
    out.print(f"the adapter is {output}; look at {output / PLOT_FILE}", highlight=False, soft_wrap=True)


def calibrate(
    model: Model,
    output: Annotated[Path, typer.Option(help="Folder for the adapter, the figures and their plot.")],
    records: Annotated[Path | None, typer.Option(help="Your own questions, JSONL: context, question, answer.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Your own text, scored by loss; repeatable.")] = None,
    families: Annotated[str | None, typer.Option(help="Of generated questions; default: all.")] = None,
    length: Annotated[str, typer.Option(help="Tokens of a sample; of a record, at most.")] = "4K",
    samples: Annotated[
        int | None, typer.Option(min=1, help="Samples by which layers are ranked; default: two of each family.")
    ] = None,
    judged: Annotated[
        int | None, typer.Option(min=1, help="Samples of each family by which budgets are judged; default: 16.")
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Nats a token by which no loss may rise.")] = 0.05,
    sink: Annotated[int, typer.Option(min=0, help="First tokens that sparse layers see.")] = 128,
    window: Annotated[int, typer.Option(min=1, help="Last tokens that sparse layers see.")] = 1024,
    rounds: Annotated[int, typer.Option(min=1, help="Of the ranking: 1 is quick, more see layers together.")] = 8,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Ask through the chat template; default: if there is one.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 1,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew; else go on where a run stopped.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
):
    """Find, without training, which layers need full attention, and how many; write an adapter with a budget."""
    from flux_attention.config import FluxConfig

    if find_spec("matplotlib") is None:  # known now, not at the end
        raise UserError("matplotlib is missing, which draws the plot: pip install 'flux-attention[eval]'")
    sizes = read_numbers(length, int, 256, 2**24)
    if len(sizes) > 1:
        raise UserError(f"length is {length!r}, expected one number of tokens")
    size = sizes[0]
    config = FluxConfig(sink=sink, window=window)
    texts = [read_text(str(path)) for path in text] if text else None
    check_precision(device, dtype)
    counts = {"samples": samples, "judged": judged}
    if records is not None and any(count is not None for count in counts.values()):
        raise UserError("--samples and --judged are for generated questions and text: of --records all are used")

    from flux_attention.calibration.run import calibrate as run
    from flux_attention.calibration.run import check_arguments

    named = families.split(",") if families else None
    check_arguments(config, size, None, records, texts, named)
    subject = Subject(model, [], device, dtype)
    check_arguments(config, size, subject.positions, folder=output)
    questions = None
    if records is not None:
        from flux_attention.tasks.records import read_questions

        questions = read_questions({"path": str(records)})
    loaded, tokenizer = subject.load(), subject.tokenizer
    with Progress(*_columns(), console=err, transient=True) as progress:
        found = run(
            loaded,
            tokenizer,
            output,
            config=config,
            questions=questions,
            texts=texts,
            families=named,
            length=size,
            **{name: count for name, count in counts.items() if count is not None},
            tolerance=tolerance,
            rounds=rounds,
            chat=chat,
            batch_size=batch_size,
            restart=restart,
            progress=_Bar(progress),
        )
    _tell(found, output, as_json)
