"""``calibrate`` finds which layers of a model need full attention, without training."""

import json
from pathlib import Path
from typing import Annotated

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
    read_numbers,
    read_text,
)
from flux_attention.cli.console import Bars, UserError, out, print_table, working
from flux_attention.cli.subject import Subject, check_precision

#: Answers that tell little.
FEW = 20


def _print_points(points: list[dict], key: str, title: str) -> None:
    """Print a table with a row for each class of task and a column for each budget."""
    budgets = sorted({point["sparsity"] for point in points})
    lines = []
    for name in dict.fromkeys(point["task_class"] for point in points):
        values = {point["sparsity"]: point[key] for point in points if point["task_class"] == name}
        if any(value is not None for value in values.values()):
            lines.append([name, *("" if values[each] is None else f"{values[each]:.2f}" for each in budgets)])
    print_table(["budget", *(f"{budget:.2f}" for budget in budgets)], lines, title)


def _print_thresholds(config, points: list[dict], length: int) -> None:
    """Print what each threshold selects and loses, and which one is chosen."""
    from flux_attention.kernels.dispatch import BLOCK_SPARSE_FROM

    sets = [point["threshold"] for point in points if isinstance(point["threshold"], dict)]
    lines = [
        [
            _threshold(point["threshold"], sets), f"{point['density']:.1%}", f"{point['rise']:.3f}",
            "" if point["accuracy"] is None else f"{point['accuracy']:.2f}",
        ]
        for point in points
    ]  # fmt: skip
    columns = ["threshold", "blocks selected", "loss above dense", "score of answers"]
    print_table(columns, lines, "full layers block-sparse, at the default budget")
    if sets:
        out.print("by layer: each has its own, by what it alone loses", highlight=False)
    threshold = config.full.get("threshold")
    if threshold is None:
        text = "no threshold that was tried keeps loss and answers: full layers stay exact"
    else:
        share = next(point["density"] for point in points if point["threshold"] == threshold)
        name = f"threshold {_threshold(threshold, sets)}"
        text = f"full layers are block-sparse, {name}: {share:.0%} of the blocks at {length:,} tokens"
        given = config.full.get("from_tokens")
        least = BLOCK_SPARSE_FROM["NVIDIA H200"] if given is None else given
        if length < least:
            text += f"; GPUs select in prompts of {least:,} tokens and more: judge it at such a --length"
    out.print(text, highlight=False, soft_wrap=True)


def _threshold(threshold: float | dict[str, float], sets: list[dict[str, float]]) -> str:
    """Name a threshold, or one of the sets of layers' own."""
    return f"by layer {sets.index(threshold) + 1}" if isinstance(threshold, dict) else f"{threshold:g}"


def _tell(config, output: Path, pattern, as_json: bool) -> None:
    """Print what was found, as the output folder has it; ``pattern`` is one whose threshold was to be chosen."""
    from flux_attention.calibration.calibrator import (
        PLOT_FILE,
        ROWS_FILE,
        answered,
        dense_of,
        judged_rows,
        threshold_rows,
    )
    from flux_attention.calibration.plot import by_class
    from flux_attention.calibration.run import block_sparse_layers
    from flux_attention.calibration.thresholds import by_threshold

    rows = judged_rows(output, config.ranking)
    told = answered(rows)
    untold = list(dict.fromkeys(row["task"] for row in rows if row["accuracy"] is not None and row["task"] not in told))
    points, thresholds = by_class(rows, told), []
    if pattern is not None:
        found = threshold_rows(output, block_sparse_layers(config), pattern)
        thresholds = by_threshold(found, dense_of(rows, told))
    settings = json.loads((output / ROWS_FILE).read_text(encoding="utf-8"))["meta"]["settings"]
    left_out = settings.get("left_out", 0)
    if as_json:
        facts = {"ranking": config.ranking, "budget": config.budget, "not_answered": untold, "left_out": left_out}
        print(json.dumps({**facts, "full": config.full, "budgets": points, "thresholds": thresholds}))
        return
    _print_points(points, "rise", "loss above dense, nats a token, of the worst family")
    if any(point["accuracy"] is not None for point in points):
        _print_points(points, "accuracy", "score of generated answers")
    if left_out:
        out.print(f"{left_out} records left out: sparse layers would see more than half of them", highlight=False)
    if told:
        count = sum(row["n"] for row in rows if row["method"] == "dense" and row["task"] in told)
        few = ": so few that luck decides, --judged takes more" if count < FEW else ""
        kinds = "one family" if len(told) == 1 else f"{len(told)} families"
        out.print(f"each budget is judged by {count} answers of {kinds}{few}", highlight=False)
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
    if thresholds:
        _print_thresholds(config, thresholds, settings["length"])
    out.print(f"the adapter is {output}; look at {output / PLOT_FILE}", highlight=False, soft_wrap=True)


def calibrate(
    model: Model,
    output: Annotated[Path, about_result("For the adapter, the figures and their plot.", metavar=FOLDER)],
    records: Annotated[
        Path | None, asked("Your own questions instead, JSONL: context, question, answer.", metavar=FILE)
    ] = None,
    text: Annotated[
        list[Path] | None, asked("Your own text instead, scored by loss; repeatable.", metavar=FILE)
    ] = None,
    families: Annotated[
        str | None, asked("Of generated questions, those in words that eval --help lists; default: all.", metavar=NAMES)
    ] = None,
    length: Annotated[str, asked("Tokens of a sample; of a record, at most.", metavar=NUMBER)] = "4K",
    samples: Annotated[
        int | None, asked("By which layers are ranked; default: two of each family.", min=1, metavar=NUMBER)
    ] = None,
    judged: Annotated[
        int | None, asked("Of each family, by which budgets are judged; default: 16.", min=1, metavar=NUMBER)
    ] = None,
    chat: Chat = None,
    sink: Annotated[int, about_routes("First tokens that sparse layers see.", min=0, metavar=NUMBER)] = 128,
    window: Annotated[int, about_routes("Last tokens that sparse layers see.", min=1, metavar=NUMBER)] = 1024,
    full: Annotated[
        str, about_routes("What full layers compute: full, or block_sparse with a threshold to choose.", metavar="NAME")
    ] = "full",
    tolerance: Annotated[float, about_routes("Nats a token by which no loss may rise.", min=0, metavar="NATS")] = 0.05,
    rounds: Annotated[
        int, about_routes("Of the ranking: 1 is quick, more see layers together.", min=1, metavar=NUMBER)
    ] = 8,
    restart: Annotated[bool, about_result("Begin anew; else go on where a run stopped.", "--restart")] = False,
    as_json: Json = False,
    batch_size: Annotated[int, about_machine("Samples at a time.", min=1, metavar=NUMBER)] = 1,
    device: Device = None,
    dtype: Dtype = "auto",
):
    """Find, without training, which layers need full attention, and how many; write an adapter with a budget."""
    sizes = read_numbers(length, int, 256, 2**24)
    if len(sizes) > 1:
        raise UserError(f"length is {length!r}, expected one number of tokens, such as 16K")
    size = sizes[0]
    texts = [read_text(str(path)) for path in text] if text else None
    check_precision(device, dtype)
    counts = {"samples": samples, "judged": judged}
    if records is not None and any(count is not None for count in counts.values()):
        raise UserError(
            "--samples and --judged are for generated questions and text: of --records all are used; leave them out"
        )

    with working(f"looking at {model}"):
        from flux_attention.calibration.run import calibrate as run
        from flux_attention.calibration.run import check_arguments
        from flux_attention.calibration.thresholds import unset_threshold
        from flux_attention.config import FluxConfig

        config = FluxConfig(sink=sink, window=window, full={"pattern": full})
        named = families.split(",") if families else None
        check_arguments(config, size, None, records, texts, named)
    subject = Subject(model, [], device, dtype)
    check_arguments(config, size, subject.positions, folder=output)
    questions = None
    if records is not None:
        from flux_attention.tasks.records import read_questions

        questions = read_questions({"path": str(records)})
    loaded, tokenizer = subject.load(), subject.tokenizer
    with Bars() as bars:
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
            progress=bars,
        )
    _tell(found, output, unset_threshold(config), as_json)
