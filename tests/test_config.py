import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_attention.config import BaseModel, FluxConfig, FluxConfigError

BASE = BaseModel("org/model", "qwen3", 4, 64, 4, 2, 16, 100, (0, 2))


@given(st.sampled_from(["streaming", "triangle"]), st.integers(0, 9), st.integers(1, 9), st.sampled_from([None, BASE]))
def test_json_round_trip(pattern, sink, window, base):
    config = FluxConfig(pattern, sink, window, base_model=base)
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
        ({1: 2}, r"unknown keys \['1'\] in FluxConfig; known keys are \['pattern'"),
        ({"base_model": {**asdict(BASE), "head_dim": -4}}, "base_model.head_dim is -4"),
        ({"base_model": {**asdict(BASE), "routed_layers": "12"}}, "base_model.routed_layers is '12'"),
        ({"base_model": {**asdict(BASE), "routed_layers": 3}}, "base_model.routed_layers is 3"),
        ({"base_model": {**asdict(BASE), "model_type": 3}}, "base_model.model_type is 3"),
        (
            {"pattern": "triangle"},
            r"missing keys \['base_model', 'granularity', 'last_n', 'pool_size', 'sink', 'window'\]",
        ),
        ([], "expected a JSON object"),
    ],
)
def test_bad_values_are_refused_by_name(values, message):
    with pytest.raises(FluxConfigError, match=message):
        FluxConfig.from_dict(values)


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
