"""The tables of speed: what is set beside what."""

import importlib
from pathlib import Path


def test_deciding_is_set_beside_forced_routes_of_its_length(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    show, tables = importlib.import_module("show_speed"), importlib.import_module("show_tables")
    rows = [
        dict(shape="s", seq_len=seq_len, method=method, ms=ms, ms_min=ms - 1, ms_max=ms + 1)
        for seq_len, times in ((1024, (10, 15, 12)), (4096, (100, 99.99, 130)))
        for method, ms in zip(("static", "routed", "routed-ends"), times, strict=True)
    ]
    for module in (show, tables):
        monkeypatch.setattr(module, "load", lambda name: {"meta": {}, "rows": rows})
    assert show.ends_table().splitlines()[2:] == [
        "| 1 K | 10 (9 to 11) | 15 (14 to 16) | +5.0 (+50.0 %) | 12 (11 to 13) | +2.0 (+20.0 %) |",
        "| 4 K | 100 (99 to 101) | 100 (99 to 101) | 0.0 (0.0 %) | 130 (129 to 131) | +30.0 (+30.0 %) |",
    ]
