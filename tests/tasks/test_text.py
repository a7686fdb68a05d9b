"""Local text: two splits that share nothing, and an error where there is none."""

import numpy as np
import pytest

from flux_attention.tasks import text


def test_splits_of_the_local_text_are_disjoint():
    training = {line.strip() for read in text.local_texts(False) for line in read.split("\n")}
    held_out = text.local_texts(True)
    assert sum(map(len, held_out)) > 300_000
    for read in held_out:
        lines = [line.strip() for line in read.split("\n") if len(line.strip()) >= 40]
        assert sum(line in training for line in lines) <= 0.1 * len(lines)
    assert text.is_held_out("asyncio/events.py") == text.is_held_out("asyncio/events.py")
    share = np.mean([text.is_held_out(str(i)) for i in range(20000)])
    assert share == pytest.approx(text.HELD_OUT_FRACTION, abs=0.005)


def test_no_text_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(text, "python_roots", lambda site_packages=False: [tmp_path])
    text.local_texts.cache_clear()
    with pytest.raises(RuntimeError, match="no source files found"):
        text.local_texts(True)
    text.local_texts.cache_clear()
