"""The routed cache layer: what one attention layer keeps of each sequence.

A full-attention row keeps every key and value; a sparse row keeps its first ``sink`` tokens and a ring of the
latest ``window`` ones. Reading is then ordinary attention over a short or a long buffer.

Rows are left-aligned: only real tokens are stored, so padding costs nothing and a token's slot does not depend
on the batch that it is in.

Shape suffixes: B batch, R rows of one store, S new tokens, K KV heads, C capacity, D head dim, T keys to read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from flux_attention.kernels import FULL, KEPT, RING, index_on
from flux_attention.patterns import Streaming


@dataclass(frozen=True)
class Tokens:
    """
    Which of a forward call's tokens are real.

    Attributes
    ----------
    width : int
        S, columns of the call, padding included.
    lengths : list of int
        Real tokens of each row.
    columns_BS : torch.Tensor or None
        int64, the column of each row's n-th real token, then of its padding; None where that is the identity
        (no padding, or padding on the right).
    tail : int
        Columns at the end that are real in every row.
    starts : list of int or None
        Of sequences packed behind one another into a single row: the column at which each begins. ``lengths`` are
        then the sequences', and B counts them.
    """

    width: int
    lengths: list[int]
    columns_BS: torch.Tensor | None
    tail: int
    starts: list[int] | None = None

    @classmethod
    def all_real(cls, batch: int, width: int) -> Tokens:
        return cls(width, [width] * batch, None, width)

    @classmethod
    def packed(cls, lengths: list[int]) -> Tokens:
        """Sequences of these lengths behind one another in one row."""
        ends = list(itertools.accumulate(lengths))
        return cls(ends[-1], lengths, None, 0, [0, *ends[:-1]])

    @classmethod
    def from_mask(cls, real_BS: torch.Tensor) -> Tokens:
        """From a bool mask, True = real. One host synchronisation."""
        real = real_BS.cpu()
        batch, width = real.shape
        if real.all():
            return cls.all_real(batch, width)
        columns = torch.argsort(~real, dim=1, stable=True)
        identity = bool((columns == torch.arange(width)).all())
        tail = int(real.all(0).flip(0).long().cumprod(0).sum())
        return cls(width, real.sum(1).tolist(), None if identity else columns.to(real_BS.device), tail)

    @property
    def uniform(self) -> bool:
        """Whether no row has padding."""
        return min(self.lengths) == self.width

    def pack(self, states_BHSD: torch.Tensor) -> torch.Tensor:
        """Left-align the rows' real tokens."""
        if self.columns_BS is None:
            return states_BHSD
        index = self.columns_BS.to(states_BHSD.device)[:, None, :, None]
        return states_BHSD.take_along_dim(index, dim=2)

    def unpack(self, states_BHSD: torch.Tensor) -> torch.Tensor:
        """Undo ``pack``."""
        if self.columns_BS is None:
            return states_BHSD
        index = self.columns_BS.to(states_BHSD.device)[:, None, :, None].expand_as(states_BHSD)
        return torch.empty_like(states_BHSD).scatter(2, index, states_BHSD)


@dataclass(frozen=True)
class View:
    """
    What some rows' new queries attend to: query s of the ``queries`` ones is at position T − queries + s.

    Attributes
    ----------
    rows : list of int
        Rows of the batch.
    route : bool
        True for full attention.
    queries : int
        New tokens of these rows (the longest row's, where ``lengths`` differ).
    key_RKTD, value_RKTD : torch.Tensor
        Keys and values to read, left-aligned.
    lengths : list of int or None
        Real keys of each row, where rows differ; None if all T are real in every row.
    is_decode : bool
        One query a row that sees all its keys, in whatever order they are.
    """

    rows: list[int]
    route: bool
    queries: int
    key_RKTD: torch.Tensor
    value_RKTD: torch.Tensor
    lengths: list[int] | None
    is_decode: bool = False


def take_rows(states: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """``states[rows]``, without a copy where that is all of them in order."""
    return states if rows == list(range(len(states))) else states[index_on(states.device, rows)]


def prompt_views(routes: list[bool], tokens: Tokens, key_BKSD: torch.Tensor, value_BKSD: torch.Tensor) -> list[View]:
    """A prompt's views: one for the rows of each route, over the prompt's own (left-aligned) keys and values."""
    views = []
    for route in (True, False):
        rows = [row for row, other in enumerate(routes) if other == route]
        if rows:
            lengths = None if tokens.uniform else [tokens.lengths[row] for row in rows]
            key, value = take_rows(key_BKSD, rows), take_rows(value_BKSD, rows)
            views.append(View(rows, route, tokens.width, key, value, lengths))
    return views


class _Store:
    """Keys and values of the rows that keep the same: all tokens, or (``ring``) sink + window."""

    def __init__(self, rows: list[int], sink: int, window: int, ring: bool):
        self.rows, self.sink, self.window, self.ring = rows, sink, window, ring
        self.key_RKCD: torch.Tensor | None = None
        self.value_RKCD: torch.Tensor | None = None

    def visible(self, length: int) -> list[slice]:
        """Where those of ``length`` tokens are that later sparse queries may see, in order."""
        sink, low = min(self.sink, length), max(min(self.sink, length), length - self.window)
        return [slice(sink), *self._slots(low, length)]

    def _slots(self, first: int, end: int) -> list[slice]:
        """Where tokens ``first`` to ``end`` are, no more than a ring holds: one stretch, or two around its end."""
        if not self.ring or end <= self.sink + self.window:  # a ring that is not full keeps tokens in order
            return [slice(first, end)]
        stretches = []
        while first < end:
            place = (first - self.sink) % self.window
            size = min(end - first, self.window - place)
            stretches.append(slice(self.sink + place, self.sink + place + size))
            first += size
        return stretches

    def reserve(self, length: int, key_RKSD: torch.Tensor, value_RKSD: torch.Tensor, spare: bool = True) -> None:
        """
        Make room for ``length`` tokens; the states give heads, head dim, dtype and device.

        With ``spare`` buffers grow by an eighth at least, so that a token's cost stays constant.
        """
        most = self.sink + self.window if self.ring else None
        need = length if most is None else min(length, most)
        have = 0 if self.key_RKCD is None else self.key_RKCD.shape[2]
        if need <= have:
            return
        capacity = need
        if spare:
            capacity = need + 64 if have == 0 else max(need, have + max(64, have // 8))
        if most is not None:
            capacity = min(capacity, most)

        def grow(old: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor:
            batch, heads, _, dim = states.shape
            new = states.new_zeros(batch, heads, capacity, dim)
            if old is not None:
                new[:, :, :have] = old
            return new

        self.key_RKCD, self.value_RKCD = grow(self.key_RKCD, key_RKSD), grow(self.value_RKCD, value_RKSD)

    def append(self, key_RKSD: torch.Tensor, value_RKSD: torch.Tensor, past: list[int], new: list[int]) -> None:
        """Store each row's first ``new`` tokens behind its ``past`` ones."""
        key_RKSD, value_RKSD = key_RKSD.detach(), value_RKSD.detach()
        if self.ring and self.key_RKCD is None and len(set(new)) == 1 and new[0] >= self.sink + self.window:
            # A prompt that fills the ring: by one launch a tensor, as the host bounds short prompts.
            pieces = [source for source, _ in sorted(self._runs(0, new[0]), key=lambda run: run[1].start)]
            self.key_RKCD, self.value_RKCD = (
                torch.cat([states[:, :, piece] for piece in pieces], dim=2) for states in (key_RKSD, value_RKSD)
            )
            return
        self.reserve(max(p + n for p, n in zip(past, new, strict=True)), key_RKSD, value_RKSD)
        if self.key_RKCD.is_inference() and not torch.is_inference_mode_enabled():
            # Filled under torch.inference_mode, whose tensors cannot be written outside of it.
            self.key_RKCD, self.value_RKCD = self.key_RKCD.clone(), self.value_RKCD.clone()
        if set(new) == {1} and len(set(past)) > 1:  # decode of a ragged batch: one write for all rows
            slots = index_on(key_RKSD.device, [self._slots(position, position + 1)[0].start for position in past])
            rows = torch.arange(len(past), device=key_RKSD.device)
            self.key_RKCD[rows, :, slots] = key_RKSD[:, :, 0]
            self.value_RKCD[rows, :, slots] = value_RKSD[:, :, 0]
            return
        if len(set(zip(past, new, strict=True))) == 1:
            groups = [(slice(None), past[0], new[0])]
        else:
            groups = [(slice(row, row + 1), p, n) for row, (p, n) in enumerate(zip(past, new, strict=True))]
        for rows, first, count in groups:
            for source, target in self._runs(first, count):
                self.key_RKCD[rows, :, target] = key_RKSD[rows, :, source]
                self.value_RKCD[rows, :, target] = value_RKSD[rows, :, source]

    def _runs(self, first: int, count: int) -> list[tuple[slice, slice]]:
        """(new tokens, slots) of each contiguous stretch of what is kept of ``count`` tokens from ``first`` on."""
        end = first + count
        kept = [(first, end)]
        if self.ring and end > self.sink + self.window:
            kept = [(first, min(end, self.sink)), (max(first, self.sink, end - self.window), end)]
        runs = []
        for start, stop in kept:
            for target in self._slots(start, stop):
                size = target.stop - target.start
                if size > 0:
                    runs.append((slice(start - first, start - first + size), target))
                start += size
        return runs

    def read(self, index: list[int], slots: list[slice]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Keys and values of the store's rows ``index``, a piece for each stretch of ``slots``."""
        key, value = (
            [take_rows(states[:, :, stretch], index) for stretch in slots]
            for states in (self.key_RKCD, self.value_RKCD)
        )
        return key, value

    def select(self, rows: list[int], index: list[int]) -> None:
        """Become the store of batch rows ``rows``, copied from this store's rows ``index``."""
        self.rows = rows
        if self.key_RKCD is not None:
            where = index_on(self.key_RKCD.device, index)
            self.key_RKCD, self.value_RKCD = self.key_RKCD[where], self.value_RKCD[where]

    def nbytes(self, lengths: list[int]) -> int:
        """Bytes of the keys and values that are kept of sequences of these lengths; room for more is not counted."""
        if self.key_RKCD is None:
            return 0
        _, heads, _, dim = self.key_RKCD.shape
        most = self.sink + self.window if self.ring else max(lengths)
        kept = sum(min(length, most) for length in lengths)
        return 2 * kept * heads * dim * self.key_RKCD.element_size()


class RoutedLayer(CacheLayerMixin):
    """
    The cache of one routed layer (a ``transformers`` cache layer).

    Parameters
    ----------
    pattern : Streaming
        Its sink and window are what sparse rows keep.
    keep_full : bool
        Keep every token of sparse rows too: more memory, but the cache can be cropped and re-routed.
    """

    is_sliding = False
    supports_early_init = False  # what a row keeps is known only once it is routed

    def __init__(self, pattern: Streaming, keep_full: bool = False):
        super().__init__()
        self.sink, self.window, self.keep_full = pattern.sink, pattern.window, keep_full
        self.reset()

    def reset(self) -> None:
        """Forget everything, routes too: the next call is a new prompt."""
        self.routes: list[bool] | Callable | None = None  # per row; None until the first prefill decides
        self.decide_again = False
        self.lengths: list[int] = []  # real tokens of each row
        self.seen = 0  # columns, padding included
        self.tail = 0  # columns at the end that are real in every row
        self.stores: dict[bool, _Store] = {}  # by whether the rows keep everything
        self.pending: Tokens | None = None  # the forward call in progress
        self.overran = False  # whether a decode step that is not counted has written one token more
        self.views: list[View] = []  # of that call, until attention takes them
        self.unstored: tuple | None = None  # its tokens, where they are stored behind attention
        self.is_initialized = False

    @property
    def is_croppable(self) -> bool:
        return self.keep_full

    @property
    def undecided(self) -> bool:
        """Whether the next call decides the routes."""
        return self.routes is None or self.decide_again

    def decide(self, routes: list[bool] | Callable[[], list[bool]]) -> None:
        """Set the rows' routes, True for full attention, or how to get them, once they are needed."""
        self.routes, self.decide_again = routes, False

    def expect(self, tokens: Tokens) -> None:
        """Announce the tokens of the next ``update``."""
        self.pending = tokens

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Buffers are made by ``update``, which knows the routes."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """
        Take the new tokens and note, in ``views``, what each row's queries attend to. A single token of every row is
        stored at once, others by ``store``. Gradients do not flow through what is stored, only through several tokens.

        Parameters
        ----------
        key_states, value_states : torch.Tensor
            (B, K, S, D), after rotary embedding.

        Returns
        -------
        tuple of torch.Tensor
            The arguments: attention reads ``views``, as rows differ in what they see.

        Raises
        ------
        RuntimeError
            If no attached router announced the call: the cache outlived ``detach`` or went to another model.
        """
        tokens, self.pending = self.pending, None
        if tokens is None or self.routes is None:
            raise RuntimeError(
                "this KV cache belongs to a model with flux-attention routers, but the model that reads it has none "
                "attached; start from a new cache, or attach the routers again"
            )
        if callable(self.routes):
            self.routes = self.routes()
        key, value = tokens.pack(key_states), tokens.pack(value_states)
        past = self.lengths or [0] * len(key)
        self.lengths = [p + n for p, n in zip(past, tokens.lengths, strict=True)]
        is_prompt = self.seen == 0
        self.seen += tokens.width
        self.tail = tokens.tail + (self.tail if tokens.tail == tokens.width else 0)
        self.is_initialized = True
        self.unstored = key, value, past, tokens.lengths
        if is_prompt:
            self._make_stores()
            self.views = prompt_views(self.routes, tokens, key, value)
        elif tokens.width == 1 and tokens.uniform:
            self.store()
            self.views = self._decode_views()
        else:
            self.views = self._continuation_views(key, value, past, tokens.lengths)
        return key_states, value_states

    def store(self) -> None:
        """Store the tokens of the last ``update``, if they are not: behind attention, which the device waits for."""
        if self.unstored is not None:
            self._append(*self.unstored)
            self.unstored = None

    def reserve(self, more: int) -> None:
        """Make room for ``more`` tokens behind those that are stored, so that buffers stay where they are."""
        for store in self.stores.values():
            length = max(self.lengths[row] for row in store.rows) + more
            store.reserve(length, store.key_RKCD, store.value_RKCD, spare=False)

    def table(self) -> list[list[int]]:
        """What the decode kernel needs to know of each row; see ``kernels.triton_decode.work_table``."""
        rows: list[list[int]] = [[] for _ in self.lengths]
        for store in self.stores.values():
            key, value = store.key_RKCD, store.value_RKCD
            for place, row in enumerate(store.rows):
                kind = RING if store.ring else FULL if self.routes[row] else KEPT
                rows[row] = [key[place].data_ptr(), value[place].data_ptr(), key.stride(1), kind]
        return rows

    def advance(self, count: int, overran: bool = False) -> None:
        """Note ``count`` tokens a row that the decode kernel has stored, and one more if it ``overran``."""
        self.overran |= overran
        self.lengths = [length + count for length in self.lengths]
        self.seen += count
        self.tail += count

    def take_views(self) -> list[View]:
        """The views of the last ``update``, once: they may hold all of a prompt's keys and values."""
        views, self.views = self.views, []
        return views

    def _make_stores(self) -> None:
        for keeps in (True, False):
            rows = [row for row, route in enumerate(self.routes) if (route or self.keep_full) == keeps]
            if rows:
                self.stores[keeps] = _Store(rows, self.sink, self.window, ring=not keeps)

    def _append(self, key, value, past, new) -> None:
        for store in self.stores.values():
            store.append(
                take_rows(key, store.rows),
                take_rows(value, store.rows),
                [past[row] for row in store.rows],
                [new[row] for row in store.rows],
            )

    def _groups(self):
        """(store, route, batch rows, their index in the store) for every kind of row there is."""
        for store in self.stores.values():
            for route in (True, False):
                index = [i for i, row in enumerate(store.rows) if self.routes[row] == route]
                if index:
                    yield store, route, [store.rows[i] for i in index], index

    def _decode_views(self) -> list[View]:
        views = []
        for store, route, rows, index in self._groups():
            lengths = [self.lengths[row] for row in rows]
            if not route and not store.ring:  # kept in full, read sparsely
                for length in sorted(set(lengths)):
                    same = [i for i, other in zip(index, lengths, strict=True) if other == length]
                    # The newest token is stored already, and a query sees window - 1 older ones.
                    key, value = (torch.cat(pieces, dim=2) for pieces in store.read(same, store.visible(length)))
                    views.append(View([store.rows[i] for i in same], route, 1, key, value, None, is_decode=True))
                continue
            if store.ring:
                lengths = [min(length, self.sink + self.window) for length in lengths]
            (key,), (value,) = store.read(index, [slice(max(lengths))])
            ragged = lengths if min(lengths) < max(lengths) else None
            views.append(View(rows, route, 1, key, value, ragged, is_decode=True))
        return views

    def _continuation_views(self, key, value, past, new) -> list[View]:
        """Several new tokens behind cached ones: what is kept, in order, then the new ones."""
        views = []
        for store, route, rows, index in self._groups():
            sizes = {(past[row], new[row]) for row in rows}
            for first, count in sorted(sizes):
                same = [i for i in index if (past[store.rows[i]], new[store.rows[i]]) == (first, count)]
                if count == 0:
                    continue
                batch_rows = [store.rows[i] for i in same]
                # Dropping what no later query sees shifts all positions alike, so sink and window still fit.
                old = store.read(same, [slice(first)] if route else store.visible(first))
                pair = [
                    torch.cat([*kept, take_rows(states, batch_rows)[:, :, :count]], dim=2)
                    for kept, states in zip(old, (key, value), strict=True)
                ]
                views.append(View(batch_rows, route, count, *pair, None))
        return views

    def get_seq_length(self) -> int:
        """Tokens seen, padding included, whatever is kept of them."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.10

    def select(self, index: list[int]) -> None:
        """Make row n of the cache what row ``index[n]`` was."""
        if self.routes is None or index == list(range(len(self.lengths))):
            return
        self.routes = [self.routes[row] for row in index]
        self.lengths = [self.lengths[row] for row in index]
        stores = {}
        for keeps, store in self.stores.items():
            place = {row: i for i, row in enumerate(store.rows)}
            rows = [row for row, old in enumerate(index) if old in place]
            if rows:
                store.select(rows, [place[index[row]] for row in rows])
                stores[keeps] = store
        self.stores = stores

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select(torch.arange(len(self.lengths))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select([row for row in range(len(self.lengths)) for _ in range(repeats)])

    def activate_past_recording(self) -> None:
        """
        Asked for by assisted decoding, which takes back tokens that the model rejects.

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
        if count > self.tail:
            raise ValueError(f"cannot crop {count} tokens: only the last {self.tail} are real in every sequence")
        ring = self.stores.get(False)
        if ring and max(self.lengths[row] for row in ring.rows) + self.overran > self.sink + self.window:
            raise ValueError(
                f"cannot crop {count} tokens: sparse layers keep sink + window = {self.sink + self.window} tokens and "
                "have dropped what would be needed; attach with keep_full_kv=True to be able to crop"
            )
        if count == self.seen:
            self.reset()
            return
        self.seen -= count
        self.tail -= count
        self.lengths = [length - count for length in self.lengths]

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

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are kept; buffers are a little larger."""
        return sum(store.nbytes([self.lengths[row] for row in store.rows]) for store in self.stores.values())


class _PassThroughLayer(CacheLayerMixin):
    """Passes states through: the decode kernel stores them."""

    is_sliding = False

    def update(self, key_states, value_states, *args, **kwargs):
        return key_states, value_states

    def lazy_initialization(self, *args) -> None: ...

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


class PassThroughCache(DynamicCache):
    """What a model takes for the KV cache while the decode kernel keeps the real one."""

    def __init__(self, layers: int):
        super().__init__()
        self.layers = [_PassThroughLayer() for _ in range(layers)]


def kv_bytes(cache: Cache) -> int:
    """
    Bytes of keys and values that a cache keeps, routed layers or stock ones.

    Parameters
    ----------
    cache : transformers.Cache
        As returned in ``past_key_values``.
    """
    return sum(layer.nbytes if isinstance(layer, RoutedLayer) else _stock_bytes(layer) for layer in cache.layers)


def dense_kv_bytes(cache: Cache) -> int:
    """
    Bytes of keys and values that the stock model would hold for the same tokens.

    Parameters
    ----------
    cache : transformers.Cache
        Filled while routers were attached.
    """
    total = 0
    for layer in cache.layers:
        if isinstance(layer, RoutedLayer):
            store = next(iter(layer.stores.values()), None)
            if store is not None:
                _, heads, _, dim = store.key_RKCD.shape
                total += 2 * sum(layer.lengths) * heads * dim * store.key_RKCD.element_size()
        else:
            total += _stock_bytes(layer)
    return total


def _stock_bytes(layer: CacheLayerMixin) -> int:
    held = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(states.numel() * states.element_size() for states in held if states is not None)
