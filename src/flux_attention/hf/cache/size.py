"""How many bytes a KV cache holds, and how many the stock model's would."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache

from flux_attention.hf.cache.layer import RoutedLayer


def kv_bytes(cache: Cache | Any) -> int:
    """
    Count the bytes of keys and values that a cache keeps, routed layers or stock ones.

    Parameters
    ----------
    cache : transformers.Cache or transformers.utils.ModelOutput
        Or what has one as its ``past_key_values``: what a model returns, and ``generate`` with
        ``return_dict_in_generate=True``.

    Raises
    ------
    TypeError
        For anything else, such as the tokens that ``generate`` returns otherwise.
    """
    if not isinstance(cache, Cache):
        given, cache = cache, getattr(cache, "past_key_values", None)
        if not isinstance(cache, Cache):
            raise TypeError(
                f"a {type(given).__name__} holds no KV cache; pass the cache, or what generate(..., "
                "return_dict_in_generate=True) returns; routing.report() says what the last generation held"
            )
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
            if layer.seen and buffer is not None and buffer.key_RKCD is not None:
                _, heads, _, dim = buffer.key_RKCD.shape
                total += 2 * sum(layer.lengths) * heads * dim * buffer.key_RKCD.element_size()
        else:
            total += _stock_bytes(layer)
    return total


def _stock_bytes(layer: object) -> int:
    held = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(states.numel() * states.element_size() for states in held if states is not None)
