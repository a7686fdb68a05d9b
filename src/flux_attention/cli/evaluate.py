"""``eval`` scores a model by every way of choosing full layers."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from flux_attention.cli.arguments import Device, Dtype, Model, read_force, read_numbers, read_text
from flux_attention.cli.console import UserError, err, out
from flux_attention.cli.subject import Subject, check_precision
from flux_attention.files import check_writable


def _print(rows: list[dict], page: Path) -> None:
    from flux_attention.evaluation import report
    from flux_attention.evaluation.savings import nothing_saved

    if report.task_classes(rows):
        for length in dict.fromkeys(row["seq_len"] for row in rows):
            heading, lines = report.class_table([row for row in rows if row["seq_len"] == length])
            # A method is a column, as terminals are narrow and classes are many.
            table = Table("", *(escape(line[0]) for line in lines), title=f"{length:,} tokens")
            for name, *cells in list(zip(heading, *lines, strict=True))[1:]:
                table.add_row(escape(name), *cells)
            out.print(table)
        if report.has_marked(rows):
            out.print(report.MARKED)
        if lines := report.comparisons(rows):
            table = Table(*report.COMPARED, title=report.DIFFERENCES)
            for line in lines:
                table.add_row(*map(escape, line))
            out.print(table)
    else:
        table = Table("method", "tokens", "mean accuracy", "perplexity", "mean Ω_MSR")
        for each in report.summary(rows):
            numbers = [each["accuracy"], each["perplexity"], each["sparsity"]]
            cells = ["" if number is None else f"{number:.3f}" for number in numbers]
            name = report.label(each, report.short_names(rows))
            table.add_row(escape(name), report.tokens(each["seq_len"]), *cells)
        out.print(table)
    if note := nothing_saved(rows):
        out.print(note, highlight=False)
    out.print(f"the report is {page}", highlight=False, soft_wrap=True)


def _check_source(chat: bool | None, **given: Any) -> None:
    """Refuse two sources of questions, before anything is looked at."""
    if sum(bool(source) for source in given.values()) > 1:
        names = " and ".join(f"--{name}" for name, source in given.items() if source)
        raise UserError(
            f"{names} are both there: lm-eval's tasks, generated questions and your own records take a run each"
        )
    if given["tasks"] and chat is not None:
        raise UserError("--chat is for questions in words: lm-eval's tasks bring their own prompts; leave it out")
    if given["tasks"] and find_spec("lm_eval") is None:
        raise UserError("lm-eval is missing, which has the tasks: pip install 'flux-attention[eval]'")
    if find_spec("matplotlib") is None:  # known now, not at the end
        raise UserError("matplotlib is missing, which draws the report: pip install 'flux-attention[eval]'")


def _pattern(subject: Subject, sink: int | None, window: int | None):
    """Return the pattern's configuration where no adapter has one."""
    from flux_attention.config import FluxConfig

    if not subject.adapters:
        return FluxConfig(sink=128 if sink is None else sink, window=1024 if window is None else window)
    if sink is not None or window is not None:
        raise UserError(
            f"--sink and --window are for judging without adapters, but {', '.join(subject.adapters)} has a pattern of "
            "its own: leave them out, or --routers"
        )
    return None


def _methods(asked: str | None, natural: bool, subject: Subject, budgets: list[float] | None, force: list[str]):
    """Return the methods that were asked for, checked; else those that the adapters can give."""
    from flux_attention.adapters import load_config
    from flux_attention.evaluation.methods import DEFAULT_METHODS, NATURAL_METHODS, check_methods, missing

    configs = [load_config(adapter)[1] for adapter in subject.adapters]
    usual = NATURAL_METHODS if natural else DEFAULT_METHODS
    # Sets at budgets take a search, or answer little: they are judged where they are asked for.
    possible = [method for method in usual if not missing(method, configs, None, force)]
    chosen = asked.split(",") if asked else possible
    chosen += ["forced"] if force and "forced" not in chosen else []
    check_methods(chosen, configs, budgets, force)
    return chosen


def _families(model: str, asked: str | None, text: Path | None, subject: Subject, chat: bool | None) -> list[str]:
    """Return the families that were asked for; else those in words where there is a chat template to ask them by."""
    from flux_attention.tasks.encoding import has_chat
    from flux_attention.tasks.families import EVERY_FAMILY, FAMILIES
    from flux_attention.tasks.questions import NATURAL

    if chat and not has_chat(subject.tokenizer):
        raise UserError(f"--chat was given, but the tokenizer of {model} has no chat template; leave it out")
    if asked:
        named = asked.split(",")
    elif has_chat(subject.tokenizer, chat) and text is None:
        return list(NATURAL)
    else:
        return list(FAMILIES if model == "shipped" else EVERY_FAMILY)
    if text is not None and not set(named) & set(EVERY_FAMILY):
        raise UserError(f"--text is what questions of {', '.join(EVERY_FAMILY)} are hidden in; name some, or leave it")
    return named


def evaluate(
    model: Model,
    routers: Annotated[list[str] | None, typer.Option(help="Adapter; repeatable; 'shipped' has its own.")] = None,
    families: Annotated[str | None, typer.Option(help="Of generated questions; default: by the model.")] = None,
    records: Annotated[Path | None, typer.Option(help="Your own questions, JSONL: context, question, answer.")] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval's tasks, instead of generated questions.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with more of lm-eval's task files.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Ask through the chat template; default: if there is one.")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Tokens of a sample; default: 4K, of a record any.")] = None,
    sink: Annotated[int | None, typer.Option(min=0, help="First tokens seen without adapters; default: 128.")] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Last tokens seen, likewise; default: 1024.")] = None,
    methods: Annotated[str | None, typer.Option(help="Of full layers; default: those that take no search.")] = None,
    force: Annotated[
        list[str] | None, typer.Option(help="Also judge a ratio (0.75) or full layers (3,7); repeatable.")
    ] = None,
    budgets: Annotated[str | None, typer.Option(help="Shares of sparse layers; default: the adapter's own.")] = None,
    samples: Annotated[int, typer.Option(min=2, help="Samples of each family and length, or task.")] = 100,
    calibration: Annotated[int, typer.Option(min=1, help="Samples of each family to choose static layers on.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 1,
    text: Annotated[Path | None, typer.Option(help="File to hide questions in; default: local source text.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for quality.json and the report.")] = Path("runs/eval"),
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew; else go on where a run stopped.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
):
    """Score a model on generated questions, your records or lm-eval's tasks by every way of choosing full layers."""
    from flux_attention.evaluation.methods import METHODS, check_lengths
    from flux_attention.tasks.families import EVERY_FAMILY
    from flux_attention.tasks.questions import NATURAL
    from flux_attention.tasks.records import read_questions
    from flux_attention.validation import check_known

    _check_source(chat, tasks=tasks, families=families, records=records)
    sizes = read_numbers(lengths or "4K", int, 256, 2**24) if lengths or not records else []
    shares = read_numbers(budgets, float, 0, 1) if budgets else None
    forced = [(spec, read_force(spec)) for spec in force or []]
    check_known("methods", methods.split(",") if methods else [], METHODS)
    check_known("families", families.split(",") if families else [], (*EVERY_FAMILY, *NATURAL))
    given = read_text(str(text)) if text else None
    questions = read_questions({"path": str(records)}) if records else None
    check_precision(device, dtype)
    check_writable(output)
    subject = Subject(model, routers or [], device, dtype)
    for _, routes in forced:
        subject.check_adapters(routes)
    config = _pattern(subject, sink, window)
    named = _families(model, families, text, subject, False if tasks else chat)
    natural = records is not None or not set(named) & set(EVERY_FAMILY)
    chosen = _methods(methods, natural, subject, shares, force or [])
    if sizes and not tasks:
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
            questions=questions,
            chat=chat,
            lengths=sizes,
            methods=chosen,
            config=config,
            budgets=shares,
            force=force or [],
            samples=samples,
            calibration=calibration,
            batch_size=batch_size,
            restart=restart,
            tell=lambda text: status.update(escape(text)),
        )
    _print(rows, page)
