"""``calibrate`` finds which layers of a model need full attention, without training."""

import json
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
from flux_attention.files import check_writable

#: In the output folder; as in ``calibration.calibrator``, which takes long to import.
PLOT_FILE = "calibration.svg"


class _Bar:
    """Draws one progress bar for each stage of a calibration."""

    def __init__(self, progress: Progress):
        self.progress, self.tasks = progress, {}

    def __call__(self, what: str, done: int, total: int) -> None:
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


def _print(config, points: list[dict], unanswered: list[str], output: Path) -> None:
    out.print(_table(points, "rise", "loss above dense, nats a token", ".2f"))
    out.print(_table(points, "accuracy", "score of generated answers", ".2f"))
    if unanswered:
        out.print(f"not judged, as dense does not answer it either: {', '.join(unanswered)}", highlight=False)
    full = len(config.full_layers)
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
    samples: Annotated[int, typer.Option(min=1, help="Samples by which layers are ranked.")] = 16,
    judged: Annotated[int, typer.Option(min=1, help="Samples of each family by which budgets are judged.")] = 16,
    tolerance: Annotated[float, typer.Option(min=0, help="Nats a token by which no loss may rise.")] = 0.05,
    sink: Annotated[int, typer.Option(min=0, help="First tokens that sparse layers see.")] = 128,
    window: Annotated[int, typer.Option(min=1, help="Last tokens that sparse layers see.")] = 1024,
    greedy: Annotated[bool, typer.Option("--greedy", help="Refine the first half of the ranking; longer.")] = False,
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
    from flux_attention.validation import check_known

    if find_spec("matplotlib") is None:  # known now, not at the end
        raise UserError("matplotlib is missing, which draws the plot: pip install 'flux-attention[eval]'")
    if sum(given is not None and given != [] for given in (records, text, families)) > 1:
        raise UserError("--records, --text and --families are each about what to calibrate on; give one of them")
    size = read_numbers(length, int, 256, 2**24)[0]
    config = FluxConfig(sink=sink, window=window)
    texts = [read_text(str(path)) for path in text] if text else None
    check_precision(device, dtype)
    check_writable(output)

    from flux_attention.calibration.calibrator import answered, judged_rows
    from flux_attention.calibration.plot import by_class
    from flux_attention.calibration.run import calibrate as run
    from flux_attention.calibration.samples import check_length
    from flux_attention.tasks.questions import NATURAL

    named = families.split(",") if families else list(NATURAL)
    check_known("families", named, NATURAL)
    subject = Subject(model, [], device, dtype)
    check_length(config, size, subject.positions)
    questions = None
    if records is not None:
        from flux_attention.tasks.records import read_questions

        questions = read_questions({"path": str(records)})
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    loaded, tokenizer = subject.load(), subject.tokenizer
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as progress:
        found = run(
            loaded,
            tokenizer,
            output,
            config=config,
            questions=questions,
            texts=texts,
            families=named,
            length=size,
            samples=samples,
            judged=judged,
            tolerance=tolerance,
            greedy=greedy,
            chat=chat,
            batch_size=batch_size,
            restart=restart,
            progress=_Bar(progress),
        )
    rows = judged_rows(output, found.ranking)
    told = answered(rows)
    untold = list(dict.fromkeys(row["task"] for row in rows if row["accuracy"] is not None and row["task"] not in told))
    points = by_class(rows, told)
    if as_json:
        facts = {"ranking": found.ranking, "budget": found.budget, "not_answered": untold, "budgets": points}
        print(json.dumps(facts))
        return
    _print(found, points, untold, output)
