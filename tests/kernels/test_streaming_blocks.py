"""Attention by whole blocks, with the Triton kernel that computes it on a GPU, against a float64 oracle."""

import pytest
import torch
from helpers.devices import DEVICES
from helpers.kernels import TOLERANCE, states
from helpers.oracles import error, oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_attention.kernels import streaming_blocks, triton_prefill
from flux_attention.patterns import Streaming

pytestmark = pytest.mark.usefixtures("poisoned")


def triton_full(query, key, value, scale):
    return triton_prefill.attention(query, key, value, 0, key.shape[2], scale)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 90), st.integers(0, 30), st.integers(1, 40), st.sampled_from([4, 16]), st.sampled_from([1, 2, 64]),
    st.data(),
)  # fmt: skip
def test_blocks_by_the_triton_kernel(device, keys, sink, window, block, blocks, data):
    length = data.draw(st.one_of(st.just(keys), st.integers(1, keys)), "length")
    generator = torch.Generator(device).manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    query = states(generator, 4, length, 16, torch.float16, "BSHD")
    key, value = (states(generator, 2, keys, 16, torch.float16, "BHSD") for _ in range(2))
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    pattern = Streaming(sink, window, block_size=block)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming_blocks, "BLOCKS", blocks)
        patch.setattr(streaming_blocks, "full", triton_full)
        output = pattern.prefill(*leaves, 0.25)
    truth = [tensor.detach().double().requires_grad_() for tensor in leaves]
    expected = oracle(*truth, pattern.mask(keys)[keys - length :].to(device), 0.25)
    assert error(output, expected) < TOLERANCE[torch.float16]
    weight = torch.randn(output.shape, generator=generator, device=device)
    actual = torch.autograd.grad(output, leaves, weight.half())
    for a, e in zip(actual, torch.autograd.grad(expected, truth, weight.double()), strict=True):
        assert (a.double() - e).norm() < 4 * TOLERANCE[torch.float16] * e.norm() + 1e-3 * a.numel() ** 0.5
