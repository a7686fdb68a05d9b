"""KV buffers: the keys and values of the rows of a batch that keep the same, all tokens or a ring of sink + window.

Rows are left-aligned: only real tokens are stored, so padding costs nothing and a token's slot does not depend on the
batch that it is in.

Shape suffixes: R rows of one buffer, S new tokens, K KV heads, C capacity, D head dim.
"""

from __future__ import annotations

import torch

from flux_attention.kernels import index_on


def take_rows(states: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Return ``states[rows]``, without a copy where that is all of them in order."""
    return states if rows == list(range(len(states))) else states[index_on(states.device, rows)]


class KVBuffer:
    """
    Keys and values of the rows that keep the same.

    Parameters
    ----------
    rows : list of int
        Their places in the batch.
    sink, window : int
        Tokens of sparse attention.
    is_ring : bool
        Whether only the first ``sink`` tokens and a ring of the latest ``window`` ones are kept.
    """

    def __init__(self, rows: list[int], sink: int, window: int, is_ring: bool):
        self.rows, self.sink, self.window, self.is_ring = rows, sink, window, is_ring
        self.key_RKCD: torch.Tensor | None = None
        self.value_RKCD: torch.Tensor | None = None

    @property
    def limit(self) -> int | None:
        """Tokens that are kept of a row at most; None for all."""
        return self.sink + self.window if self.is_ring else None

    def visible(self, length: int) -> list[slice]:
        """List where those of ``length`` tokens are that later sparse queries may see, in order."""
        sink, low = min(self.sink, length), max(min(self.sink, length), length - self.window)
        return [slice(sink), *self._slots(low, length)]

    def _slots(self, first: int, end: int) -> list[slice]:
        """List where tokens ``first`` to ``end`` are, no more than a ring holds: one stretch, or two around its end."""
        if not self.is_ring or end <= self.sink + self.window:  # a ring that is not full keeps tokens in order
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
        limit = self.limit
        need = length if limit is None else min(length, limit)
        have = 0 if self.key_RKCD is None else self.key_RKCD.shape[2]
        if need <= have:
            return
        capacity = need
        if spare:
            capacity = need + 64 if have == 0 else max(need, have + max(64, have // 8))
        if limit is not None:
            capacity = min(capacity, limit)

        def grow(old: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor:
            batch, heads, _, dim = states.shape
            new = states.new_zeros(batch, heads, capacity, dim)
            if old is not None:
                new[:, :, :have] = old
            return new

        self.key_RKCD, self.value_RKCD = grow(self.key_RKCD, key_RKSD), grow(self.value_RKCD, value_RKSD)

    def append(self, key_RKSD: torch.Tensor, value_RKSD: torch.Tensor, past: list[int], new: list[int]) -> None:
        """Store each row's first ``new`` tokens behind its ``past`` ones; gradients do not flow through them."""
        key_RKSD, value_RKSD = key_RKSD.detach(), value_RKSD.detach()
        if self.is_ring and self.key_RKCD is None and len(set(new)) == 1 and new[0] >= self.sink + self.window:
            # A prompt that fills the ring: by one launch a tensor, as the host bounds short prompts.
            pieces = [source for source, _ in sorted(self._runs(0, new[0]), key=lambda run: run[1].start)]
            self.key_RKCD, self.value_RKCD = (
                torch.cat([states[:, :, piece] for piece in pieces], dim=2) for states in (key_RKSD, value_RKSD)
            )
            return
        self.reserve(max(p + n for p, n in zip(past, new, strict=True)), key_RKSD, value_RKSD)
        assert self.key_RKCD is not None and self.value_RKCD is not None
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
        """List (new tokens, slots) of each contiguous stretch of what is kept of ``count`` tokens from ``first`` on."""
        end = first + count
        kept = [(first, end)]
        if self.is_ring and end > self.sink + self.window:
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
        """Return keys and values of the buffer's rows ``index``, a piece for each stretch of ``slots``."""
        key, value = (
            [take_rows(states[:, :, stretch], index) for stretch in slots]
            for states in (self.key_RKCD, self.value_RKCD)
        )
        return key, value

    def select(self, rows: list[int], index: list[int]) -> None:
        """Become the buffer of batch rows ``rows``, copied from this buffer's rows ``index``."""
        self.rows = rows
        if self.key_RKCD is not None:
            where = index_on(self.key_RKCD.device, index)
            self.key_RKCD, self.value_RKCD = self.key_RKCD[where], self.value_RKCD[where]

    def nbytes(self, lengths: list[int]) -> int:
        """Count the bytes that are kept of sequences of these lengths; room for more is not counted."""
        if self.key_RKCD is None:
            return 0
        _, heads, _, dim = self.key_RKCD.shape
        most = max(lengths) if self.limit is None else self.limit
        kept = sum(min(length, most) for length in lengths)
        return 2 * kept * heads * dim * self.key_RKCD.element_size()
