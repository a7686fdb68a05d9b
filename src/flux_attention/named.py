"""Names that stand for a path: ``shipped``, the model and the routers that come with the package."""

from __future__ import annotations

from pathlib import Path

#: What the model that comes along is called in results and adapters, wherever it lies.
NAME = "flux-attention/shipped"
#: Stock transformers checkpoint with its tokenizer.
BACKBONE = Path(__file__).parent / "shipped" / "backbone"
#: Router adapter for it.
ROUTERS = Path(__file__).parent / "shipped" / "routers"


def model_path(model: str) -> str:
    """Where the model called ``shipped`` lies; any other name as it is."""
    return str(BACKBONE) if model == "shipped" else model


def model_name(model: str) -> str:
    """What the model called ``shipped`` is called in results and adapters; any other name as it is."""
    return NAME if model == "shipped" else model


def adapter_path(adapter: str) -> str:
    """Where the adapter called ``shipped`` lies; any other name as it is."""
    return str(ROUTERS) if adapter == "shipped" else adapter
