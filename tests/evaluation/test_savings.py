"""What an evaluation's methods saved: Ω_ESR by masks, and lengths at which there is nothing to save."""

import pytest
import torch
from helpers.models import PATTERNS, tiny_model

from flux_attention import attach
from flux_attention.evaluation.savings import mean_esr, nothing_saved
from flux_attention.patterns import sparse_pattern


@pytest.mark.parametrize("name", PATTERNS)
def test_esr_is_the_share_of_what_masks_hide(name):
    routing = attach(tiny_model("qwen3"), PATTERNS[name])
    pattern, full, lengths = sparse_pattern(PATTERNS[name]), [[True, False, False], [False] * 3], [40, 17]
    shares = []
    for row, length in zip(full, lengths, strict=True):
        hidden = torch.ones(length, length).tril().sum() - pattern.mask(length).sum()
        shares.append(row.count(False) / 3 * float(hidden / (length * (length + 1) / 2)))
    assert mean_esr(routing, full, lengths) == pytest.approx(sum(shares) / 2)
    assert mean_esr(routing, full, [13, 1]) == 0  # sink + window


def test_lengths_are_named_where_no_sparse_method_saved_anything():
    def row(length, sparsity, **esr):
        return {"seq_len": length, "sparsity": sparsity, **esr}

    rows = [row(512, 0.0, esr=0.0), row(512, 1.0, esr=0.0), row(512, 0.5, esr=0.0)]
    more = [row(4096, 0.0, esr=0.0), row(4096, 1.0, esr=0.3)]
    assert "Nothing is saved at 512 tokens: " in nothing_saved(rows + more)
    assert nothing_saved(more) is None
    assert nothing_saved([row(512, 0.0, esr=0.0)]) is None  # nothing was to be saved
    assert nothing_saved([*rows, row(512, 0.2, esr=0.01)]) is None  # another adapter's window is smaller
    assert nothing_saved([row(512, 1.0)]) is None  # a file of an older version
    assert "at lm-eval's tasks" in nothing_saved([row(None, 1.0, esr=0.0)])
