"""Loads what a model's name stands for: a folder, a Hub repository or a GGUF file."""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, cast

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from flux_attention import names
from flux_attention.errors import GgufError
from flux_attention.hf.gguf import GgufFile, mend_rope, mend_tokenizer
from flux_attention.hf.precision import load_dtype


def load_config(model: str, **options: Any) -> PreTrainedConfig:
    """
    Load a model's configuration.

    Parameters
    ----------
    model : str
        Folder, Hub id, GGUF file or ``shipped``.
    options : optional
        As ``from_pretrained`` takes them.

    Raises
    ------
    OSError, ValueError
        If there is no such model; a ``GgufError`` for a file that cannot be read.
    """
    if not names.is_gguf(model):
        return AutoConfig.from_pretrained(names.model_path(model), **options)
    file = read_gguf(model)
    config = _from_file(AutoConfig, file, **options)
    if "rope_parameters" not in options:
        mend_rope(config, file)
    config.name_or_path = file.name
    return config


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; raises as ``load_config``."""
    if not names.is_gguf(model):
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(names.model_path(model)))
    file = read_gguf(model)
    tokenizer = _from_file(AutoTokenizer, file)
    mend_tokenizer(tokenizer, file)
    tokenizer.name_or_path = str(file.path)
    return tokenizer


def load_model(
    model: str, dtype: str, device: str | torch.device, config: PreTrainedConfig | None = None, **options: Any
):
    """
    Load a model with the name that results and adapters call it by.

    Parameters
    ----------
    model : str
        Folder, Hub id, GGUF file (whose weights are dequantised) or ``shipped``.
    dtype : str
        As the command line takes it.
    device : str or torch.device
        Where the model will run; it is loaded on the CPU.
    config : PreTrainedConfig, optional
        By ``load_config``, if it is at hand: it takes seconds to read from a GGUF file.
    options : optional
        Changes to the configuration.

    Raises
    ------
    OSError, ValueError
        As ``load_config``.
    """
    if not names.is_gguf(model):
        path = names.model_path(model)
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=load_dtype(dtype, device), **options)
        loaded.config.name_or_path = names.model_name(model)
        return loaded
    file = read_gguf(model)
    arguments = {"config": config or load_config(model, **options), "dtype": gguf_dtype(dtype, device)}
    if hasattr(transformers, "GgufConfig"):  # versions that have it leave weights packed, which they cannot train
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = _from_file(AutoModelForCausalLM, file, **arguments)
    loaded.config.name_or_path = file.name
    return loaded


def gguf_dtype(dtype: str, device: str | torch.device) -> str:
    """Return what the weights of a GGUF file are dequantised to; blocks have no dtype that ``auto`` could mean."""
    chosen = load_dtype(dtype, device)
    return "bfloat16" if chosen == "auto" else chosen


def dequantising(model: str, dtype: str, device: str | torch.device) -> str | None:
    """Say what happens to the weights of a GGUF file; None for other models, whose weights stay as they are."""
    if not names.is_gguf(model):
        return None
    file, chosen = read_gguf(model), gguf_dtype(dtype, device)
    size = file.parameters * getattr(torch, chosen).itemsize
    return f"{file.path.name}: its weights are dequantised to {chosen} ({size / 1e9:.2f} GB)"


def read_gguf(model: str) -> GgufFile:
    """
    Read a GGUF file's header.

    Raises
    ------
    GgufError
        If the file cannot be read, or the packages for it are missing.
    """
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise GgufError(
            f"GGUF files need packages that are missing ({', '.join(missing)}): pip install 'flux-attention[gguf]'"
        )
    return GgufFile.read(model)


def _tell_version() -> None:
    """Tell transformers the version of ``gguf``, which its older releases do not find on Python 3.10."""
    if sys.version_info >= (3, 11):
        return
    with suppress(importlib.metadata.PackageNotFoundError):
        vars(importlib.import_module("gguf")).setdefault("__version__", importlib.metadata.version("gguf"))


def _from_file(kind, file: GgufFile, **options: Any):
    _tell_version()
    # From an empty folder: a tokenizer or a template that happens to lie beside the file may be another model's.
    with tempfile.TemporaryDirectory() as folder:
        try:
            return kind.from_pretrained(folder, gguf_file=str(file.path.resolve()), **options)
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise GgufError(
                f"transformers {transformers.__version__} cannot read {file.path} of architecture "
                f"{file.architecture!r} ({reason}); use the model's original checkpoint"
            ) from None
