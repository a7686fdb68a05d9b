"""
Context-aware hybrid attention for frozen Hugging Face language models: full or sparse, per input and layer.

Names are imported when first used, so importing the package costs nothing; PyTorch and transformers load with the
first name.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flux_attention.adapters import AdapterError as AdapterError
    from flux_attention.attach import Routing as Routing
    from flux_attention.attach import attach as attach
    from flux_attention.cache import kv_bytes as kv_bytes
    from flux_attention.call import UnsupportedModelError as UnsupportedModelError
    from flux_attention.config import FluxConfig as FluxConfig
    from flux_attention.config import FluxConfigError as FluxConfigError
    from flux_attention.routes import Routes as Routes

__version__ = "0.1.0"

_HOMES = {
    "AdapterError": "adapters",
    "FluxConfig": "config",
    "FluxConfigError": "config",
    "Routes": "routes",
    "Routing": "attach",
    "UnsupportedModelError": "call",
    "attach": "attach",
    "kv_bytes": "cache",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(ModuleType):
    """Keeps ``flux_attention.attach`` the function: importing the submodule of that name would replace it."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "attach" and isinstance(value, ModuleType):
            value = value.attach
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
