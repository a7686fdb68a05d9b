"""What vLLM's worker does beside its work, where a random model's full layers attend block-sparse."""

from __future__ import annotations

import torch


class Worker:
    """Adds calls to vLLM's worker, for ``collective_rpc``; see its ``worker_extension_cls``."""

    def set_norms(self) -> None:
        """
        Let norms not shrink what they normalise.

        All of vLLM's random weights are tiny. Of norms such ones make queries and keys that score all but alike, so
        that a selection by mass could not tell blocks apart.
        """
        for name, module in self.get_model().named_modules():
            if name.endswith("norm") and getattr(module, "weight", None) is not None:
                module.weight.data.fill_(1.0)

    def watch_blocks(self) -> None:
        """Begin to count what block-sparse layers select, of what they could."""
        from flux_attention.kernels import triton_block_sparse as kernels

        select, self.counted = kernels.select_blocks, []

        def watched(*args, **options):
            lists, counts, *more = select(*args, **options)
            own = lists.gather(3, (counts - 1).clamp(min=0)[..., None].long())[..., 0]  # the last is the row's own
            self.counted.append(torch.stack([counts.sum(), (own + 1).where(counts > 0, 0).sum()]))
            return lists, counts, *more

        kernels.select_blocks, self.unwatched = watched, select

    def selected(self) -> float | None:
        """Return the share of blocks that was selected since, and stop counting; None if nothing was to select."""
        from flux_attention.kernels import triton_block_sparse as kernels

        kernels.select_blocks = self.unwatched
        some, every = torch.stack(self.counted).sum(0).tolist() if self.counted else (0, 0)
        return some / every if every else None
