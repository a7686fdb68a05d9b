"""The Triton decode kernel against a float64 oracle: by the interpreter on a CPU, compiled on a GPU."""

import math

import pytest
import torch
from helpers.devices import INTERPRETED
from helpers.kernels import TOLERANCE, rows
from helpers.oracles import error, oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_attention.kernels import triton_decode
from flux_attention.kernels.split_table import FULL, KEPT, RING, split_table

pytestmark = pytest.mark.usefixtures("poisoned")


def check_decode(device, dtype, kept, kv_heads, groups, dim, sink, window, seed):
    """Rows of (length, kind): output, and what is stored, of one step."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    batch, heads = len(kept), kv_heads * groups
    query, new_key, new_value = random(batch, heads, dim), random(batch, kv_heads, dim), random(batch, kv_heads, dim)
    table, buffers, pasts = [], [], []
    for length, kind in kept:
        past = random(2, kv_heads, length, dim)
        capacity = sink + window if kind == RING else length + 3
        buffer = torch.full((2, kv_heads, capacity, dim), math.nan, dtype=dtype, device=device)
        for position in range(length):
            buffer[:, :, slot_of(position, kind, sink, window)] = past[:, :, position]
        table.append([buffer[0].data_ptr(), buffer[1].data_ptr(), buffer.stride(1), kind])
        buffers.append(buffer)
        pasts.append(past)
    space = triton_decode.DecodeWorkspace(batch, heads, kv_heads, dim, torch.device(device))
    lengths = torch.tensor([length for length, _ in kept], dtype=torch.int32, device=device)
    work = split_table(table, lengths.tolist(), sink, window, space.programs)
    arguments = (torch.tensor(work, device=device), lengths, space, sink, window, dim**-0.5)
    output = triton_decode.attend(query, new_key, new_value, *arguments)
    again = triton_decode.attend(query, new_key, new_value, *arguments)  # the scratch memory is as it was
    assert torch.equal(output, again)
    for row, (length, kind) in enumerate(kept):
        new = torch.stack([new_key[row], new_value[row]])
        assert torch.equal(buffers[row][:, :, slot_of(length, kind, sink, window)], new)
        key, value = torch.cat([pasts[row], new[:, :, None]], dim=2)[:, None]
        j = torch.arange(length + 1, device=device)
        mask = (j < sink) | (length - j < window) if kind != FULL else j >= 0
        expected = oracle(query[row][None, :, None], key, value, mask[None], dim**-0.5)
        assert error(output[row][None, :, None], expected) < TOLERANCE[dtype]


def slot_of(position, kind, sink, window):
    return position if kind != RING or position < sink else sink + (position - sink) % window


@INTERPRETED
@settings(max_examples=25, deadline=None)
@given(
    rows(),
    st.sampled_from([(1, 1), (2, 4), (1, 3)]),
    st.sampled_from([(0, 1), (4, 9), (70, 64), (16, 200)]),
    st.integers(0, 2**31),
)
def test_decode_by_the_interpreter(kept, heads, sizes, seed):
    check_decode("cpu", torch.float16, kept, *heads, 16, *sizes, seed)


@pytest.mark.gpu
@settings(max_examples=60, deadline=None)
@given(
    rows(),
    st.sampled_from([(2, 4), (8, 1)]),
    st.sampled_from([(0, 1), (4, 9), (70, 64), (128, 1024)]),
    st.integers(0, 2**31),
)
def test_decode_of_random_rows(kept, heads, sizes, seed):
    check_decode("cuda", torch.bfloat16, kept, *heads, 128, *sizes, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("kv_heads, groups", [(8, 4), (1, 8), (2, 5), (1, 20)])
def test_decode_of_long_rows(dim, kv_heads, groups):
    kept = [(40_000, FULL), (9_000, KEPT), (1200, RING), (5, RING)]
    check_decode("cuda", torch.bfloat16, kept, kv_heads, groups, dim, 128, 1024, seed=dim)
