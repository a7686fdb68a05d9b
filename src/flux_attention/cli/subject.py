"""Finds and checks the model and the adapters that a command is about; loads them when all else is checked."""

from functools import cached_property
from pathlib import Path
from typing import Any

from rich.markup import escape

from flux_attention import names
from flux_attention.cli.console import UserError, err
from flux_attention.names import check_folder, unreachable


class Subject:
    """
    Finds, checks and loads a model with its adapters, as the user names them.

    Parameters
    ----------
    model : str
        Directory, Hub id or ``shipped``.
    routers : sequence of str
        Adapters; default: for ``shipped`` its own, else none.
    device, dtype : str
        As the options of these names.
    force : optional
        Routes that are to be forced.
    """

    def __init__(self, model: str, routers: list[str], device: str | None, dtype: str, force: Any = None):
        check_precision(device, dtype)
        self.model, self.path, self.dtype = model, names.model_path(model), dtype
        wanted = routers or (["shipped"] if model == "shipped" else [])
        self.adapters = [names.adapter_path(adapter) for adapter in wanted]
        check_folder(self.path)
        with err.status(f"looking at {escape(model)}"):
            self.check_adapters(force)
            self.device = find_device(device)
            if reason := None if Path(self.path).is_dir() else unreachable(self.path, "config.json"):
                raise self._failed(reason)
            _ = self.config

    def _failed(self, reason: object) -> UserError:
        return UserError(f"cannot load {self.path!r} as a causal LM: {str(reason).strip().splitlines()[0][:200]}")

    def _from_pretrained(self, kind, **options):
        try:
            return kind.from_pretrained(self.path, **options)
        except (OSError, ValueError) as error:
            raise self._failed(error) from None

    def check_adapters(self, force: Any) -> None:
        """Read the adapters' configurations, and compare the routes that are to be forced with their layers."""
        if not self.adapters and not isinstance(force, float):
            return
        from flux_attention.adapters import load_config
        from flux_attention.routes import parse_routes

        layers = [load_config(adapter)[1].base_model.routed_layers for adapter in self.adapters]
        if force is not None:
            for known in layers or [(0,)]:  # a ratio can be wrong whatever the layers
                parse_routes(force, 1, known)

    @cached_property
    def config(self):
        """The model's configuration."""
        from transformers import AutoConfig

        return self._from_pretrained(AutoConfig)

    @cached_property
    def tokenizer(self):
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        return self._from_pretrained(AutoTokenizer)

    @property
    def positions(self) -> int | None:
        """Tokens that the model's positions reach to."""
        from flux_attention.hf.support import max_positions

        return max_positions(self.config)

    def encode(self, text: str, new_tokens: int = 0):
        """Return the token ids (1, S) of a prompt, after which ``new_tokens`` fit into the model."""
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"].to(self.device)
        most = self.positions
        if most and ids.shape[1] + new_tokens > most:
            wanted = f" and {new_tokens} are to be generated" if new_tokens else ""
            raise UserError(f"the prompt has {ids.shape[1]} tokens{wanted}, the model reads at most {most}; shorten it")
        return ids

    def load(self):
        """Load the model, in eval mode on its device."""
        with err.status(f"loading {escape(self.model)}"):
            from transformers import AutoModelForCausalLM
            from transformers.utils import logging

            from flux_attention.hf.precision import load_dtype

            logging.disable_progress_bar()
            loaded = self._from_pretrained(AutoModelForCausalLM, dtype=load_dtype(self.dtype, self.device))
            loaded = loaded.to(self.device).eval()
            loaded.config.name_or_path = names.model_name(self.model)
            return loaded

    def attach(self):
        """Load the model, and attach its first adapter or fresh routers."""
        loaded = self.load()
        with err.status("attaching routers"):
            from flux_attention import attach

            return loaded, attach(loaded, self.adapters[0] if self.adapters else None)


def check_precision(device: str | None, dtype: str) -> None:
    """Refuse a device or a dtype that does not exist anywhere."""
    if device is not None and device.split(":")[0] not in ("cpu", "cuda", "mps", "xpu"):
        raise UserError(f"device is {device!r}, expected cpu, cuda, cuda:N, mps or xpu")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f"dtype is {dtype!r}, expected float32, bfloat16, float16 or auto")


def find_device(device: str | None) -> str:
    """Return the device that was asked for, if this machine has it; else the best one."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device} was asked for, but PyTorch sees no CUDA GPU; use --device cpu")
    return device
