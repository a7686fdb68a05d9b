"""The figures of how-it-works.md: masks as the library's patterns have them, files as the script draws them."""

import importlib
from itertools import chain

import pytest

from flux_attention.patterns import Full, Streaming, Triangle


@pytest.fixture(scope="module")
def show():
    return importlib.import_module("show_how")


def test_masks_are_the_patterns(show):
    sizes = {"sink": show.SINK_TOKENS, "window": show.WINDOW_TOKENS}
    patterns = {"full": Full(), "streaming": Streaming(**sizes), "triangle": Triangle(**sizes, last_n=show.LAST_ROWS)}
    for name, pattern in patterns.items():
        drawn = [[show.seen(name, q, k) is not None for k in range(show.TOKENS)] for q in range(show.TOKENS)]
        assert drawn == pattern.mask(show.TOKENS).tolist()
        assert show.pairs(name) == pattern.pairs(show.TOKENS)
        assert sum(show.kept(name, key) is not None for key in range(show.TOKENS)) == pattern.kept(show.TOKENS)


def test_both_ways_have_as_many_sparse_heads_and_layers_end_earlier(show):
    ink = dict.fromkeys(("full", "window", "faint", "ink"), "#000")
    ends = [show.lanes(0, lengths, ink)[0] for lengths in (show.BY_HEAD, show.BY_LAYER)]
    assert ends[1] < ends[0]
    assert sorted(chain(*show.BY_HEAD)) == sorted(chain(*show.BY_LAYER))


def test_the_files_are_what_the_script_draws(show):
    for name, drawn in show.drawings().items():
        assert (show.IMAGES / name).read_text(encoding="utf-8") == drawn, "run python benchmarks/show_pages.py"
