"""Lists by name what ``flux-attention bench`` measures, and writes result files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flux_attention.results import earlier_rows, merged, write_results
from flux_attention.sizes import SHAPES
from speed import attention, blocks, model, timing


def bench(
    what: str,
    shapes: Sequence[str],
    lengths: Sequence[int],
    sparsities: Sequence[float],
    densities: Sequence[float],
    batches: Sequence[int],
    compile: bool,
    repeats: int,
    gpu_bytes: int,
    output: Path | None,
    tell: Callable[[dict[str, Any]], None],
) -> None:
    """
    Measure, telling each row as it is there.

    Parameters
    ----------
    what : {"attention", "prefill", "decode", "ends", "training", "packs", "blocks", "memory"}
    shapes : sequence of str
        Of ``SHAPES``.
    lengths, sparsities, densities, batches, compile, repeats, gpu_bytes
        See the functions that measure.
    output : Path, optional
        Folder for a result file, written after every row; rows of earlier calls stay there.
    tell : callable
        Takes each row.

    Raises
    ------
    ValueError
        For anything else to measure, or unknown shapes.
    RuntimeError
        Without a GPU, for all but ``memory``.
    """
    if unknown := sorted(set(shapes) - set(SHAPES)):
        raise ValueError(f"unknown shapes {unknown}, expected some of {list(SHAPES)}")

    def training(shape: str):
        from speed import training  # which needs what the Trainer needs

        return getattr(training, what)(shape, lengths, repeats)

    measures = {
        "attention": {
            "attention_prefill": lambda shape: attention.attention_prefill(shape, lengths, sparsities),
            "attention_decode": lambda shape: attention.attention_decode(shape, lengths, batches, sparsities),
        },
        "prefill": {"e2e_prefill": lambda shape: model.prefill(shape, lengths, batches, sparsities, compile, repeats)},
        "decode": {"e2e_decode": lambda shape: model.decode(shape, lengths, batches, sparsities, compile)},
        "ends": {"ends": lambda shape: model.ends(shape, lengths, sparsities[-1], compile, repeats)},
        "training": {"training": training},
        "packs": {"packs": training},
        "blocks": {
            "blocks": lambda shape: blocks.blocks(shape, lengths, densities),
            "e2e_blocks": lambda shape: blocks.block_prefill(
                shape, lengths, sparsities[-1], densities[0], compile, repeats
            ),
        },
        "memory": {"memory": lambda shape: model.memory(shape, lengths, sparsities, gpu_bytes)},
    }
    if what not in measures:
        raise ValueError(f"cannot measure {what!r}; expected one of {list(measures)}")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)  # fails now, not after the first measurement
    for name, measure in measures[what].items():
        rows, before = [], [] if output is None else earlier_rows(output / f"{name}.json")
        for row in itertools.chain.from_iterable(map(measure, shapes)):
            rows.append(row)
            tell(row)
            if output is not None:
                ceilings = {} if what == "memory" else timing.ceilings()
                write_results(output / f"{name}.json", merged(before, rows), **ceilings)
