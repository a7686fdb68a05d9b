"""The entry point that vLLM calls in each of its processes: routes are decided if an adapter is named, else nothing is.

Wrapped is ``EngineArgs.create_engine_config``, to set the flags that routing needs, and then the functions that
requests and answers pass through, see ``api``. All else goes in by options of vLLM's own: the worker's and the
scheduler's class, and the attention backend's name.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import vllm
from packaging.version import Version
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.platforms import current_platform

from flux_attention.errors import ServingError
from flux_attention.serving.settings import KEY, Settings

logger = init_logger("vllm.flux_attention")

#: The versions of vLLM that this was written for: from the first on, before the second.
OLDEST, BEYOND = Version("0.25.1"), Version("0.33")
#: Tokens of a page on GPUs, unless the user says otherwise.
BLOCK = 64
#: vLLM's worker classes, and ours in their place.
WORKERS = ("vllm.v1.worker.gpu_worker.Worker", "vllm.v1.worker.cpu_worker.CPUWorker")
WORKER = "flux_attention.serving.worker.PlatformWorker"
SCHEDULER = "flux_attention.serving.scheduler.Routed{}Scheduler"


def register() -> None:
    """Let vLLM's engines route, if an adapter is named when they are configured; more calls change nothing."""
    create = EngineArgs.create_engine_config
    if hasattr(create, KEY):
        return

    @functools.wraps(create)
    def create_engine_config(self, *args, **kwargs):
        settings = Settings.read(self.additional_config)
        if settings is None:
            return create(self, *args, **kwargs)
        check_version()  # first: of others not even the parts may be there that the rest is made of
        prepare(self, settings)
        from flux_attention.serving import api

        api.install()
        return finish(create(self, *args, **kwargs), settings)

    setattr(create_engine_config, KEY, True)
    EngineArgs.create_engine_config = create_engine_config


def check_version() -> None:
    """
    Refuse versions of vLLM that this was not written for.

    Raises
    ------
    ServingError
        With those that it was written for.
    """
    version = Version(vllm.__version__)
    if not OLDEST <= Version(version.base_version) < BEYOND:
        raise ServingError(f"vLLM {version} was not tested with routing, expected {OLDEST} or newer, before {BEYOND}")


def prepare(arguments: EngineArgs, settings: Settings) -> None:
    """
    Set the flags that routing needs, before vLLM looks at them.

    Raises
    ------
    AdapterError, ServingError
        For an adapter that cannot be read, or a flag that asks for something else.
    """
    adapter = settings.config()
    if adapter.ranking is None and adapter.decide == "prefill":
        if arguments.enable_chunked_prefill:
            raise ServingError(
                "routers that decide in the prefill read whole prompts: leave --enable-chunked-prefill out, or decide "
                "by the ends"
            )
        arguments.enable_chunked_prefill = False
    if arguments.enable_prefix_caching:
        raise ServingError(
            "prefix caching shares keys between requests, but they depend on routes: leave --enable-prefix-caching out"
        )
    arguments.enable_prefix_caching = False
    if arguments.block_size is None and not current_platform.is_cpu():
        # A pool of single layers' pages has many of them, and each costs the scheduler time.
        arguments.block_size = BLOCK
    if arguments.worker_cls != "auto" or arguments.scheduler_cls is not None:
        raise ServingError("--worker-cls and --scheduler-cls are what routing comes in by: leave them out")
    arguments.additional_config = {**(arguments.additional_config or {}), **settings.to_dict()}


def finish(config: Any, settings: Settings) -> Any:
    """
    Put our worker and scheduler into an engine's configuration, and say what was done.

    Raises
    ------
    ServingError
        For what cannot be served, by name.
    """
    if reasons := refusals(config):
        raise ServingError("routing does not serve " + "; ".join(reasons))
    parallel, scheduler = config.parallel_config, config.scheduler_config
    if parallel.worker_cls not in WORKERS:
        raise ServingError(f"the platform's worker is {parallel.worker_cls}, expected one of {WORKERS}")
    parallel.worker_cls = WORKER
    scheduler.scheduler_cls = SCHEDULER.format("Async" if scheduler.async_scheduling else "")
    adapter = settings.config()
    if adapter.ranking is not None:
        how = f"fixed, {adapter.budget:.3g} of the layers sparse"
    elif adapter.decide == "prefill":
        how = "in the prefill, of whole prompts"
        if scheduler.long_prefill_token_threshold:
            raise ServingError(
                "routers that decide in the prefill read whole prompts: leave "
                "--long-prefill-token-threshold out, or decide by the ends"
            )
    else:
        how = "by the prompt's ends"
        if scheduler.max_num_batched_tokens < 2 * adapter.end_tokens:
            raise ServingError(
                f"a step computes {scheduler.max_num_batched_tokens} tokens, but routers read {adapter.end_tokens} at "
                f"each end of a prompt: expected --max-num-batched-tokens of {2 * adapter.end_tokens} at least"
            )
    logger.info(
        "flux-attention routes requests by %s (%s; sink %d, window %d); pages have %d tokens, prefix caching is off%s",
        settings.routers, how, adapter.sparse["sink"], adapter.sparse["window"], config.cache_config.block_size,
        "" if scheduler.enable_chunked_prefill else ", so is chunked prefill",
    )  # fmt: skip
    return config


def refusals(config: Any) -> list[str]:
    """List what an engine's configuration asks for that routing does not serve."""
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    asked = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "data parallelism of mixtures of experts": parallel.data_parallel_size > 1 and bool(model.is_moe),
        "the first executor for Ray": os.environ.get("VLLM_USE_RAY_V2_EXECUTOR_BACKEND") == "0",
        "answers that do not depend on the batch (VLLM_BATCH_INVARIANT)": os.environ.get("VLLM_BATCH_INVARIANT") == "1",
        "one KV cache group for all layers": config.scheduler_config.disable_hybrid_kv_cache_manager is True,
        "sequence parallelism": bool(getattr(config.compilation_config.pass_config, "enable_sp", False)),
        "routed experts in answers": getattr(model, "enable_return_routed_experts", False),
        "two batches that overlap (DBO)": getattr(parallel, "enable_dbo", False),
        "speculative decoding": config.speculative_config is not None,
        "KV connectors": config.kv_transfer_config is not None,
        "LoRA adapters": config.lora_config is not None,
        f"a KV cache of {cache.cache_dtype}": cache.cache_dtype not in ("auto", "bfloat16", "float16"),
        "multi-head latent attention (MLA)": model.use_mla,
        "encoder-decoder models": model.is_encoder_decoder,
        "models of images, video or sound": model.is_multimodal_model,
        "models with state-space layers": model.is_hybrid or model.is_attention_free,
        "models that generate nothing": model.runner_type != "generate",
        "prompts given as embeddings": getattr(model, "enable_prompt_embeds", False),
    }
    return [what for what, is_asked in asked.items() if is_asked]
