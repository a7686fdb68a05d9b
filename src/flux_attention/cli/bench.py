"""``bench``: speed and memory on this GPU."""

import itertools
from pathlib import Path
from typing import Annotated

import typer

from flux_attention.cli.arguments import read_numbers
from flux_attention.cli.console import UserError, out
from flux_attention.names import check_writable

WHAT = ("attention", "prefill", "decode", "training", "memory")


def bench(
    what: Annotated[str, typer.Argument(help="attention, prefill, decode, training or memory.", show_default=False)],
    shapes: Annotated[str, typer.Option(help="Sizes of the model: qwen3-8b, llama-3.1-8b.")] = "qwen3-8b",
    lengths: Annotated[str, typer.Option(help="Tokens.")] = "1K,2K,4K,8K,16K,32K,64K,128K,256K",
    sparsities: Annotated[str, typer.Option(help="Forced Ω_MSR.")] = "0,0.25,0.5,0.75,0.9",
    batches: Annotated[str, typer.Option(help="attention, prefill, decode: sequences together.")] = "1,8",
    compile: Annotated[bool, typer.Option(help="prefill, decode: layers fused by torch.compile.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="prefill, training: times at least.")] = 3,
    gpu_gb: Annotated[float, typer.Option(help="memory: 10⁹ bytes to fit into.")] = 141.0,
    output: Annotated[Path | None, typer.Option(help="Folder for JSON, written after every row.")] = None,
):
    """Measure speed and memory on this GPU, with random weights, against dense attention in the same run."""
    if what not in WHAT:
        raise UserError(f"cannot measure {what!r}; expected one of {list(WHAT)}")
    tokens, sequences = read_numbers(lengths, int, 1, 2**24), read_numbers(batches, int, 1, 1024)
    ratios = read_numbers(sparsities, float, 0, 1)
    if output is not None:
        check_writable(output)

    from flux_attention.evaluation import speed, speed_model
    from flux_attention.evaluation.results import earlier_rows, merged, write_results

    names = shapes.split(",")
    if unknown := sorted(set(names) - set(speed.SHAPES)):
        raise UserError(f"unknown shapes {unknown}, expected some of {list(speed.SHAPES)}")

    def train_speed(shape: str):
        from flux_attention.evaluation.speed_training import training  # which needs what the Trainer needs

        return training(shape, tokens, repeats)

    measures = {
        "attention": {
            "attention_prefill": lambda shape: speed.attention_prefill(shape, tokens, ratios),
            "attention_decode": lambda shape: speed.attention_decode(shape, tokens, sequences, ratios),
        },
        "prefill": {
            "e2e_prefill": lambda shape: speed_model.prefill(shape, tokens, sequences, ratios, compile, repeats)
        },
        "decode": {"e2e_decode": lambda shape: speed_model.decode(shape, tokens, sequences, ratios, compile)},
        "training": {"training": train_speed},
        "memory": {"memory": lambda shape: speed_model.memory(shape, tokens, ratios, int(gpu_gb * 1e9))},
    }
    for name, measure in measures[what].items():
        rows, before = [], [] if output is None else earlier_rows(output / f"{name}.json")
        for row in itertools.chain.from_iterable(map(measure, names)):
            rows.append(row)
            out.print("  ".join(f"{key} {value}" for key, value in row.items()), highlight=False, soft_wrap=True)
            if output is not None:
                ceilings = {} if what == "memory" else speed.ceilings()
                write_results(output / f"{name}.json", merged(before, rows), **ceilings)
