"""Runs where requests come in: refuses wishes that mean nothing, and counts what was routed."""

from __future__ import annotations

import functools
from collections import deque
from typing import Any

from prometheus_client import Gauge, Histogram
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor

from flux_attention.errors import ServingError
from flux_attention.serving.pages import pages_needed
from flux_attention.serving.requests import Wish
from flux_attention.serving.settings import KEY, Settings

#: What is counted, and how many requests tell what the next ones will be like.
OMEGA, FIT, REMEMBERED = "flux_attention_omega_msr", "flux_attention_requests_that_fit", 64


class Counts:
    """
    Counts what was routed, for Prometheus.

    Attributes
    ----------
    engine : tuple or None
        vLLM's configuration and the adapter's, once a request came.
    """

    def __init__(self):
        self.engine, self.last = None, deque(maxlen=REMEMBERED)
        self.omega = Histogram(
            OMEGA, "Share of routed layers that ran sparse, by request", buckets=[step / 10 for step in range(11)]
        )
        self.fit = Gauge(FIT, "Requests of the longest kind that the KV cache holds, routed as the latest ones were")

    def add(self, omega: float) -> None:
        """Count a request whose routes are known."""
        self.omega.observe(omega)
        self.last.append(omega)
        if self.engine is None or not self.engine[0].cache_config.num_gpu_blocks:
            return
        config, adapter = self.engine
        layers = len(adapter.base_model.routed_layers)
        sparse = layers * sum(self.last) / len(self.last)
        sizes = config.cache_config.block_size, adapter.sparse["sink"], adapter.sparse["window"]
        needed = pages_needed(config.model_config.max_model_len, *sizes, layers - sparse, sparse)
        self.fit.set((config.cache_config.num_gpu_blocks - 1) / needed)


def install() -> None:
    """Look at requests and answers in this process; more calls change nothing."""
    if hasattr(InputProcessor.process_inputs, KEY):
        return
    generate, process_inputs = AsyncLLM.generate, InputProcessor.process_inputs
    process_outputs, counts = OutputProcessor.process_outputs, Counts()

    def check(processor: InputProcessor, params: Any) -> None:
        if (processor.vllm_config.additional_config or {}).get(KEY):
            config = _config(processor)
            counts.engine = processor.vllm_config, config
            try:
                Wish.of(params, config, config.base_model.routed_layers)
            except ServingError as error:
                raise VLLMValidationError(str(error), parameter="vllm_xargs") from None

    @functools.wraps(generate)
    def checked_first(self, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any):
        # No generator itself: a server has not begun to answer when it calls this, so that a stream is refused, too.
        check(self.input_processor, sampling_params)
        return generate(self, prompt, sampling_params, *args, **kwargs)

    @functools.wraps(process_inputs)
    def checked(self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any):
        check(self, params)
        return process_inputs(self, request_id, prompt, params, *args, **kwargs)

    @functools.wraps(process_outputs)
    def counted(self, engine_core_outputs: list, *args: Any, **kwargs: Any):
        for output in engine_core_outputs:
            state = self.request_states.get(output.request_id)
            if told := (output.kv_transfer_params or {}).get(KEY):
                counts.add(told["omega_msr"])
                if state is not None:
                    setattr(state, KEY, told)
            elif told := getattr(state, KEY, None):  # what came with the first tokens is told with the last ones too
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: told}
        return process_outputs(self, engine_core_outputs, *args, **kwargs)

    setattr(checked, KEY, True)
    AsyncLLM.generate, InputProcessor.process_inputs = checked_first, checked
    OutputProcessor.process_outputs = counted


def _config(processor: InputProcessor):
    """Read the adapter's configuration once."""
    if not hasattr(processor, KEY):
        setattr(processor, KEY, Settings.read(processor.vllm_config.additional_config).config())
    return getattr(processor, KEY)
