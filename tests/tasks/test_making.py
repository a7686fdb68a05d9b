"""Many samples at once: the same from several processes as from one."""

import numpy as np
import pytest

from flux_attention.tasks import making
from flux_attention.tasks.making import Wanted, make_samples


@pytest.mark.parametrize("chat", [False, None])
def test_processes_make_what_one_would(tokenizer, monkeypatch, chat):
    wanted = [Wanted(family, 600, seed) for seed in range(3) for family in ("look_up", "prose")][:5]
    expected = make_samples(wanted, "test", tokenizer, chat)
    started, run = [], making.subprocess.run

    def counted(command, **options):
        started.append(command)
        return run(command, **options)

    monkeypatch.setattr(making.subprocess, "run", counted)
    monkeypatch.setattr(making, "TOKENS_A_PROCESS", 1000)
    monkeypatch.setattr(making.os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    found = make_samples(wanted, "test", tokenizer, chat)
    assert len(started) == 2 and len(found) == len(wanted)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.input_ids, other.input_ids) and one.answers == other.answers
        assert one.question == other.question


def test_little_work_stays_in_this_process(tokenizer, monkeypatch):
    monkeypatch.setattr(making, "subprocess", None)
    (sample,) = make_samples([Wanted("look_up", 600, 0)], "test", tokenizer)
    assert sample.family == "look_up"
