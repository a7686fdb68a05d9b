"""How the decode kernel's work is split."""

from helpers.kernels import rows
from hypothesis import given
from hypothesis import strategies as st

from flux_attention.kernels.split_table import FULL, MAX_SPLITS, split_table


@given(rows(), st.sampled_from([(0, 1), (4, 9), (128, 1024)]), st.integers(4, 300))
def test_work_is_shared_by_what_there_is_to_read(kept, sizes, programs):
    table = [[7 * row, 7 * row + 1, 5, kind] for row, (_, kind) in enumerate(kept)]
    work = split_table(table, [1000 * length for length, _ in kept], *sizes, programs)
    assert len(work) == programs
    splits = dict.fromkeys(range(len(kept)), 0)
    for program, (*row, number, split, count) in enumerate(work):
        if count:
            assert row == table[number] and split == splits[number] < count <= MAX_SPLITS
            assert work[program - split][5] == 0  # the row's programs are neighbours
            splits[number] += 1
    blocks = {}
    for number, (length, kind) in enumerate(kept):
        keys = 1000 * length + 1 if kind == FULL else min(1000 * length + 1, sum(sizes))
        blocks[number] = -(-keys // 64)
        assert 1 <= splits[number] <= max(1, blocks[number] // 2)
    # No other sharing has a shorter longest split: one program fewer anywhere would make a split as long as it.
    open_rows = [n for n in splits if splits[n] < min(MAX_SPLITS, blocks[n] // 2)]
    if open_rows:
        assert sum(splits.values()) == programs
        worst = max(blocks[n] / splits[n] for n in open_rows)
        assert all(splits[n] == 1 or blocks[n] / (splits[n] - 1) >= worst for n in splits)
