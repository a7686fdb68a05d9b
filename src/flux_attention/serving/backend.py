"""Puts routed attention over vLLM's own: its backends, metadata builders and implementations, subclassed.

Full rows of steps with prompts are vLLM's own attention's, unless full layers are block-sparse. Sparse rows, and on
GPUs all rows of decode steps, are ours.

Shape suffixes: T tokens of all rows, B rows (sequences), N pages, P tokens of a page, K KV heads, D head dim.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from flux_attention import kernels
from flux_attention.kernels import DTYPES, HEAD_DIMS
from flux_attention.patterns import BlockSparse
from flux_attention.serving.routes import Ends, InPrefill, Unrotation


@dataclass(kw_only=True)
class RoutedLayer:
    """
    What a routed layer's implementation knows besides vLLM's.

    Attributes
    ----------
    place : int
        Of the layer among the routed ones.
    sink, window : int
        Tokens.
    unrotate : Unrotation
        Of its queries.
    routes_N : torch.Tensor
        uint8: at a row's first page whether the row is full (1) or sparse (0) in this layer.
    blocks : BlockSparse or None
        Of the prompts of full rows; exact attention if None.
    workspace : PagedWorkspace or None
        On GPUs.
    in_prefill : InPrefill or None
        Where routers decide in the prefill.
    """

    place: int
    sink: int
    window: int
    unrotate: Unrotation
    routes_N: torch.Tensor
    blocks: BlockSparse | None = None
    workspace: Any = None
    in_prefill: InPrefill | None = None


class RoutedAttention:
    """Runs before an implementation of vLLM's, whose ``forward`` it takes over in routed layers."""

    #: Set by the worker once the model is there.
    routed: RoutedLayer | None = None

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
        """See ``AttentionImpl.forward``."""
        if isinstance(attn_metadata, Ends):
            return self._read_ends(attn_metadata, query, key, value, output)
        if self.routed is None or attn_metadata is None:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)

        if self.routed.in_prefill is not None and attn_metadata.max_query_len > 1:
            self._decide(query, attn_metadata)

        def full(metadata):
            stock = super(RoutedAttention, self).forward
            return stock(layer, query, key, value, kv_cache, metadata, output, *args, **kwargs)

        self._attend(full, query, self.pages(kv_cache), attn_metadata, output)
        return output

    def _decide(self, query, metadata) -> None:
        mine, rows = self.routed, len(metadata.query_start_loc) - 1
        first = metadata.block_table[:rows, 0].long()
        mine.in_prefill.decide(mine.place, query, metadata.query_start_loc, first, mine.unrotate, mine.routes_N)

    @staticmethod
    def takes(head_size: int, dtype: torch.dtype) -> bool:
        """Whether heads of this kind can be attended to."""
        return True

    def _read_ends(self, ends: Ends, query, key, value, output):
        if self.routed is not None:
            ends.read(self.routed.place, query)
        output.copy_(ends.attend(query, key, value, self.scale).reshape(output.shape))
        return output

    def pages(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of the keys and the values, (N, P, K, D)."""
        raise NotImplementedError

    def _attend(self, full, query, pages, metadata, output) -> None:
        """Compute a step: ``full`` runs vLLM's own attention with the metadata that it is given."""
        raise NotImplementedError


class OnGpu(RoutedAttention):
    """Attends by our kernels, which read routes on the device: CUDA graphs of decode steps serve all routes."""

    @staticmethod
    def takes(head_size, dtype):
        """See ``RoutedAttention.takes``."""
        return head_size in HEAD_DIMS and dtype in DTYPES

    def pages(self, kv_cache):
        """See ``RoutedAttention.pages``."""
        if kv_cache.shape[1] == 2 and kv_cache.ndim == 5:  # vLLM 0.25: (N, 2, P, K, D)
            return kv_cache.unbind(1)
        return kv_cache.transpose(1, 2).split(self.head_size, dim=-1)  # (N, K, P, 2 D)

    def _attend(self, full, query, pages, metadata, output):
        from flux_attention.kernels import triton_paged  # only where Triton is installed

        mine, tokens = self.routed, metadata.num_actual_tokens
        shared = dict(sink=mine.sink, window=mine.window, scale=self.scale, routes_N=mine.routes_N)
        rows = len(metadata.query_start_loc) - 1
        table, lengths = metadata.block_table[:rows], metadata.seq_lens[:rows]
        query, answer = query[:tokens], output[:tokens].view(tokens, *query.shape[1:])
        if metadata.max_query_len == 1:
            # Rows beyond the tokens are a CUDA graph's padding.
            rows = min(rows, tokens)
            triton_paged.decode(
                query[:rows], *pages, answer[:rows], table[:rows], lengths[:rows], workspace=mine.workspace, **shared
            )
            return
        seen = torch.where(mine.routes_N[table[:, 0].long()] != 0, lengths, 0)
        first = mine.blocks.selects_from(query.transpose(0, 1)[None]) if mine.blocks else None
        selects = first is not None and metadata.max_seq_len >= first
        if selects:
            seen = seen.where((lengths < first) | (metadata.query_start_loc.diff() == 1), 0)
        # Rows of no keys cost next to nothing, but are written to: what computes them comes after.
        full(replace(metadata, seq_lens=seen))
        if selects:
            self.attend_blocks(query, pages, answer, metadata, table, lengths, first)
        triton_paged.sparse_prefill(query, *pages, answer, table, metadata.query_start_loc, lengths, **shared)

    def attend_blocks(self, query, pages, answer, metadata, table, lengths, from_tokens):
        """Compute the new tokens of long full rows block-sparse."""
        from flux_attention.kernels import triton_block_sparse

        mine, blocks = self.routed, self.routed.blocks
        paged = triton_block_sparse.Paged(
            table, metadata.query_start_loc, lengths, mine.routes_N, metadata.max_seq_len, from_tokens
        )
        share = query.new_full((1,), blocks.threshold, dtype=torch.float32)
        triton_block_sparse.paged_block_sparse(
            query, *pages, answer, paged, self.scale, blocks.select == "mass", share, blocks.stride
        )


class OnCpu(RoutedAttention):
    """Attends in plain PyTorch, row by row: to try things out, and for tests."""

    def pages(self, kv_cache):
        """See ``RoutedAttention.pages``; keys lie across, as ``CpuBuilder`` asks for."""
        blocks, heads, size, _ = kv_cache.shape
        key, value = kv_cache.view(blocks, heads, 2 * size, -1).chunk(2, dim=2)
        key = key.flatten(2).view(blocks, heads, -1, size).transpose(2, 3)
        return key.transpose(1, 2), value.transpose(1, 2)

    def _attend(self, full, query, pages, metadata, output):
        mine = self.routed
        rows = len(metadata.query_start_loc) - 1
        starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens[:rows].tolist()
        is_full = mine.routes_N[metadata.block_table[:rows, 0].long()].tolist()
        news = [stop - start for start, stop in itertools.pairwise(starts)]
        if any(is_full[row] and (mine.blocks is None or news[row] == 1) for row in range(rows)):
            full(metadata)  # also of other rows, for nothing
        for row in range(rows):
            new, count = slice(starts[row], starts[row + 1]), news[row]
            blocks = mine.blocks if is_full[row] and count > 1 else None
            if count == 0 or (is_full[row] and blocks is None):
                continue
            tokens = torch.arange(lengths[row]) if blocks else self._kept(lengths[row], count)
            where = metadata.block_table[row, tokens // pages[0].shape[1]].long(), tokens % pages[0].shape[1]
            key, value = (states[where].transpose(0, 1)[None] for states in pages)  # (1, K, T, D)
            states = query[new].transpose(0, 1)[None], key, value
            if blocks:
                out = blocks.attend(*states, self.scale)
            else:
                out = kernels.streaming(*states, mine.sink, mine.window, self.scale)
            output[new] = out[0].transpose(0, 1).reshape(output[new].shape)

    def _kept(self, length: int, queries: int) -> torch.Tensor:
        """List what a sparse row's new tokens see, sink first."""
        oldest = max(0, length - queries - self.routed.window + 1)
        # The sink is whole, or what stands before the first window.
        return torch.cat([torch.arange(min(self.routed.sink, oldest)), torch.arange(oldest, length)])


class DecodeGraphs:
    """
    Stands before a metadata builder: CUDA graphs hold decode steps alone, as others need vLLM's attention too.

    Each routed layer is a KV cache group with a builder of its own. What they build for a step differs in the block
    table and in where new tokens go, so all but the first copy the rest.
    """

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    #: What the last metadata was built of, and that; of all builders in the process.
    latest: ClassVar[list[Any]] = [(), None]

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        """Build metadata without vLLM's schedule, which would be for other lengths than those that it is used with."""
        common = common_attn_metadata
        told = common.num_reqs, common.num_actual_tokens, common.max_query_len, common.max_seq_len, common.causal
        made_of = (common.query_start_loc, common.seq_lens, common_prefix_len, *told)
        before, metadata = self.latest
        if len(before) == len(made_of) and all(map(_same, before, made_of)):
            return self.update_block_table(metadata, common.block_table_tensor, common.slot_mapping)
        self.latest[:] = made_of, super().build(common_prefix_len, common, fast_build=True)
        return self.latest[1]


def _same(one: Any, other: Any) -> bool:
    """Whether two are the same tensor, or equal numbers."""
    numbers = not isinstance(one, torch.Tensor) and not isinstance(other, torch.Tensor)
    return one is other or (numbers and one == other)


def _flash() -> type:
    from vllm.v1.attention.backends import flash_attn as own

    class Implementation(OnGpu, own.FlashAttentionImpl):
        pass

    class Builder(DecodeGraphs, own.FlashAttentionMetadataBuilder):
        pass

    return _backend(own.FlashAttentionBackend, Implementation, Builder)


def _cpu() -> type:
    from vllm.v1.attention.backends import cpu_attn as own

    class Implementation(OnCpu, own.CPUAttentionBackendImpl):
        pass

    class Builder(own.CPUAttentionMetadataBuilder):
        def _set_isa_to_layers(self, layer_names):
            self.isa = "vec"  # on every CPU, and its pages are laid out in a way that we can read
            super()._set_isa_to_layers(layer_names)

    return _backend(own.CPUAttentionBackend, Implementation, Builder)


def _backend(own: type, implementation: type, builder: type) -> type:
    """Subclass a backend of vLLM's with an implementation and a builder of ours."""
    methods = {"get_impl_cls": staticmethod(lambda: implementation), "get_builder_cls": staticmethod(lambda: builder)}
    # vLLM looks the class up by its name.
    return type("RoutedBackend", (own,), {**methods, "__module__": __name__, "__qualname__": "RoutedBackend"})


RoutedBackend = _cpu() if current_platform.is_cpu() else _flash()
"""The platform's backend, routed."""


def install() -> str:
    """Put the routed backend in place of vLLM's own, in this process; return its name."""
    name = RoutedBackend.get_name()
    register_backend(AttentionBackendEnum[name], f"{__name__}.RoutedBackend")
    return name
