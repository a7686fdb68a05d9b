"""Batch layouts."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_attention.hf.layout import BatchLayout


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.data())
def test_packing_is_undone(batch, width, data):
    real = torch.tensor([[data.draw(st.booleans()) for _ in range(width)] for _ in range(batch)])
    tokens = BatchLayout.from_mask(real)
    states = torch.randn(batch, 2, width, 3)
    packed = tokens.left_align(states)
    for row in range(batch):
        torch.testing.assert_close(packed[row, :, : tokens.lengths[row]], states[row, :, real[row]])
    assert torch.equal(tokens.restore(packed), states)
    assert tokens.is_uniform == bool(real.all())
    for columns in range(width + 1):
        assert tokens.prompt_tokens(columns) == real[:, :columns].sum(1).tolist()
