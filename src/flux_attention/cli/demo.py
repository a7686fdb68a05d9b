"""``demo`` shows the shipped model at work."""

import json
from typing import Annotated

import typer
from rich.console import Console

from flux_attention.cli.arguments import NUMBER, Json
from flux_attention.cli.console import Bars, out, working


def demo(
    samples: Annotated[int, typer.Option(min=1, metavar=NUMBER, help="Samples of each kind of input.")] = 2,
    length: Annotated[int, typer.Option(min=1024, max=8192, metavar=NUMBER, help="Tokens of each sample.")] = 2304,
    seed: Annotated[int | None, typer.Option(metavar=NUMBER, help="Default: fresh samples each time.")] = None,
    as_json: Json = False,
):
    """Run the shipped model on real text, dense, routed and all-sparse, and show what each input needed."""
    with working("loading the shipped model"):
        from flux_attention.shipped.demo import run_demo

    with Bars() as bars:
        rows = run_demo(samples, length, seed, Console(quiet=True) if as_json else out, bars)
    if as_json:
        print(json.dumps(rows))
