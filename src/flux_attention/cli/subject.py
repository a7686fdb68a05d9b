"""Finds and checks the model and the adapters that a command is about; loads them when all else is checked."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from rich.markup import escape

from flux_attention import names
from flux_attention.cli.console import UserError, err, working


class Subject:
    """
    Finds, checks and loads a model with its adapters, as the user names them.

    Parameters
    ----------
    model : str
        Directory, Hub id, GGUF file or ``shipped``.
    routers : sequence of str
        Adapters; default: for ``shipped`` its own, else none.
    device, dtype : str
        As the options of these names.
    force : optional
        Routes that are to be forced.
    **options
        Of ``attach``: ``budget`` and ``decide``; None is the adapter's own.
    """

    def __init__(
        self, model: str, routers: list[str], device: str | None, dtype: str, force: Any = None, **options: Any
    ):
        self.options = {name: value for name, value in options.items() if value is not None}
        check_precision(device, dtype)
        self.model, self.path, self.dtype = model, names.model_path(model), dtype
        wanted = routers or (["shipped"] if model == "shipped" else [])
        self.adapters = [names.adapter_path(adapter) for adapter in wanted]
        with working(f"looking at {model}"):
            reason = names.check_model(self.path)
            self.check_adapters(force)
            self.device = find_device(device)
            if reason:
                raise self._failed(reason)
            _ = self.config

    def _failed(self, reason: object) -> UserError:
        return UserError(f"cannot load {self.path!r} as a causal LM: {str(reason).strip().splitlines()[0][:200]}")

    def _load(self, load: Callable, *arguments):
        from flux_attention.errors import GgufError

        try:
            return load(self.model, *arguments)
        except GgufError as error:
            raise UserError(str(error)) from None
        except (OSError, ValueError) as error:
            raise self._failed(error) from None

    def check_adapters(self, force: Any) -> None:
        """Read the adapters' configurations, and compare the routes that are to be forced with their layers."""
        if not self.adapters and not isinstance(force, float) and not self.options:
            return
        from flux_attention.adapters import load_config
        from flux_attention.config import FluxConfig, with_options
        from flux_attention.routes import parse_routes

        configs = [load_config(adapter)[1] for adapter in self.adapters]
        for config in configs or [FluxConfig()]:
            with_options(config, **self.options)
        layers = [config.base_model.routed_layers for config in configs]
        if force is not None:
            for known in layers or [(0,)]:  # a ratio can be wrong whatever the layers
                parse_routes(force, 1, known)

    @cached_property
    def config(self):
        """The model's configuration."""
        from flux_attention.hf.loading import load_config

        return self._load(load_config)

    @cached_property
    def tokenizer(self):
        """The model's tokenizer."""
        from flux_attention.hf.loading import load_tokenizer

        return self._load(load_tokenizer)

    @property
    def positions(self) -> int | None:
        """Tokens that the model's positions reach to."""
        from flux_attention.hf.support import max_positions

        return max_positions(self.config)

    def check_chat(self, chat: bool | None) -> None:
        """Refuse ``--chat`` where the tokenizer has no template."""
        from flux_attention.tasks.encoding import has_chat

        if chat and not has_chat(self.tokenizer):
            raise UserError(f"--chat was given, but the tokenizer of {self.model} has no chat template; leave it out")

    def encode(self, text: str, new_tokens: int = 0, chat: bool | None = None):
        """
        Return the token ids (1, S) of a prompt, after which ``new_tokens`` fit into the model.

        It goes through the chat template if ``chat`` says so; default: where there is one.
        """
        import torch

        from flux_attention.tasks.encoding import encode_prompt, has_chat

        self.check_chat(chat)
        ids = torch.tensor([encode_prompt(text, self.tokenizer, has_chat(self.tokenizer, chat))], device=self.device)
        most = self.positions
        if most and ids.shape[1] + new_tokens > most:
            wanted = f" and {new_tokens} are to be generated" if new_tokens else ""
            raise UserError(f"the prompt has {ids.shape[1]} tokens{wanted}, the model reads at most {most}; shorten it")
        return ids

    def load(self):
        """Load the model, in eval mode on its device."""
        with working(f"loading {self.model}") as status:
            from transformers.utils import logging

            from flux_attention.hf.loading import dequantising, load_model

            logging.disable_progress_bar()
            if note := dequantising(self.model, self.dtype, self.device):
                status.stop()  # transformers shows a bar of its own
                err.print(escape(note), highlight=False, soft_wrap=True)
            return self._load(load_model, self.dtype, self.device, self.config).to(self.device).eval()

    def attach(self):
        """Load the model, and attach its first adapter or fresh routers."""
        loaded = self.load()
        with working("attaching routers"):
            from flux_attention import attach

            return loaded, attach(loaded, self.adapters[0] if self.adapters else None, **self.options)


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
