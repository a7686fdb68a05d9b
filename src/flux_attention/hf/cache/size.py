"""How many bytes a KV cache holds, and how many the stock model's would."""

from __future__ import annotations

from transformers.cache_utils import Cache, CacheLayerMixin

from flux_attention.hf.cache.layer import RoutedLayer


def kv_bytes(cache: Cache) -> int:
    """
    Count the bytes of keys and values that a cache keeps, routed layers or stock ones.

    Parameters
    ----------
    cache : transformers.Cache
        As returned in ``past_key_values``.
    """
    return sum(layer.nbytes if isinstance(layer, RoutedLayer) else _stock_bytes(layer) for layer in cache.layers)


def dense_kv_bytes(cache: Cache) -> int:
    """
    Count the bytes of keys and values that the stock model would hold for the same tokens.

    Parameters
    ----------
    cache : transformers.Cache
        Filled while routers were attached.
    """
    total = 0
    for layer in cache.layers:
        if isinstance(layer, RoutedLayer):
            buffer = next(iter(layer.buffers.values()), None)
            if layer.seen and buffer is not None:
                _, heads, _, dim = buffer.key_RKCD.shape
                total += 2 * sum(layer.lengths) * heads * dim * buffer.key_RKCD.element_size()
        else:
            total += _stock_bytes(layer)
    return total


def _stock_bytes(layer: CacheLayerMixin) -> int:
    held = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(states.numel() * states.element_size() for states in held if states is not None)
