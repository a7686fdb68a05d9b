"""The routed cache layer: what one attention layer keeps of each sequence.

A full-attention row keeps every key and value; a sparse row keeps its first ``sink`` tokens and a ring of the latest
``window`` ones. Reading is then ordinary attention over a short or a long buffer.

Shape suffixes: B batch, S new tokens, C columns seen, K KV heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from flux_attention.hf.cache.buffers import KVBuffer, take_rows
from flux_attention.hf.cache.groups import AttentionGroup
from flux_attention.hf.context import current
from flux_attention.hf.layout import BatchLayout
from flux_attention.kernels.split_table import FULL, KEPT, RING
from flux_attention.patterns import Streaming


class RoutedLayer(CacheLayerMixin):
    """
    The cache of one routed layer (a ``transformers`` cache layer).

    Parameters
    ----------
    pattern : Streaming
        Its sink and window are what sparse rows keep.
    keep_full : bool
        Keep every token of sparse rows too: more memory, but the cache can be cropped and re-routed.

    Attributes
    ----------
    routes : list or None
        bool of each row, or of each row a tuple of its KV heads'; None until the first prefill decides.
    lengths : list of int
        Tokens that are kept or were seen of each row, without padding.
    seen : int
        Columns, padding included.
    padding_BC : torch.Tensor or None
        bool on the CPU, True = real, of the first columns; all columns behind them are real in every row.
    buffers : dict of bool to KVBuffer
        By whether the rows keep everything.
    """

    is_sliding = False
    supports_early_init = False  # what a row keeps is known only once it is routed

    def __init__(self, pattern: Streaming, keep_full: bool = False):
        super().__init__()
        self.sink, self.window, self.keep_full = pattern.sink, pattern.window, keep_full
        self.reset()

    def reset(self) -> None:
        """Forget everything, routes too: the next call is a new prompt."""
        self.routes: list[Any] | None = None
        self.decide_again = False
        self.lengths: list[int] = []
        self.seen = 0
        self.padding_BC: torch.Tensor | None = None
        self.buffers: dict[bool, KVBuffer] = {}
        self.overran = False  # whether a decode step that is not counted has written one token more
        self.is_initialized = False

    @property
    def is_croppable(self) -> bool:
        """Whether ``crop`` and ``reroute`` are always possible."""
        return self.keep_full

    @property
    def is_undecided(self) -> bool:
        """Whether the next call decides the routes."""
        return self.seen == 0 or self.decide_again

    # What transformers calls.

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: buffers are made by ``append``, which knows the routes."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """
        Hand back the arguments: the attention function reads and stores, as rows differ in what they see.

        Raises
        ------
        RuntimeError
            Outside of a routed forward call: the cache outlived ``detach`` or went to another model.
        """
        if current.get() is None:
            raise RuntimeError(
                "this KV cache belongs to a model with flux-attention routers, but the model that reads it has none "
                "attached; start from a new cache, or attach the routers again"
            )
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Count the tokens seen, padding included, whatever is kept of them."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the whole sequence's length and offset, as if all were kept."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.10

    # What attention calls.

    def route(self, routes: list[Any]) -> None:
        """Set the rows' routes, True for full attention; of a new prompt, what each row is to keep follows from it."""
        self.routes, self.decide_again = routes, False
        if self.seen:  # re-routed, for which all rows keep everything
            return
        self.buffers = {}
        for keeps in (True, False):
            rows = [row for row, route in enumerate(routes) if (self.keep_full or route) == keeps]
            if rows:
                self.buffers[keeps] = KVBuffer(rows, self.sink, self.window, is_ring=not keeps)

    def append(self, key_BKSD: torch.Tensor, value_BKSD: torch.Tensor, layout: BatchLayout) -> None:
        """Store a call's new tokens, left-aligned, and count them."""
        past = self.lengths or [0] * len(key_BKSD)
        for buffer in self.buffers.values():
            buffer.append(
                take_rows(key_BKSD, buffer.rows),
                take_rows(value_BKSD, buffer.rows),
                [past[row] for row in buffer.rows],
                [layout.lengths[row] for row in buffer.rows],
            )
        self.lengths = [p + n for p, n in zip(past, layout.lengths, strict=True)]
        if layout.real_BS is not None:
            self.padding_BC = torch.cat([self.real_columns(), layout.real_BS], dim=1)
        self.seen += layout.width
        self.is_initialized = True

    def _kinds(self):
        """Yield (buffer, route, batch rows, their index in the buffer) for every kind of row there is."""
        for buffer in self.buffers.values():
            for route in (True, False):
                index = [i for i, row in enumerate(buffer.rows) if self.routes[row] == route]
                if index:
                    yield buffer, route, [buffer.rows[i] for i in index], index

    def decode_groups(self) -> list[AttentionGroup]:
        """Group the rows whose newest token, already stored, is their one query."""
        groups = []
        for buffer, route, rows, index in self._kinds():
            lengths = [self.lengths[row] for row in rows]
            if not route and not buffer.is_ring:  # kept in full, read sparsely
                for length in sorted(set(lengths)):
                    same = [i for i, other in zip(index, lengths, strict=True) if other == length]
                    # The newest token is stored already, and a query sees window - 1 older ones.
                    key, value = (torch.cat(pieces, dim=2) for pieces in buffer.read(same, buffer.visible(length)))
                    places = [buffer.rows[i] for i in same]
                    groups.append(AttentionGroup(places, route, 1, key, value, is_decode=True))
                continue
            if buffer.is_ring:
                lengths = [min(length, buffer.limit) for length in lengths]
            (key,), (value,) = buffer.read(index, [slice(max(lengths))])
            ragged = lengths if min(lengths) < max(lengths) else None
            groups.append(AttentionGroup(rows, route, 1, key, value, ragged, is_decode=True))
        return groups

    def continuation_groups(
        self, key_BKSD: torch.Tensor, value_BKSD: torch.Tensor, new: list[int]
    ) -> list[AttentionGroup]:
        """Group the rows with several new tokens, not stored yet: they see what is kept, in order, and themselves."""
        groups = []
        for buffer, route, rows, index in self._kinds():
            sizes = {(self.lengths[row], new[row]) for row in rows}
            for first, count in sorted(sizes):
                same = [i for i in index if (self.lengths[buffer.rows[i]], new[buffer.rows[i]]) == (first, count)]
                if count == 0:
                    continue
                places = [buffer.rows[i] for i in same]
                # Dropping what no later query sees shifts all positions alike, so sink and window still fit.
                old = buffer.read(same, [slice(first)] if route else buffer.visible(first))
                key, value = (
                    torch.cat([*kept, take_rows(states, places)[:, :, :count]], dim=2)
                    for kept, states in zip(old, (key_BKSD, value_BKSD), strict=True)
                )
                groups.append(AttentionGroup(places, route, count, key, value))
        return groups

    # What captured decode steps call: they store by themselves.

    def reserve(self, more: int) -> None:
        """Make room for ``more`` tokens behind those that are stored, so that buffers stay where they are."""
        for buffer in self.buffers.values():
            length = max(self.lengths[row] for row in buffer.rows) + more
            buffer.reserve(length, buffer.key_RKCD, buffer.value_RKCD, spare=False)

    def table(self) -> list[list[int]]:
        """Say of each row where it lies; see ``kernels.split_table``."""
        rows: list[list[int]] = [[] for _ in self.lengths]
        for buffer in self.buffers.values():
            key, value = buffer.key_RKCD, buffer.value_RKCD
            for place, row in enumerate(buffer.rows):
                kind = RING if buffer.is_ring else FULL if self.routes[row] else KEPT
                rows[row] = [key[place].data_ptr(), value[place].data_ptr(), key.stride(1), kind]
        return rows

    def advance(self, count: int, overran: bool = False) -> None:
        """Count ``count`` tokens a row that the decode kernel has stored, and note one more if it ``overran``."""
        self.overran |= overran
        self.lengths = [length + count for length in self.lengths]
        self.seen += count

    # What is taken back, or rearranged.

    def real_columns(self) -> torch.Tensor:
        """Return bool (B, C) on the CPU: which columns are real tokens, that are still kept or were dropped as old."""
        known = 0 if self.padding_BC is None else self.padding_BC.shape[1]
        real = torch.ones(len(self.lengths), self.seen - known, dtype=torch.bool)
        return real if self.padding_BC is None else torch.cat([self.padding_BC, real], dim=1)

    def check_take_back(self, counts: list[int], verb: str = "crop") -> None:
        """
        Check that so many of each row's last tokens can be taken back, by whatever ``verb`` errors shall say.

        Raises
        ------
        ValueError
            If a sparse row has dropped what it would then need.
        """
        ring = self.buffers.get(False)
        for row in ring.rows if ring else ():
            if counts[row] and self.lengths[row] + self.overran > ring.limit:
                raise ValueError(
                    f"cannot {verb} {counts[row]} tokens: sparse layers keep sink + window = {ring.limit} tokens and "
                    f"have dropped what would be needed; attach with keep_full_kv=True to be able to {verb}"
                )

    def hidden_tokens(self, real_BC: torch.Tensor) -> list[int]:
        """
        Count each row's last tokens that a mask (B, C) of all columns seen turns into padding.

        Raises
        ------
        ValueError
            If other tokens than a row's last ones are hidden, or hidden ones shown again.
        """
        before, kept = self.real_columns(), real_BC.sum(1)
        # A row's n-th real column stays while n is not above what is kept.
        if not torch.equal(before & (before.cumsum(1) <= kept[:, None]), real_BC):
            raise ValueError(
                "attention_mask differs from the earlier calls' on tokens that are already in the KV cache, and not in "
                "each sequence's last ones alone, such as the padding behind an answer; append columns to the mask"
            )
        return [length - count for length, count in zip(self.lengths, kept.tolist(), strict=True)]

    def hide(self, real_BC: torch.Tensor) -> None:
        """Turn each row's last tokens into padding; see ``hidden_tokens`` and ``check_take_back``."""
        self.lengths, self.padding_BC = real_BC.sum(1).tolist(), real_BC

    def crop(self, tokens_to_remove: int) -> None:
        """
        Drop the last tokens.

        Parameters
        ----------
        tokens_to_remove : int
            Zero or negative: that many tokens go. Positive: the length to keep (older transformers).

        Raises
        ------
        ValueError
            If sparse rows have already dropped tokens that would be needed, or the last columns hold padding.
        """
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove)
        if count == 0 or self.seen == 0:
            return
        tail = int(self.real_columns().all(0).flip(0).long().cumprod(0).sum())
        if count > tail:
            raise ValueError(f"cannot crop {count} tokens: only the last {tail} are real in every sequence")
        self.check_take_back([count] * len(self.lengths))
        if count == self.seen:
            self.reset()
            return
        self.seen -= count
        self.lengths = [length - count for length in self.lengths]
        self.padding_BC = None if self.padding_BC is None else self.padding_BC[:, : self.seen]

    def reroute(self) -> None:
        """
        Let the next call decide the routes anew.

        Raises
        ------
        ValueError
            Unless sparse rows keep everything.
        """
        if not self.keep_full:
            raise ValueError("sparse layers have dropped old tokens; attach with keep_full_kv=True to re-route")
        self.decide_again = True

    def activate_past_recording(self) -> None:
        """
        Agree to take back tokens that assisted decoding's model rejects.

        Raises
        ------
        ValueError
            Unless sparse rows keep everything.
        """
        if not self.keep_full:
            raise ValueError(
                "assisted decoding takes tokens back from the KV cache, but sparse layers do not keep what would "
                "then be needed; attach with keep_full_kv=True, or generate without assistance"
            )

    def select(self, index: list[int]) -> None:
        """Make row n of the cache what row ``index[n]`` was."""
        if self.routes is None or index == list(range(len(self.lengths))):
            return
        self.routes = [self.routes[row] for row in index]
        self.lengths = [self.lengths[row] for row in index]
        self.padding_BC = None if self.padding_BC is None else self.padding_BC[index]
        buffers = {}
        for keeps, buffer in self.buffers.items():
            place = {row: i for i, row in enumerate(buffer.rows)}
            rows = [row for row, old in enumerate(index) if old in place]
            if rows:
                buffer.select(rows, [place[index[row]] for row in rows])
                buffers[keeps] = buffer
        self.buffers = buffers

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows, for beam search."""
        self.select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        self.select(torch.arange(len(self.lengths))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.select([row for row in range(len(self.lengths)) for _ in range(repeats)])

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are kept; buffers are a little larger."""
        held = self.buffers.values() if self.seen else ()
        return sum(buffer.nbytes([self.lengths[row] for row in buffer.rows]) for buffer in held)
