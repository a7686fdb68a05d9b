"""States and tolerances for tests of kernels, and memory that is poisoned."""

import pytest
import torch
from hypothesis import strategies as st

from flux_attention.kernels.split_table import FULL, KEPT, RING

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
HOPPER = pytest.mark.skipif(
    torch.cuda.device_count() == 0 or torch.cuda.get_device_capability() < (9, 0),
    reason="needs a GPU of compute capability 9.0 or newer",
)


def states(generator, heads, length, dim, dtype, layout, batch=2):
    """Random (batch, heads, length, dim) in one of the layouts that models give: heads inside or outside positions."""
    shape = (batch, heads, length, dim) if layout == "BHSD" else (batch, length, heads, dim)
    tensor = torch.randn(shape, generator=generator, device=generator.device).to(dtype)
    return tensor if layout == "BHSD" else tensor.transpose(1, 2)


@pytest.fixture
def poisoned():
    """What a kernel forgets to write is NaN: PyTorch fills the memory that it hands out."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@st.composite
def rows(draw):
    kinds = st.sampled_from([FULL, KEPT, RING])
    lengths = st.one_of(st.integers(0, 300), st.sampled_from([63, 64, 65, 127, 128, 129, 191, 192, 193]))
    return draw(st.lists(st.tuples(lengths, kinds), min_size=1, max_size=4))
