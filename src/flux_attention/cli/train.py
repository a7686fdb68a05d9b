"""``train`` trains routers by a recipe."""

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from flux_attention.cli.arguments import FOLDER, about_result
from flux_attention.cli.console import Bars, UserError, err, out, working


def _say(text: str) -> None:
    out.print(escape(text), highlight=False, soft_wrap=True)


def _go_on(recipe: str, output: str | None) -> str:
    """Return the command that goes on with a run."""
    processes = os.environ.get("WORLD_SIZE", "1")
    start = "flux-attention" if processes == "1" else f"torchrun --nproc-per-node {processes} -m flux_attention.cli"
    return f"{start} train {shlex.quote(recipe)}" + (f" --output {shlex.quote(output)}" if output else "")


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file; see docs/training.md.", show_default=False)],
    output: Annotated[str | None, about_result("Of the run, instead of the recipe's.", metavar=FOLDER)] = None,
    restart: Annotated[bool, about_result("Begin anew; else go on from the last checkpoint.", "--restart")] = False,
    dry_run: Annotated[bool, about_result("Count parameters, memory and steps only.", "--dry-run")] = False,
    as_json: Annotated[bool, about_result("Print JSON, for programs; with --dry-run.", "--json")] = False,
):
    """Train routers for a frozen model; `torchrun --nproc-per-node N -m flux_attention.cli train …` for N GPUs."""
    if not Path(recipe).is_file():
        raise UserError(f"{recipe} is not a file; name a recipe, such as recipes/quickstart.yaml")
    if as_json and not dry_run:
        raise UserError("--json is for --dry-run: add it, or leave --json out; a run leaves training_log.json")
    with working(f"reading {recipe}"):
        from flux_attention.training.recipe import Recipe

        loaded = Recipe.from_yaml(recipe)
        if output is not None:
            loaded = replace(loaded, output=output)
        try:
            from transformers.utils import logging

            from flux_attention.training import run
            from flux_attention.training.interrupt import Interrupted
        except ImportError as error:
            raise UserError(f"training needs more packages ({error}): pip install 'flux-attention[train]'") from None
    if not dry_run:
        logging.disable_progress_bar()  # of loading weights
        try:
            with Bars() as bars:
                run.train(loaded, restart, _say, bars)
        except Interrupted as stopped:
            if os.environ.get("RANK", "0") == "0":
                go_on = f"{stopped}; to go on: {_go_on(recipe, output)}"
                err.print(escape(go_on), highlight=False, soft_wrap=True)
            raise typer.Exit(130) from None
        return
    with working("counting"):
        counted = run.dry_run(loaded)
    if as_json:
        print(json.dumps(counted))
        return
    table = Table("", "", show_header=False)
    for name, value in counted.items():
        if name in ("weights", "optimizer", "activations", "total"):
            table.add_row(f"memory of each GPU, {name}", f"{value / 1e9:.2f} GB")
        else:
            table.add_row(name.replace("_", " "), f"{value:,}")
    out.print(table)
