"""``playground`` opens a page to try routes on."""

import threading
from importlib.util import find_spec
from typing import Annotated

from flux_attention.cli.arguments import NUMBER, Device, Dtype, Model, Routers, about_result
from flux_attention.cli.console import UserError, err, out
from flux_attention.cli.subject import Subject, check_precision


def playground(
    model: Model = "shipped",
    routers: Routers = None,
    device: Device = None,
    dtype: Dtype = "auto",
    port: Annotated[
        int | None,
        about_result("The page's; default: the first free from 7860.", min=1, max=65535, metavar=NUMBER),
    ] = None,
):
    """Open a page to ask a model dense, routed and sparse: its layers light up as they are decided."""
    if find_spec("gradio") is None:
        raise UserError("gradio is not installed, which draws the page; pip install 'flux-attention[playground]'")
    check_precision(device, dtype)  # before PyTorch is imported
    subject = Subject(model, [routers] if routers else [], device, dtype)
    tokenizer = subject.tokenizer
    loaded, routing = subject.attach()
    with err.status("opening the page"):
        from flux_attention.playground.page import launch
        from flux_attention.playground.player import Player

        adapter = (routers or model) if subject.adapters else None
        player = Player(loaded, tokenizer, routing, model, adapter)
        _, address = launch(player, port)
    out.print(f"The playground of {model} is at {address} until Ctrl-C.", highlight=False, markup=False, soft_wrap=True)
    try:
        threading.Event().wait()
    finally:
        player.close()  # the server ends with the process: to close it would wait for open pages
