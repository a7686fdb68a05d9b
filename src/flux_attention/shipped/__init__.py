"""Loads the model that comes with the package: a small Qwen3 trained from scratch, and routers trained on it.

How both were made: recipes/shipped/ in the repository.
"""

from __future__ import annotations

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from flux_attention.hf.attach import attach
from flux_attention.names import BACKBONE, NAME, ROUTERS

__all__ = ["BACKBONE", "ROUTERS", "load_shipped"]


def load_shipped():
    """
    Load the shipped model and its tokenizer, and attach its routers.

    Returns
    -------
    model : transformers.Qwen3ForCausalLM
        On the CPU, float32, in eval mode.
    tokenizer : transformers.PreTrainedTokenizerFast
    routing : Routing
    """
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
