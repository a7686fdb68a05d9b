"""The arguments of a forward call: checks them, and finds out which tokens are real and which are prompt.

Shape suffixes: B batch, S columns, C columns in the KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from flux_attention.errors import UnsupportedModelError
from flux_attention.hf.cache.layer import RoutedLayer
from flux_attention.hf.context import enclosing, prompt_columns
from flux_attention.hf.forward import Inputs
from flux_attention.hf.layout import BatchLayout
from flux_attention.hf.support import hides_nothing
from flux_attention.patterns import Streaming


class InputReader:
    """
    Reads the keyword arguments of a decoder's forward calls, and puts routed layers into their caches.

    Parameters
    ----------
    decoder : torch.nn.Module
        With ``config`` and ``layers``.
    routed : sequence of int
        The routed layers' indices.
    pattern : Streaming
        What sparse rows keep.
    keep_full_kv : bool
        See ``attach``.
    """

    def __init__(self, decoder: nn.Module, routed: Sequence[int], pattern: Streaming, keep_full_kv: bool):
        self.decoder, self.routed, self.pattern, self.keep_full_kv = decoder, tuple(routed), pattern, keep_full_kv
        self.num_layers = decoder.config.num_hidden_layers
        #: Columns beyond which layers with such a window are no full attention any more.
        window = getattr(decoder.config, "sliding_window", None)
        self.window = window if hides_nothing(decoder.config, window) else None

    def read(self, kwargs: dict[str, Any], keeps_cache: bool, tells_padding: bool) -> Inputs:
        """
        Check a forward call's arguments; ``kwargs`` loses those that are ours, and gets a cache if it needs one.

        Parameters
        ----------
        kwargs : dict
            The decoder's keyword arguments.
        keeps_cache : bool
            Whether the call may keep a KV cache.
        tells_padding : bool
            Whether it matters which tokens are the prompt's last ones: padding that no mask announces is then refused.

        Raises
        ------
        ValueError, UnsupportedModelError
            For arguments that do not fit together, or that routed layers do not support.
        """
        if kwargs.get("output_attentions") or getattr(self.decoder.config, "output_attentions", False):
            raise UnsupportedModelError(
                "output_attentions=True: routed layers do not compute attention weights; call without it, or detach"
            )
        inputs = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
        if inputs is None:
            raise ValueError("the model was called without input_ids or inputs_embeds")
        batch, width = inputs.shape[:2]
        if batch == 0 or width == 0:
            raise ValueError(f"the input is empty: {batch} sequences of {width} tokens; expected at least one token")
        mask = self._padding_mask(kwargs)
        packed = self._sequence_lengths(kwargs, mask, batch, width)
        if packed is not None:
            self._check_packed(packed, kwargs, batch, width)
            layout, cache = BatchLayout.packed(packed), None
        else:
            cache = self._cache(kwargs, keeps_cache)
            layout = self._layout(mask, batch, width, cache)
        layers = {} if cache is None else {index: cache.layers[index] for index in self.routed}
        seen = 0 if cache is None else layers[self.routed[0]].seen
        if self.window and seen + width > self.window:
            raise UnsupportedModelError(
                f"the sequence has {seen + width} tokens, more than the model's sliding window of {self.window}, up to "
                "which its layers are full attention and can be routed"
            )
        given = kwargs.pop("prompt_lengths", None)
        prompt_lengths = self._prompt_lengths(given, layout, seen)
        found = Inputs(layout, prompt_lengths, layers)
        if tells_padding and found.is_prompt and packed is None and mask is None and given is None:
            self._refuse_unannounced_padding(kwargs, batch)
        return found

    # Which tokens are real.

    def _padding_mask(self, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Return the mask (B, C + S) that the call was given, also if a model around the decoder made others of it."""
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict) and enclosing.get():
            mask = enclosing.get()[-1].attention_mask
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
            kind = f"a tensor of {mask.ndim} dimensions" if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise UnsupportedModelError(
                f"attention_mask is {kind}; routed layers support a padding mask (batch, tokens) only, 1 = real"
            )
        return mask

    def _layout(self, mask: torch.Tensor | None, batch: int, width: int, cache: DynamicCache | None) -> BatchLayout:
        first = None if cache is None else cache.layers[self.routed[0]]
        seen = 0 if first is None else first.seen
        if seen and len(first.lengths) != batch:
            raise ValueError(f"the KV cache holds {len(first.lengths)} sequences, the input {batch}")
        if mask is None:
            return BatchLayout.all_real(batch, width)
        if mask.shape != (batch, seen + width):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, expected ({batch}, {seen + width}): a column for each "
                f"of the {seen} cached and {width} new tokens"
            )
        mask = mask != 0
        # Single tokens, of which there are many, are spared the comparison of each column.
        if seen and (width > 1 or mask[:, :seen].sum(1).tolist() != first.lengths):
            known = mask[:, :seen].cpu()
            if not torch.equal(known, first.real_columns()):  # an answer's padding, told by the next turn
                layers, counts = [cache.layers[index] for index in self.routed], first.hidden_tokens(known)
                for layer in layers:
                    layer.check_take_back(counts, "mask")
                for layer in layers:
                    layer.hide(known)
        layout = BatchLayout.from_mask(mask[:, seen:])
        if not seen and min(layout.lengths) == 0:
            raise ValueError(
                f"attention_mask hides every token of sequence {layout.lengths.index(0)} in the first call, so it "
                "cannot be routed; expected a real token in each (with chunked prefill of a left-padded batch, use a "
                "larger chunk, or pad on the right)"
            )
        return layout

    def _refuse_unannounced_padding(self, kwargs: dict[str, Any], batch: int) -> None:
        """Refuse a batch without a mask whose rows begin or end in unlike runs of the pad token, or end so in 0."""
        ids = kwargs.get("input_ids")
        if ids is None and enclosing.get():
            ids = enclosing.get()[-1].input_ids
        if batch == 1 or ids is None:
            return
        ids = ids.cpu()
        pad = getattr(self.decoder.config, "pad_token_id", None)
        # lm-eval fills with 0 behind its texts, whatever the pad token.
        for side, rows, token in (("end", ids.flip(1), pad), ("begin", ids, pad), ("end", ids.flip(1), 0)):
            runs = [] if token is None else (rows == token).long().cumprod(1).sum(1).tolist()
            if len(set(runs)) > 1:
                raise ValueError(
                    f"some of the batch's sequences {side} in token {token}, {max(runs)} of them in sequence "
                    f"{runs.index(max(runs))}, which looks like padding, and there is no attention_mask: pass one "
                    "(1 = real token), as routers read each prompt's first and last tokens"
                )

    # Which are prompt.

    def _prompt_lengths(self, given: Any, layout: BatchLayout, seen: int) -> list[int]:
        if given is None:
            columns = prompt_columns.get()
            if columns is None or layout.starts is not None or columns - seen >= layout.width:
                return layout.lengths
            return layout.prompt_tokens(max(0, columns - seen))  # what is behind is drafted
        lengths = [int(length) for length in given]
        if len(lengths) != len(layout.lengths) or any(
            not 1 <= length <= most for length, most in zip(lengths, layout.lengths, strict=False)
        ):
            raise ValueError(
                f"prompt_lengths is {lengths}, expected {len(layout.lengths)} numbers of tokens between 1 and the "
                f"sequences' lengths {layout.lengths}"
            )
        return lengths

    # Packed sequences.

    def _sequence_lengths(
        self, kwargs: dict[str, Any], mask: torch.Tensor | None, batch: int, width: int
    ) -> list[int] | None:
        """Return packed sequences' lengths, by ``sequence_lengths``, ``cu_seq_lens_q`` or positions that restart."""
        given, ends = kwargs.pop("sequence_lengths", None), kwargs.get("cu_seq_lens_q")
        if given is not None:
            return [int(length) for length in given]
        if ends is not None:  # DataCollatorWithFlattening
            return torch.as_tensor(ends).diff().tolist()
        positions, cache = kwargs.get("position_ids"), kwargs.get("past_key_values")
        if positions is None or positions.ndim != 2 or width == 1:
            return None
        real_BS = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask[:, -width:] != 0
        # From one real token to the next the position grows by one, where there is one sequence in a row.
        offset_BS = positions.to(real_BS.device) - real_BS.cumsum(1)
        first, last = offset_BS.masked_fill(~real_BS, 2**40).amin(1), offset_BS.masked_fill(~real_BS, -(2**40)).amax(1)
        if not bool((first < last).any()):
            return None
        starts = [0, *((positions[0].diff() != 1).nonzero()[:, 0] + 1).tolist(), width]
        is_continued = type(cache) is DynamicCache and cache.get_seq_length() > 0
        is_packed = batch == 1 and bool(real_BS.all()) and not is_continued
        if not is_packed or bool((positions[0, starts[:-1]] != 0).any()):
            raise UnsupportedModelError(
                "position_ids are neither consecutive from each real token to the next nor those of sequences packed "
                "into a single row without padding, each from 0 on; routed layers support no others"
            )
        return torch.tensor(starts).diff().tolist()

    def _check_packed(self, lengths: list[int], kwargs: dict[str, Any], batch: int, width: int) -> None:
        if batch != 1 or min(lengths, default=0) < 1 or sum(lengths) != width:
            raise ValueError(
                f"sequence_lengths is {lengths} for an input of {batch} rows of {width} tokens, expected one row that "
                "holds the sequences behind one another"
            )
        if kwargs.get("position_ids") is None:
            raise ValueError("packed sequences need position_ids that start at 0 in each")
        mask = kwargs.get("attention_mask")
        if mask is not None and bool((mask != 0).all()):
            mask = kwargs["attention_mask"] = None
        if mask is not None or kwargs.get("past_key_values") is not None:
            raise UnsupportedModelError("packed sequences take no attention_mask and no past_key_values")
        types = getattr(self.decoder.config, "layer_types", None) or []
        if len(lengths) > 1 and set(types) - {"full_attention", "sliding_attention"}:
            raise UnsupportedModelError(
                f"{type(self.decoder).__name__} has layers of the kinds {sorted(set(types))}: those that are not "
                "attention would mix packed sequences; pass one sequence a row"
            )
        kwargs["use_cache"] = False

    # The cache.

    def _cache(self, kwargs: dict[str, Any], keeps_cache: bool) -> DynamicCache | None:
        cache, config = kwargs.get("past_key_values"), self.decoder.config
        if cache is None:
            use_cache = kwargs.get("use_cache")
            use_cache = getattr(config, "use_cache", True) if use_cache is None else use_cache
            if not keeps_cache:
                kwargs["use_cache"] = use_cache = False
            if not use_cache:
                return None
            cache = kwargs["past_key_values"] = DynamicCache(config=config)
        if type(cache) is not DynamicCache or cache.offloading:
            kind = f"offloaded {type(cache).__name__}" if getattr(cache, "offloading", False) else type(cache).__name__
            raise UnsupportedModelError(
                f"past_key_values is a {kind}; routed layers need a DynamicCache, which generate() makes by default "
                "(no cache_implementation)"
            )
        if config.num_hidden_layers != self.num_layers:
            raise UnsupportedModelError(
                f"the call runs {config.num_hidden_layers} of {self.num_layers} layers (early exit), "
                "which routing does not support"
            )
        missing = config.num_hidden_layers - len(cache.layers)
        cache.layers.extend(DynamicLayer() for _ in range(missing))
        for index in self.routed:
            layer = cache.layers[index]
            if isinstance(layer, RoutedLayer):
                if (layer.sink, layer.window) != (self.pattern.sink, self.pattern.window):
                    raise ValueError(
                        f"this KV cache was made with sink {layer.sink} and window {layer.window}, the attached "
                        f"routers use {self.pattern.sink} and {self.pattern.window}; start from a new cache"
                    )
            elif layer.get_seq_length():
                raise ValueError("past_key_values was filled before routers were attached; start from an empty cache")
            else:
                cache.layers[index] = RoutedLayer(self.pattern, self.keep_full_kv)
        if len({cache.layers[index].seen for index in self.routed}) > 1:
            raise ValueError(
                "this KV cache was left half-filled by a call that failed or was interrupted; start from a new cache"
            )
        return cache
