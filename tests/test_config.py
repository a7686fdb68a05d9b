import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_attention.config import BaseModel, FluxConfig
from flux_attention.errors import FluxConfigError
from flux_attention.patterns import full_pattern, sparse_pattern

BASE = BaseModel("org/model", "qwen3", 4, 64, 4, 2, 16, 100, (0, 2))
#: A file of version 0.1.
EARLIER = {"pattern": "streaming", "sink": 4, "window": 9, "last_n": 5, "pool_size": 6, "granularity": "layer",
           "base_model": asdict(BASE)}  # fmt: skip


@given(st.sampled_from(["streaming", "triangle"]), st.integers(0, 9), st.integers(1, 9), st.sampled_from([None, BASE]))
def test_json_round_trip(pattern, sink, window, base):
    config = FluxConfig(pattern=pattern, sink=sink, window=window, base_model=base)
    assert FluxConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_file_round_trip(tmp_path):
    FluxConfig(base_model=BASE).to_json(tmp_path / "c.json")
    assert FluxConfig.from_json(tmp_path / "c.json") == FluxConfig(base_model=BASE)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"patern": "streaming"}, r"unknown keys \['patern'\] in FluxConfig"),
        ({"granularity": "token"}, "granularity is 'token', expected one of"),
        ({"pattern": "dense"}, "pattern is 'dense', expected one of"),
        ({"window": 0}, "window is 0, expected a whole number, at least 1"),
        ({"sink": -1}, "sink is -1"),
        ({"pool_size": 1.5}, "pool_size is 1.5"),
        ({"window": True}, "window is True"),
        ({"base_model": {"nam": "x"}}, r"unknown keys \['nam'\] in base_model"),
        ({"base_model": {"name": "x"}}, "base_model is incomplete"),
        ({"base_model": 3}, "base_model is 3, expected an object or null"),
        ({"base_model": {**asdict(BASE), "sample": [1, "x"]}}, "base_model.sample is .1, 'x'., expected a list of num"),
        ({"window": 2**28 + 1}, "window is 268435457, expected at most 268435456 tokens"),
        ({1: 2}, r"unknown keys \['1'\] in FluxConfig; known keys are \['sparse'"),
        ({"sparse": {}}, "are both there"),
        ({"base_model": {**asdict(BASE), "head_dim": -4}}, "base_model.head_dim is -4"),
        ({"base_model": {**asdict(BASE), "routed_layers": "12"}}, "base_model.routed_layers is '12'"),
        ({"base_model": {**asdict(BASE), "routed_layers": 3}}, "base_model.routed_layers is 3"),
        ({"base_model": {**asdict(BASE), "model_type": 3}}, "base_model.model_type is 3"),
    ],
)
def test_bad_values_are_refused_by_name(values, message):
    with pytest.raises(FluxConfigError, match=message):
        sparse_pattern(FluxConfig.from_dict({**EARLIER, **values}))


@pytest.mark.parametrize(
    "values, message",
    [
        ([], "expected a JSON object"),
        ({"pattern": "triangle"}, r"missing keys \['last_n', 'sink', 'window'\]"),
        ({"pool_size": 5}, r"missing keys \['base_model', 'full', 'granularity', 'sparse'\]"),
    ],
)
def test_incomplete_files_are_refused(values, message):
    with pytest.raises(FluxConfigError, match=message):
        FluxConfig.from_dict(values)


@pytest.mark.parametrize("pattern, sizes", [("streaming", {}), ("triangle", {"last_n": 5})])
def test_files_of_earlier_versions_load(pattern, sizes):
    config = FluxConfig.from_dict({**EARLIER, "pattern": pattern})
    assert config.sparse == {"pattern": pattern, "sink": 4, "window": 9, **sizes}
    assert config == FluxConfig(pattern=pattern, sink=4, window=9, last_n=5, pool_size=6, base_model=BASE)


def test_patterns_are_refused_by_what_they_lack_or_cannot_be():
    for sparse in ({"pattern": "full"}, {"sink": 4}, {"pattern": "streaming"}, {"pattern": "streaming", "width": 3}):
        with pytest.raises(FluxConfigError, match=r"pattern is|unknown or missing"):
            sparse_pattern(FluxConfig(sparse=sparse))
    with pytest.raises(FluxConfigError, match="expected one of"):
        full_pattern(FluxConfig(full={"pattern": "streaming", "sink": 4, "window": 9}))


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "flux_config.json"
    for content in (b'{"pattern": "stre', b"\xff\xfe", b""):
        path.write_bytes(content)
        with pytest.raises(FluxConfigError, match=r"flux_config.json is not valid JSON.*truncated"):
            FluxConfig.from_json(path)


def test_differences_ignore_the_name():
    import dataclasses

    assert BASE.differences(dataclasses.replace(BASE, name="other")) == []
    assert BASE.differences(dataclasses.replace(BASE, num_heads=8)) == ["num_heads is 8, expected 4"]
