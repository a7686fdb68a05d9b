"""``inspect`` and ``generate`` run one prompt."""

import json
from pathlib import Path
from typing import Annotated

from flux_attention.cli.arguments import (
    FILE,
    NUMBER,
    Budget,
    Chat,
    Decide,
    Device,
    Dtype,
    Force,
    Json,
    Model,
    Routers,
    Text,
    about_result,
    asked,
    check_page,
    command_line,
    read_force,
    read_text,
)
from flux_attention.cli.console import err, out, working
from flux_attention.cli.subject import Subject, check_precision


def _subject(
    model: str, routers: str | None, force: str | None, budget: float | None, decide: str | None, device: str | None,
    dtype: str,
):  # fmt: skip
    check_precision(device, dtype)  # before PyTorch is imported
    routes = read_force(force)
    return Subject(model, [routers] if routers else [], device, dtype, routes, budget=budget, decide=decide), routes


def inspect(
    model: Model,
    text: Text = None,
    routers: Routers = None,
    force: Force = None,
    budget: Budget = None,
    decide: Decide = None,
    chat: Chat = None,
    device: Device = None,
    dtype: Dtype = "auto",
    html: Annotated[Path | None, about_result("Also write it as a page.", metavar=FILE)] = None,
    as_json: Json = False,
):
    """Show how a prompt is routed, and what that saves: layers, bytes of the KV cache, query-key pairs."""
    prompt = read_text(text)
    if html is not None:
        check_page(html)
    subject, routes = _subject(model, routers, force, budget, decide, device, dtype)
    ids = subject.encode(prompt, chat=chat)

    import torch

    from flux_attention.hf.report import make_report

    loaded, routing = subject.attach()
    with torch.no_grad(), working(f"reading {ids.shape[1]:,} tokens"), routing.force(routes):
        cache = loaded.get_decoder()(ids, use_cache=True).past_key_values
    report = make_report(routing, cache, [0], routing.routes.lengths)
    if html is not None:
        from flux_attention.evaluation.prompt import write_prompt_page

        names = dict(model=model, adapter=routers or ("shipped" if subject.adapters else None), text=prompt)
        write_prompt_page(html, routing, cache, report, **names, command=command_line())
    if as_json:  # with the routers' logits, which a report has not
        print(json.dumps({"model": model, **report.to_dict(), **routing.routes.to_dict()}))
        return
    out.print(routing.routes)
    out.print(f"{ids.shape[1]:,} tokens; {report}", highlight=False, soft_wrap=True)
    if not subject.adapters and force is None:
        text = "no adapter was named: fresh routers leave every layer full; flux-attention calibrate makes one"
        out.print(text, highlight=False, soft_wrap=True)
    if html is not None:
        out.print(f"the page is {html}", highlight=False, markup=False, soft_wrap=True)


def generate(
    model: Model,
    text: Text = None,
    routers: Routers = None,
    force: Force = None,
    budget: Budget = None,
    decide: Decide = None,
    chat: Chat = None,
    max_new_tokens: Annotated[int, asked("Tokens to generate at most.", min=1, metavar=NUMBER)] = 128,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
):
    """Answer or continue a prompt (greedily), printing text as it comes."""
    prompt = read_text(text)
    subject, routes = _subject(model, routers, force, budget, decide, device, dtype)
    ids = subject.encode(prompt, max_new_tokens, chat)

    import torch
    from transformers import TextStreamer

    loaded, routing = subject.attach()

    class Streamer(TextStreamer):
        """Prints text as it comes; the first stops the spinner."""

        def on_finalized_text(self, text: str, stream_end: bool = False):
            status.stop()
            super().on_finalized_text(text, stream_end)

    streamer = None if as_json else Streamer(subject.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with working(f"reading {ids.shape[1]:,} tokens") as status, torch.no_grad(), routing.force(routes):
        tokens = loaded.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=streamer,
        )
    if not as_json:
        err.print(routing.routes)
        err.print(str(routing.report()), highlight=False, soft_wrap=True)
        return
    new = tokens[0, ids.shape[1] :]
    facts = {
        "model": model,
        "text": subject.tokenizer.decode(new, skip_special_tokens=True),
        "tokens": len(new),
        **routing.report().to_dict(),
        **routing.routes.to_dict(),
    }
    print(json.dumps(facts))
