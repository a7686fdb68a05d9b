"""
Gives frozen Hugging Face language models context-aware hybrid attention: full or sparse, per input and layer.

Names are imported when first used, so importing the package costs nothing; PyTorch and transformers load with the
first name.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flux_attention.calibration.run import calibrate as calibrate
    from flux_attention.config import FluxConfig as FluxConfig
    from flux_attention.errors import AdapterError as AdapterError
    from flux_attention.errors import CalibrationError as CalibrationError
    from flux_attention.errors import FluxConfigError as FluxConfigError
    from flux_attention.errors import UnsupportedModelError as UnsupportedModelError
    from flux_attention.hf.attach import attach as attach
    from flux_attention.hf.cache.size import kv_bytes as kv_bytes
    from flux_attention.hf.handle import Routing as Routing
    from flux_attention.routes import Routes as Routes

__version__ = "0.1.0"

_HOMES = {
    "AdapterError": "errors",
    "CalibrationError": "errors",
    "FluxConfig": "config",
    "FluxConfigError": "errors",
    "Routes": "routes",
    "Routing": "hf.handle",
    "UnsupportedModelError": "errors",
    "attach": "hf.attach",
    "calibrate": "calibration.run",
    "kv_bytes": "hf.cache.size",
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
