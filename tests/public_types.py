"""Checked by `make types`, never run: what a type checker tells users of the public names."""

from transformers import PreTrainedModel
from typing_extensions import assert_type

from flux_attention import FluxConfig, Routes, Routing, attach, kv_bytes
from flux_attention.hf.report import Report


def use(model: PreTrainedModel) -> None:
    config = FluxConfig(sink=4, window=16)
    assert_type(config.with_budget(0.5), FluxConfig)
    routing = attach(model, config, min_tokens=8)
    assert_type(routing, Routing)
    assert_type(routing.routes, Routes | None)
    with routing.force([1, 2]) as within:
        assert_type(within, Routing)
    assert_type(routing.report(), Report)
    assert_type(routing.report().kv_bytes, int | None)
    assert_type(kv_bytes(model(None).past_key_values), int)
    assert_type(routing.push_to_hub("me/routers"), str)
