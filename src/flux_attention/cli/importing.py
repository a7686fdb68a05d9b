"""``import`` makes a model folder and an adapter of a released checkpoint."""

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from flux_attention.cli.arguments import FOLDER, Json, about_result
from flux_attention.cli.console import out, working


def import_checkpoint(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id of a checkpoint that the authors released.")],
    output: Annotated[Path, about_result("For the model and the adapter; empty or not there.", metavar=FOLDER)],
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the model's weights, without the routers; else link to the files.")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Exact tokens of sink and window, not the blocks of 128 of training.")
    ] = False,
    full: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="What full layers compute (full), in place of what the checkpoint says."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a Hub repository.")
    ] = None,
    as_json: Json = False,
):
    """Make a stock model folder and an adapter of a checkpoint that the authors of the method released."""
    from flux_attention import checkpoints

    with working(f"importing {checkpoint}"):
        found = checkpoints.import_checkpoint(checkpoint, output, revision=revision, copy=copy, exact=exact, full=full)
    if as_json:
        facts = {"model": str(found.model), "adapter": str(found.adapter), "ignored": found.ignored}
        print(json.dumps({**facts, "sparse": found.config.sparse, "full": found.config.full}))
        return
    sizes = ", ".join(f"{name} {size}" for name, size in found.config.sparse.items() if name != "pattern")
    sparse, full = found.config.sparse["pattern"], found.config.full["pattern"]
    lines = [
        f"model {found.model}, {'copied' if copy else 'linked to the checkpoint, which has to stay where it is'}",
        f"adapter {found.adapter}: sparse layers {sparse}, {sizes}; full layers {full}",
    ]
    if found.ignored:
        lines.append(f"ignored, as only training used them: {', '.join(found.ignored)}")
    command = ["flux-attention", "inspect", str(found.model), "FILE", "--routers", str(found.adapter)]
    lines.append(f"try it: {shlex.join(command)}")
    for line in lines:
        out.print(line, highlight=False, markup=False, soft_wrap=True)
