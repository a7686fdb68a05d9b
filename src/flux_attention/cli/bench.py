"""``bench`` measures speed and memory on this GPU."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import flux_attention
from flux_attention.cli.arguments import FOLDER, NAMES, NUMBER, about_machine, about_result, asked, read_numbers
from flux_attention.cli.console import UserError, out, working
from flux_attention.files import check_writable

WHAT = ("attention", "prefill", "decode", "ends", "training", "packs", "blocks", "memory")


def bench(
    what: Annotated[str, typer.Argument(help=", ".join(WHAT), show_default=False)],
    shapes: Annotated[str, asked("Sizes of the model: qwen3-8b, smollm2-135m …", metavar=NAMES)] = "qwen3-8b",
    lengths: Annotated[str, asked("Tokens.", metavar=NAMES)] = "1K,2K,4K,8K,16K,32K,64K,128K,256K",
    sparsities: Annotated[str, asked("Forced Ω_MSR.", metavar=NAMES)] = "0,0.25,0.5,0.75,0.9",
    densities: Annotated[
        str, asked("Share of blocks selected, for models the first: blocks.", metavar=NAMES)
    ] = "0.15,0.1,0.2",
    batches: Annotated[str, asked("Sequences together: attention, prefill, decode.", metavar=NAMES)] = "1,8",
    compile: Annotated[bool, about_machine("Layers fused by torch.compile: prefill, decode.")] = False,
    repeats: Annotated[int, about_machine("Times at least: prefill, training, packs.", min=1, metavar=NUMBER)] = 3,
    gpu_gb: Annotated[float, about_machine("10⁹ bytes to fit into: memory.", metavar=NUMBER)] = 141.0,
    output: Annotated[Path | None, about_result("For JSON, written after every row.", metavar=FOLDER)] = None,
    as_json: Annotated[bool, about_result("Print each row as a line of JSON, for programs.", "--json")] = False,
):
    """Measure speed and memory on this GPU, with random weights, against dense attention in the same run."""
    if what not in WHAT:
        raise UserError(f"cannot measure {what!r}; expected one of {', '.join(WHAT)}")
    tokens, sequences = read_numbers(lengths, int, 1, 2**24), read_numbers(batches, int, 1, 1024)
    ratios = read_numbers(sparsities, float, 0, 1)
    shares = read_numbers(densities, float, 0, 1)
    if output is not None:
        check_writable(output)

    folder = Path(flux_attention.__path__[0]).parents[1] / "benchmarks"
    if not (folder / "speed").is_dir():
        raise UserError(
            "bench runs from a checkout only, as benchmarks/ is not in the installed package: clone the repository, "
            "and in it run pip install -e ."
        )
    sys.path.insert(0, str(folder))
    with working("loading PyTorch"):
        from speed.bench import bench as measure

    def tell(row: dict[str, Any]) -> None:
        if as_json:
            print(json.dumps(row), flush=True)
            return
        out.print("  ".join(f"{key} {value}" for key, value in row.items()), highlight=False, soft_wrap=True)

    measure(
        what, shapes.split(","), tokens, ratios, shares, sequences, compile, repeats, int(gpu_gb * 1e9), output, tell
    )
