"""The model that comes with the package: a small Qwen3 trained from scratch, and routers trained on it.

How both were made: recipes/shipped/ in the repository.
"""

from __future__ import annotations

from pathlib import Path

#: What it is called in results and adapters, wherever it lies.
NAME = "flux-attention/shipped"
#: Stock transformers checkpoint with its tokenizer.
BACKBONE = Path(__file__).parent / "backbone"
#: Router adapter for it.
ROUTERS = Path(__file__).parent / "routers"


def model_path(model: str) -> str:
    """Where the model called ``shipped`` lies; any other name as it is."""
    return str(BACKBONE) if model == "shipped" else model


def model_name(model: str) -> str:
    """What the model called ``shipped`` is called in results and adapters; any other name as it is."""
    return NAME if model == "shipped" else model


def adapter_path(adapter: str) -> str:
    """Where the adapter called ``shipped`` lies; any other name as it is."""
    return str(ROUTERS) if adapter == "shipped" else adapter


def load_shipped():
    """
    The shipped model, its tokenizer, and its routers attached.

    Returns
    -------
    model : transformers.Qwen3ForCausalLM
        On the CPU, float32, in eval mode.
    tokenizer : transformers.PreTrainedTokenizerFast
    routing : Routing
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from flux_attention.attach import attach

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # of loading 112 tensors, which takes no time
    try:
        model = AutoModelForCausalLM.from_pretrained(BACKBONE, dtype="float32").eval()
        model.config.name_or_path = NAME
        tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    finally:
        if bars:
            logging.enable_progress_bar()
    return model, tokenizer, attach(model, ROUTERS)
