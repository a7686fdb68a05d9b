"""The arguments of a forward call: checks them, and finds out which tokens are real and which are prompt.

Shape suffixes: B batch, S columns, C columns in the KV cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from flux_attention.errors import UnsupportedModelError
from flux_attention.hf.cache.layer import RoutedLayer
from flux_attention.hf.context import enclosing, generated_prompt
from flux_attention.hf.layout import BatchLayout
from flux_attention.hf.support import hides_nothing
from flux_attention.patterns import Streaming


@dataclass(frozen=True)
class Prompt:
    """
    The whole prompts of a batch, of which a forward call may hold the first part only.

    Attributes
    ----------
    tokens : torch.Tensor
        int64 (B, S) token ids, or (B, S, hidden size) embeddings.
    layout : BatchLayout
        Which of them are real.
    lengths : list of int
        Of each row's real tokens so many, from the first on, are prompt.
    """

    tokens: torch.Tensor
    layout: BatchLayout
    lengths: list[int]


@dataclass(frozen=True)
class Inputs:
    """
    What a forward call was given, checked.

    Attributes
    ----------
    layout : BatchLayout
        Which of the call's tokens are real.
    prompt_lengths : list of int
        Of each row's real tokens so many, from the first on, are prompt.
    layers : dict of int to RoutedLayer
        The routed layers of the KV cache; empty without a cache.
    prompt : Prompt
        The whole prompts, from this call's first token on.
    """

    layout: BatchLayout
    prompt_lengths: list[int]
    layers: dict[int, RoutedLayer]
    prompt: Prompt

    @property
    def past(self) -> list[int]:
        """Real tokens of each row in the cache."""
        first = next(iter(self.layers.values()), None)
        return list(first.lengths) if first and first.seen else [0] * len(self.layout.lengths)

    @property
    def is_prompt(self) -> bool:
        """Whether the cache is empty, or there is none."""
        return not any(layer.seen for layer in self.layers.values())

    @property
    def decides(self) -> bool:
        """Whether the call's routes are to be decided; else the cache has them."""
        return not self.layers or any(layer.is_undecided for layer in self.layers.values())

    @property
    def contexts(self) -> list[int]:
        """Of each row, the tokens that its routes are about."""
        return [old + new for old, new in zip(self.past, self.prompt.lengths, strict=True)]


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
        seen = self._seen(kwargs)
        mask = self._padding_mask(kwargs, batch, seen + width)
        packed = self._sequence_lengths(kwargs, mask, batch, width, seen)
        cache = None
        if packed is not None:
            self._check_packed(packed, kwargs, mask, batch, width)
            layout = BatchLayout.packed(packed)
        else:
            cache = self._cache(kwargs, keeps_cache)
            layout = self._layout(mask, batch, width, seen, inputs.device)
        layers = {} if cache is None else {index: cast(RoutedLayer, cache.layers[index]) for index in self.routed}
        if seen and len(layers[self.routed[0]].lengths) != batch:
            raise ValueError(f"the KV cache holds {len(layers[self.routed[0]].lengths)} sequences, the input {batch}")
        if self.window and seen + width > self.window:
            raise UnsupportedModelError(
                f"the sequence has {seen + width} tokens, more than the model's sliding window of {self.window}, up to "
                "which its layers are full attention and can be routed"
            )
        given = kwargs.pop("prompt_lengths", None)
        prompt_lengths = self._prompt_lengths(given, kwargs.get("past_key_values"), layout, seen)
        if tells_padding and not seen and packed is None and mask is None and given is None:
            self._refuse_unannounced_padding(kwargs)
        if seen and mask is not None:
            self._hide(list(layers.values()), mask[:, :seen])
        prompt = Prompt(inputs, layout, prompt_lengths)
        if not seen and cache is not None:
            prompt = self._whole_prompt(cache, prompt)
        return Inputs(layout, prompt_lengths, layers, prompt)

    # Which tokens are real.

    def _seen(self, kwargs: dict[str, Any]) -> int:
        cache = kwargs.get("past_key_values")
        if type(cache) is not DynamicCache or len(cache.layers) <= self.routed[0]:
            return 0
        return cache.layers[self.routed[0]].get_seq_length()

    def _padding_mask(self, kwargs: dict[str, Any], batch: int, columns: int) -> torch.Tensor | None:
        """Return the call's mask, bool (B, C + S) on the CPU, also if a model around the decoder made others of it."""
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict) and enclosing.get():
            mask = enclosing.get()[-1].attention_mask
        if mask is None:
            return None
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            kind = f"a tensor of {mask.ndim} dimensions" if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise UnsupportedModelError(
                f"attention_mask is {kind}; routed layers support a padding mask (batch, tokens) only, 1 = real"
            )
        if mask.shape != (batch, columns):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, expected ({batch}, {columns}): a column for each "
                "cached and each new token"
            )
        return (mask != 0).cpu()

    def _layout(
        self, mask: torch.Tensor | None, batch: int, width: int, seen: int, device: torch.device
    ) -> BatchLayout:
        if mask is None:
            return BatchLayout.all_real(batch, width)
        layout = BatchLayout.from_mask(mask[:, seen:], device)
        if not seen and min(layout.lengths) == 0:
            raise ValueError(
                f"attention_mask hides every token of sequence {layout.lengths.index(0)} in the first call, so it "
                "cannot be routed; expected a real token in each (with chunked prefill of a left-padded batch, use a "
                "larger chunk, or pad on the right)"
            )
        return layout

    def _hide(self, layers: list[RoutedLayer], known_BC: torch.Tensor) -> None:
        """Turn cached tokens into padding that this call's mask hides: behind an answer, told by the next turn."""
        if torch.equal(known_BC, layers[0].real_columns()):
            return
        counts = layers[0].hidden_tokens(known_BC)
        for layer in layers:
            layer.check_take_back(counts, "mask")
        for layer in layers:
            layer.hide(known_BC)

    def _refuse_unannounced_padding(self, kwargs: dict[str, Any]) -> None:
        """
        Refuse a call without a mask whose rows look padded.

        That is, runs of the pad token at an end that are not equally long in all rows, or of two and more where texts
        do not begin or end in it; and unlike runs of 0 behind texts, which lm-eval fills with whatever the pad token.
        """
        ids = kwargs.get("input_ids")
        if ids is None and enclosing.get():
            ids = enclosing.get()[-1].input_ids
        if ids is None:
            return
        ids, config = ids.cpu(), self.decoder.config
        pad = getattr(config, "pad_token_id", None)
        ends = [getattr(config, name, None) for name in ("bos_token_id", "eos_token_id")]
        is_text = pad in ends or any(isinstance(end, list) and pad in end for end in ends)
        for side, rows, token in (("end", ids.flip(1), pad), ("begin", ids, pad), ("end", ids.flip(1), 0)):
            runs = [] if token is None else (rows == token).long().cumprod(1).sum(1).tolist()
            if len(set(runs)) > 1 or (token == pad and not is_text and max(runs, default=0) > 1):
                raise ValueError(
                    f"some of the call's sequences {side} in token {token}, {max(runs)} of them in sequence "
                    f"{runs.index(max(runs))}, which looks like padding, and there is no attention_mask: pass one "
                    "(1 = real token), as routers read each prompt's first and last tokens"
                )

    # Which are prompt.

    def _prompt_lengths(self, given: Any, cache: Any, layout: BatchLayout, seen: int) -> list[int]:
        if given is None:
            generated = generated_prompt.get()
            if cache is None or generated is None or generated.cache is not cache:
                return layout.lengths
            if generated.columns - seen >= layout.width:
                return layout.lengths
            return layout.prompt_tokens(max(0, generated.columns - seen))  # what is behind is drafted
        lengths = torch.as_tensor(given).reshape(-1).tolist()
        if len(lengths) != len(layout.lengths) or any(
            not 1 <= length <= most for length, most in zip(lengths, layout.lengths, strict=False)
        ):
            raise ValueError(
                f"prompt_lengths is {lengths}, expected {len(layout.lengths)} numbers of tokens between 1 and the "
                f"sequences' lengths {layout.lengths}"
            )
        return lengths

    def _whole_prompt(self, cache: DynamicCache, first: Prompt) -> Prompt:
        """Return the prompts of a generation, of which a call may be the first chunk."""
        generated = generated_prompt.get()
        if generated is None or generated.cache is not cache or generated.columns <= first.layout.width:
            return first
        ids, mask = generated.input_ids, generated.attention_mask
        if ids.shape[1] != generated.columns:  # given as embeddings
            return first
        layout = self._layout(None if mask is None else (mask != 0).cpu(), *ids.shape, 0, ids.device)
        return Prompt(ids, layout, layout.lengths)

    # Packed sequences.

    def _sequence_lengths(
        self, kwargs: dict[str, Any], mask: torch.Tensor | None, batch: int, width: int, seen: int
    ) -> list[int] | None:
        """Return packed sequences' lengths, by ``sequence_lengths``, ``cu_seq_lens_q`` or positions that restart."""
        given, ends = kwargs.pop("sequence_lengths", None), kwargs.get("cu_seq_lens_q")
        if given is not None:
            return [int(length) for length in given]
        if ends is not None:  # DataCollatorWithFlattening
            return torch.as_tensor(ends).diff().tolist()
        positions = kwargs.get("position_ids")
        if positions is not None and positions.ndim == 3 and len(positions) == 4:  # M-RoPE's, with the text's own first
            positions = positions[0]
        if positions is None or positions.ndim != 2 or width == 1:
            return None
        positions = positions.cpu()
        real_BS = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask[:, seen:]
        # From one real token to the next the position grows by one, where there is one sequence in a row.
        offset_BS = positions - real_BS.cumsum(1)
        first, last = offset_BS.masked_fill(~real_BS, 2**40).amin(1), offset_BS.masked_fill(~real_BS, -(2**40)).amax(1)
        if not bool((first < last).any()):
            return None
        starts = [0, *((positions[0].diff() != 1).nonzero()[:, 0] + 1).tolist(), width]
        is_packed = batch == 1 and bool(real_BS.all()) and not seen
        if not is_packed or bool((positions[0, starts[:-1]] != 0).any()):
            raise UnsupportedModelError(
                "position_ids are neither consecutive from each real token to the next nor those of sequences packed "
                "into a single row without padding, each from 0 on; routed layers support no others"
            )
        return torch.tensor(starts).diff().tolist()

    def _check_packed(
        self, lengths: list[int], kwargs: dict[str, Any], mask: torch.Tensor | None, batch: int, width: int
    ) -> None:
        if batch != 1 or min(lengths, default=0) < 1 or sum(lengths) != width:
            raise ValueError(
                f"sequence_lengths is {lengths} for an input of {batch} rows of {width} tokens, expected one row that "
                "holds the sequences behind one another"
            )
        if kwargs.get("position_ids") is None:
            raise ValueError("packed sequences need position_ids that start at 0 in each")
        ends = torch.tensor(list(itertools.accumulate(lengths)), device="cpu")
        expected = torch.cat([torch.zeros_like(ends), torch.tensor(lengths, device="cpu") - 1])
        places = torch.cat([ends - torch.tensor(lengths, device="cpu"), ends - 1])
        positions = kwargs["position_ids"].reshape(-1, width)[0]
        if not torch.equal(positions[places.to(positions.device)].cpu().long(), expected):
            raise ValueError(
                f"sequence_lengths is {lengths}, but position_ids do not start at 0 in each of these sequences"
            )
        if (mask is not None and not bool(mask.all())) or kwargs.get("past_key_values") is not None:
            raise UnsupportedModelError("packed sequences take no attention_mask and no past_key_values")
        kwargs["attention_mask"] = None  # with which layers that are not routed would mix them
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
        if len({cast(RoutedLayer, cache.layers[index]).seen for index in self.routed}) > 1:
            raise ValueError(
                "this KV cache was left half-filled by a call that failed or was interrupted; start from a new cache"
            )
        return cache
