"""``bench`` measures speed and memory on this GPU."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import flux_attention
from flux_attention.cli.arguments import read_numbers
from flux_attention.cli.console import UserError, out
from flux_attention.files import check_writable

WHAT = ("attention", "prefill", "decode", "ends", "training", "packs", "blocks", "memory")


def bench(
    what: Annotated[str, typer.Argument(help="attention, prefill, decode, ends, training …", show_default=False)],
    shapes: Annotated[str, typer.Option(help="Sizes of the model: qwen3-8b, smollm2-135m …")] = "qwen3-8b",
    lengths: Annotated[str, typer.Option(help="Tokens.")] = "1K,2K,4K,8K,16K,32K,64K,128K,256K",
    sparsities: Annotated[str, typer.Option(help="Forced Ω_MSR.")] = "0,0.25,0.5,0.75,0.9",
    densities: Annotated[
        str, typer.Option(help="blocks: share of selected ones; the first for models.")
    ] = "0.15,0.1,0.2",
    batches: Annotated[str, typer.Option(help="attention, prefill, decode: sequences together.")] = "1,8",
    compile: Annotated[bool, typer.Option(help="prefill, decode: layers fused by torch.compile.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="prefill, training, packs: times at least.")] = 3,
    gpu_gb: Annotated[float, typer.Option(help="memory: 10⁹ bytes to fit into.")] = 141.0,
    output: Annotated[Path | None, typer.Option(help="Folder for JSON, written after every row.")] = None,
):
    """Measure speed and memory on this GPU, with random weights, against dense attention in the same run."""
    if what not in WHAT:
        raise UserError(f"cannot measure {what!r}; expected one of {list(WHAT)}")
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
    from speed.bench import bench as measure

    def tell(row: dict[str, Any]) -> None:
        out.print("  ".join(f"{key} {value}" for key, value in row.items()), highlight=False, soft_wrap=True)

    measure(
        what, shapes.split(","), tokens, ratios, shares, sequences, compile, repeats, int(gpu_gb * 1e9), output, tell
    )
