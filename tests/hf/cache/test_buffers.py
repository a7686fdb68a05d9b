"""KV buffers against plain lists of tokens."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flux_attention.hf.cache.buffers import KVBuffer

SINK, WINDOW = 3, 5


def states(rows, width):
    """Keys (R, 1, S, 1) that name their tokens, negative in padding, and values that are twice as large."""
    padded = [row + [-1] * (width - len(row)) for row in rows]
    key = torch.tensor(padded, dtype=torch.float64).view(len(rows), 1, width, 1)
    return key, 2 * key


def tokens(buffer, row, slots):
    """The tokens that a row's slots hold, in order."""
    keys, values = buffer.read([row], slots)
    found = torch.cat(keys, dim=2).flatten().tolist()
    assert torch.cat(values, dim=2).flatten().tolist() == [2 * token for token in found]
    return found


@settings(max_examples=150, deadline=None)
@given(
    is_ring=st.booleans(),
    sizes=st.integers(1, 3).flatmap(
        lambda rows: st.lists(
            st.lists(st.sampled_from([0, 1, 1, 2, 4, 5, 8, 9, 30]), min_size=rows, max_size=rows),
            min_size=1,
            max_size=6,
        )
    ),
    same=st.booleans(),
)
@example(is_ring=True, sizes=[[9, 4], [0, 1]], same=False)  # padding must not take the place of a kept token
def test_appends_of_any_sizes(is_ring, sizes, same):
    """Rows of one length, or of lengths of their own, whose calls are padded on the right."""
    buffer = KVBuffer(list(range(len(sizes[0]))), SINK, WINDOW, is_ring)
    rows = [[] for _ in buffer.rows]
    for call in sizes:
        new = [call[0]] * len(call) if same else call
        if not max(new):
            continue
        past = [len(row) for row in rows]
        fresh = [[1000 * row + past[row] + n for n in range(count)] for row, count in enumerate(new)]
        buffer.append(*states(fresh, max(new)), past, new)
        for row, more in zip(rows, fresh, strict=True):
            row += more
        for place, row in enumerate(rows):
            seen = row if len(row) <= SINK + WINDOW else row[:SINK] + row[-WINDOW:]
            assert tokens(buffer, place, buffer.visible(len(row))) == seen
            if not is_ring:
                assert tokens(buffer, place, [slice(len(row))]) == row
    if buffer.key_RKCD is not None:
        lengths = [len(row) for row in rows]
        kept = [min(length, SINK + WINDOW) if is_ring else length for length in lengths]
        assert buffer.nbytes(lengths) == 2 * 8 * sum(kept)
        assert not is_ring or buffer.key_RKCD.shape[2] <= SINK + WINDOW


@pytest.mark.parametrize("is_ring", [False, True])
def test_selected_rows_go_on(is_ring):
    buffer = KVBuffer([0, 1, 2], SINK, WINDOW, is_ring)
    rows = [[100 * place + n for n in range(count)] for place, count in enumerate((20, 4, 11))]
    buffer.append(*states(rows, 20), [0, 0, 0], [20, 4, 11])
    buffer.select([5, 1], [2, 0])
    rows = [rows[2], rows[0]]
    assert buffer.rows == [5, 1]
    for _ in range(2 * WINDOW):
        new = [[len(row) + 7000] for row in rows]
        buffer.append(*states(new, 1), [len(row) for row in rows], [1, 1])
        rows = [row + more for row, more in zip(rows, new, strict=True)]
        for place, row in enumerate(rows):
            assert tokens(buffer, place, buffer.visible(len(row))) == row[:SINK] + row[-WINDOW:]


def test_states_carry_no_gradient_and_grow_by_little():
    """A buffer is copied when it grows, so its room grows with it; a prompt alone takes no more than it needs."""
    buffer = KVBuffer([0], SINK, WINDOW, False)
    key = torch.randn(1, 2, 2000, 4, requires_grad=True)
    buffer.append(key, key, [0], [2000])
    assert not buffer.key_RKCD.requires_grad
    rooms = set()
    for length in range(2000, 4000):
        buffer.append(key[:, :, :1], key[:, :, :1], [length], [1])
        rooms.add(buffer.key_RKCD.shape[2])
    assert len(rooms) <= 8 and max(rooms) <= 4000 * 9 / 8
    prompt = KVBuffer([0], SINK, WINDOW, False)
    prompt.reserve(2000, key, key, spare=False)
    assert prompt.key_RKCD.shape == (1, 2, 2000, 4)


def test_a_buffer_of_inference_mode_is_written_outside_of_it():
    buffer = KVBuffer([0], SINK, WINDOW, True)
    with torch.inference_mode():
        buffer.append(*states([list(range(12))], 12), [0], [12])
    buffer.append(*states([[12]], 1), [12], [1])
    assert tokens(buffer, 0, buffer.visible(13)) == [0, 1, 2, 8, 9, 10, 11, 12]
