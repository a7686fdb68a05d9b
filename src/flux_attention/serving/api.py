"""Runs where requests come in: refuses wishes that mean nothing, and counts what was routed."""

from __future__ import annotations

import functools
from typing import Any

from prometheus_client import Histogram
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor

from flux_attention.errors import ServingError
from flux_attention.serving.requests import Wish
from flux_attention.serving.settings import KEY, Settings

#: The name of the metric.
METRIC = "flux_attention_omega_msr"


def install() -> None:
    """Look at requests and answers in this process; more calls change nothing."""
    if hasattr(InputProcessor.process_inputs, KEY):
        return
    process_inputs, process_outputs = InputProcessor.process_inputs, OutputProcessor.process_outputs
    omega = Histogram(
        METRIC, "Share of routed layers that ran sparse, by request", buckets=[step / 10 for step in range(11)]
    )

    @functools.wraps(process_inputs)
    def checked(self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any):
        if (self.vllm_config.additional_config or {}).get(KEY):
            config = _config(self)
            try:
                Wish.of(params, config, config.base_model.routed_layers)
            except ServingError as error:
                raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
        return process_inputs(self, request_id, prompt, params, *args, **kwargs)

    @functools.wraps(process_outputs)
    def counted(self, engine_core_outputs: list, *args: Any, **kwargs: Any):
        for output in engine_core_outputs:
            if told := (output.kv_transfer_params or {}).get(KEY):
                omega.observe(told["omega_msr"])
        return process_outputs(self, engine_core_outputs, *args, **kwargs)

    setattr(checked, KEY, True)
    InputProcessor.process_inputs, OutputProcessor.process_outputs = checked, counted


def _config(processor: InputProcessor):
    """Read the adapter's configuration once."""
    if not hasattr(processor, KEY):
        setattr(processor, KEY, Settings.read(processor.vllm_config.additional_config).config())
    return getattr(processor, KEY)
