"""``info`` tells what this machine has."""

import json
import platform

from rich.table import Table

from flux_attention.cli.arguments import Json
from flux_attention.cli.console import out, working


def info(as_json: Json = False):
    """Show versions, device and kernels."""
    with working("looking at this machine"):
        import torch

        import flux_attention
        from flux_attention.kernels import has_triton
        from flux_attention.results import environment

        env = environment()
    facts = {
        "flux_attention": flux_attention.__version__,
        "python": platform.python_version(),
        **{name: env[name] for name in ("torch", "transformers", "triton", "device")},
        "cuda": torch.version.cuda,
        "kernels": ["reference (PyTorch, any device)"] + ["triton"] * has_triton(torch.device("cuda")),
    }
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    out.print(table)
