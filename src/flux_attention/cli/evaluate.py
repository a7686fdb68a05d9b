"""``eval`` scores a model by every way of choosing full layers."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from flux_attention.cli.arguments import (
    FILE,
    FOLDER,
    NAMES,
    NUMBER,
    Chat,
    Device,
    Dtype,
    Json,
    Model,
    about_machine,
    about_result,
    about_routes,
    asked,
    command_line,
    read_force,
    read_numbers,
    read_text,
)
from flux_attention.cli.console import Bars, UserError, out, print_table, working
from flux_attention.cli.subject import Subject, check_precision
from flux_attention.files import check_writable


def _print(rows: list[dict], page: Path, baseline: str) -> None:
    from flux_attention.evaluation import tables
    from flux_attention.evaluation.savings import nothing_saved

    for length in tables.lengths(rows):
        some = [row for row in rows if row["seq_len"] == length]
        print_table(*tables.at_a_glance(some, baseline), title=f"At a glance {tables.at(length)}")
        if tables.task_classes(some):
            heading, lines = tables.class_table(some)
            # A method is a column, as terminals are narrow and classes are many.
            first, *others = zip(heading, *lines, strict=True)
            print_table(first, others)
    if lines := [line for line in tables.comparisons(rows) if line[1] != baseline]:
        columns = [place for place in range(len(lines[0])) if place != TOKENS or len(tables.lengths(rows)) > 1]
        shown = [[line[place] for place in columns] for line in [tables.COMPARED, *lines]]
        print_table(shown[0], shown[1:], title=tables.DIFFERENCES)
    for note in (tables.FRONTIER, tables.about_marked(rows), nothing_saved(rows)):
        if note:
            out.print(note, highlight=False)
    out.print(f"the report is {page}", highlight=False, soft_wrap=True)


#: The column of lengths in the table of differences.
TOKENS = 2


def _print_json(rows: list[dict], page: Path, baseline: str) -> None:
    from flux_attention.evaluation import tables
    from flux_attention.evaluation.savings import nothing_saved

    by_length = [[row for row in rows if row["seq_len"] == length] for length in tables.lengths(rows)]
    methods = [each for some in by_length for each in tables.standings(some, baseline)]
    facts = {"report": str(page), "results": str(page.with_name("quality.json")), "note": nothing_saved(rows)}
    print(json.dumps({**facts, "baseline": baseline, "methods": methods}))


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


def _check_names(methods: str | None, families: str | None) -> None:
    """Refuse methods and families that do not exist."""
    from flux_attention.evaluation.methods import METHODS
    from flux_attention.tasks.families import EVERY_FAMILY
    from flux_attention.tasks.questions import NATURAL
    from flux_attention.validation import check_known

    check_known("methods", methods.split(",") if methods else [], METHODS)
    check_known("families", families.split(",") if families else [], (*EVERY_FAMILY, *NATURAL))


def _read_questions(records: Path | None):
    from flux_attention.tasks.records import read_questions

    return read_questions({"path": str(records)}) if records else None


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


def _methods(
    asked: str | None, natural: bool, subject: Subject, budgets: list[float] | None, force: list[str], baseline: str
) -> list[str]:
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
    if baseline != "dense" and baseline.partition(" ")[0] not in chosen:
        raise UserError(f"--baseline is {baseline!r}, which is not judged; expected one of {chosen}, or add it")
    return chosen


def _families(model: str, asked: str | None, text: Path | None, subject: Subject, chat: bool | None) -> list[str]:
    """Return the families that were asked for; else those in words where there is a chat template to ask them by."""
    from flux_attention.tasks.encoding import has_chat
    from flux_attention.tasks.families import EVERY_FAMILY, FAMILIES
    from flux_attention.tasks.questions import NATURAL

    subject.check_chat(chat)
    if asked:
        named = asked.split(",")
    elif has_chat(subject.tokenizer, chat) and text is None:
        return list(NATURAL)
    else:
        return list(FAMILIES if model == "shipped" else EVERY_FAMILY)
    if text is not None and not set(named) & set(EVERY_FAMILY):
        raise UserError(f"--text is what questions of {', '.join(EVERY_FAMILY)} are hidden in; name some, or leave it")
    return named


def _in_words(families: list[str]) -> bool:
    from flux_attention.tasks.families import EVERY_FAMILY

    return not set(families) & set(EVERY_FAMILY)


def _check_lengths(sizes: list[int], subject: Subject) -> None:
    from flux_attention.evaluation.methods import check_lengths

    check_lengths(sizes, subject.positions)


def evaluate(
    model: Model,
    families: Annotated[str | None, asked("Of generated questions, as below.", metavar=NAMES)] = None,
    records: Annotated[
        Path | None, asked("Your own questions instead, JSONL: context, question, answer.", metavar=FILE)
    ] = None,
    tasks: Annotated[str | None, asked("lm-eval's tasks instead.", metavar=NAMES)] = None,
    include_path: Annotated[Path | None, asked("Has more of lm-eval's task files.", metavar=FOLDER)] = None,
    lengths: Annotated[
        str | None, asked("Tokens of a sample, such as 4K,16K; default: 4K, of a record any.", metavar=NAMES)
    ] = None,
    samples: Annotated[int, asked("Of each family and length, or task.", min=2, metavar=NUMBER)] = 100,
    text: Annotated[Path | None, asked("To hide questions in; default: local source text.", metavar=FILE)] = None,
    chat: Chat = None,
    routers: Annotated[
        list[str] | None, about_routes("Adapter; repeatable; 'shipped' has its own.", metavar="ADAPTER")
    ] = None,
    methods: Annotated[str | None, about_routes("As below; default: the usual ones.", metavar=NAMES)] = None,
    force: Annotated[
        list[str] | None,
        about_routes("Also judge a ratio (0.75) or full layers (3,7); repeatable.", metavar="ROUTES"),
    ] = None,
    budgets: Annotated[
        str | None, about_routes("Shares of sparse layers, 0.5,0.75; default: the adapter's own.", metavar=NAMES)
    ] = None,
    sink: Annotated[
        int | None, about_routes("First tokens seen without adapters; default: 128.", min=0, metavar=NUMBER)
    ] = None,
    window: Annotated[
        int | None, about_routes("Last tokens seen, likewise; default: 1024.", min=1, metavar=NUMBER)
    ] = None,
    calibration: Annotated[
        int, about_routes("Samples of each family to choose static layers on.", min=1, metavar=NUMBER)
    ] = 8,
    baseline: Annotated[
        str, about_result("What the report sets the others beside: a method, or its name there.", metavar="NAME")
    ] = "dense",
    output: Annotated[Path, about_result("For quality.json and the report.", metavar=FOLDER)] = Path("runs/eval"),
    restart: Annotated[bool, about_result("Begin anew; else go on where a run stopped.", "--restart")] = False,
    as_json: Json = False,
    batch_size: Annotated[int, about_machine("Samples at a time.", min=1, metavar=NUMBER)] = 1,
    device: Device = None,
    dtype: Dtype = "auto",
):
    """Score a model on generated questions, your records or lm-eval's tasks by every way of choosing full layers."""
    _check_source(chat, tasks=tasks, families=families, records=records)
    sizes = read_numbers(lengths or "4K", int, 256, 2**24) if lengths or not records else []
    shares = read_numbers(budgets, float, 0, 1) if budgets else None
    check_precision(device, dtype)
    check_writable(output)
    with working(f"looking at {model}"):
        forced = [(spec, read_force(spec)) for spec in force or []]
        _check_names(methods, families)
        given = read_text(str(text)) if text else None
        questions = _read_questions(records)
    subject = Subject(model, routers or [], device, dtype)
    for _, routes in forced:
        subject.check_adapters(routes)
    config = _pattern(subject, sink, window)
    named = _families(model, families, text, subject, False if tasks else chat)
    natural = records is not None or _in_words(named)
    chosen = _methods(methods, natural, subject, shares, force or [], baseline)
    if sizes and not tasks:
        _check_lengths(sizes, subject)

    loaded, tokenizer = subject.load(), subject.tokenizer
    with working("reading text"):
        from flux_attention.evaluation.run import run_evaluation
    with Bars() as bars:
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
            baseline=baseline,
            command=command_line(),
            progress=bars,
        )
    (_print_json if as_json else _print)(rows, page, baseline)
