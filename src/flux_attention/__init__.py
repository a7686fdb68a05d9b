"""Context-aware hybrid attention for frozen Hugging Face language models: full or sparse, per input and layer."""

from flux_attention.adapters import AdapterError
from flux_attention.attach import Routing, UnsupportedModelError, attach
from flux_attention.cache import kv_bytes
from flux_attention.config import FluxConfig, FluxConfigError
from flux_attention.routes import Routes

__all__ = [
    "AdapterError",
    "FluxConfig",
    "FluxConfigError",
    "Routes",
    "Routing",
    "UnsupportedModelError",
    "attach",
    "kv_bytes",
]
__version__ = "0.1.0"
