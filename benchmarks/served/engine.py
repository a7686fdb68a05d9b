"""Runs one engine of vLLM's in this process, stock or routed, asks it, and notes what its scheduler tells."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

from flux_attention.serving import plugin
from flux_attention.serving.pages import pages_needed
from flux_attention.serving.settings import KEY
from served.models import BLOCKS_OF_ALL, make_model, make_ranking, make_routers
from served.rows import Step


@dataclass
class Answer:
    """
    Says when the tokens of an answer came.

    Attributes
    ----------
    asked : float
        Seconds, as ``times``.
    times : list of float
        Of each token.
    """

    asked: float
    times: list[float]

    @property
    def ttft_ms(self) -> float:
        """Milliseconds to the first token."""
        return 1000 * (self.times[0] - self.asked)

    @property
    def tpot_ms(self) -> float:
        """Milliseconds that each further token took, on average."""
        return 1000 * (self.times[-1] - self.times[0]) / max(1, len(self.times) - 1)


async def together(asked: Iterable[Awaitable[Any]]) -> list[Any]:
    """Wait for all; if one fails, or this is cancelled, the others are cancelled."""
    tasks = [asyncio.ensure_future(one) for one in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Recorder(StatLoggerBase):
    """Notes each step of an engine."""

    def __init__(self, vllm_config: Any = None, engine_index: int = 0):
        self.steps: list[Step] = []

    def record(self, scheduler_stats, iteration_stats, *args: Any, **kwargs: Any) -> None:
        """See ``StatLoggerBase.record``."""
        if scheduler_stats is None:
            return
        waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
        left = 0 if iteration_stats is None else iteration_stats.num_preempted_reqs
        self.steps.append((time.perf_counter(), scheduler_stats.num_running_reqs, waiting, left))

    def log_engine_initialized(self) -> None:
        """Do nothing."""


class Engine:
    """
    Holds a running engine.

    Parameters
    ----------
    name : {"stock", "routed", "blocks", "fixed"}
        Without our plugin, with routers, with block-sparse full layers, too, or with a fixed set of layers.
    args : argparse.Namespace
        See ``serving.py``.
    folder : path
        For the model's configuration and the adapter.
    """

    def __init__(self, name: str, args: Any, folder: Path):
        self.args, self.recorder, self.omega, self.numbers = args, Recorder(), None, itertools.count()
        base = make_model(folder / "model", args.shape, args.longest, args.dtype)
        self.vocabulary, self.layers, routed = base.vocab_size, base.num_layers, {}
        if name != "stock":
            plugin.register()  # also in a checkout that is not installed
            make = {
                "routed": make_routers, "blocks": partial(make_routers, prompts=BLOCKS_OF_ALL), "fixed": make_ranking
            }[name]  # fmt: skip
            self.omega = make(folder / "adapter", base, args.sparsity, args.sink, args.window)
            routed = {"additional_config": {KEY: {"routers": str(folder / "adapter")}}}
            if name == "blocks":
                routed["worker_extension_cls"] = "served.worker.Worker"
        page = args.page if name == "stock" else args.routed_page or args.page
        options = {"block_size": page, "num_gpu_blocks_override": args.pages and args.pages * self.shares}
        self.llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(folder / "model"),
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype=args.dtype,
                max_model_len=args.longest,
                max_num_seqs=args.max_seqs,
                max_num_batched_tokens=args.chunk,
                gpu_memory_utilization=args.memory,
                enable_prefix_caching=False,
                enforce_eager=args.eager,
                disable_log_stats=False,
                **{key: value for key, value in options.items() if value},
                **routed,
            ),
            stat_loggers=[lambda config, index: self.recorder],
        )
        cache = self.llm.vllm_config.cache_config
        self.page, self.pages = cache.block_size, cache.num_gpu_blocks
        self.selects = name == "blocks"

    @property
    def shares(self) -> int:
        """Into how many pages routing cuts one of vLLM's: each holds the states of one layer."""
        return 1 if self.omega is None else self.layers

    def fits(self, tokens: int) -> float:
        """Count the requests of ``tokens`` tokens that the KV cache holds."""
        sparse = 0 if self.omega is None else round(self.omega * self.layers)
        full = self.shares - sparse
        return (self.pages - 1) / pages_needed(tokens, self.page, self.args.sink, self.args.window, full, sparse)

    def prompt(self, length: int, row: int = 0) -> list[int]:
        """Make the token ids of a prompt; other rows begin with other tokens."""
        return [(7 * place + 13 * row) % (self.vocabulary - 20) + 10 for place in range(length)]

    async def ask(self, prompt: Sequence[int], new: int, routes: str | None = None) -> Answer:
        """
        Let the engine generate ``new`` tokens.

        Raises
        ------
        RuntimeError
            If they are fewer, or were routed in another way than expected.
        """
        params = SamplingParams(
            max_tokens=new,
            ignore_eos=True,
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"flux_routes": routes} if routes else None,
        )
        answer, output = Answer(time.perf_counter(), []), None
        prompts = {"prompt_token_ids": list(prompt)}
        async for output in self.llm.generate(prompts, params, f"request-{next(self.numbers)}"):
            answer.times += [time.perf_counter()] * len(output.outputs[0].token_ids)
        if len(answer.times) != new:
            raise RuntimeError(f"the engine gave {len(answer.times)} tokens, expected {new}")
        if self.omega is not None:
            told, expected = (output.kv_transfer_params or {}).get(KEY, {}), 0.0 if routes == "full" else self.omega
            if not math.isclose(told.get("omega_msr", -1), expected, abs_tol=1e-6):
                raise RuntimeError(f"the engine routed {told}, expected Ω_MSR {expected}")
        return answer

    async def warm(self, routes: Sequence[str | None]) -> None:
        """
        Let the engine compile what it compiles at first use, alone and together.

        Short prompts come last: as many as tell the scheduler what the next ones will be like.
        """
        if self.selects:
            await self.llm.collective_rpc("set_norms")
        chunk = self.args.chunk
        lengths = [min(length, self.args.longest - 32) for length in (512, chunk + 16, 2 * chunk + chunk // 2 + 1)]
        for length in lengths:
            for some in routes:
                await self.ask(self.prompt(length), 8, some)
        kinds = itertools.cycle(routes)
        await together(self.ask(self.prompt(length), 16, next(kinds)) for length in lengths * 2)
        await self.settle()

    async def density(self, length: int) -> float | None:
        """Read a prompt once more, and return what share of their blocks full layers select; None if they do not."""
        await self.llm.collective_rpc("watch_blocks")
        await self.ask(self.prompt(length), 1)
        (found,) = await self.llm.collective_rpc("selected")
        return None if found is None else round(found, 4)

    async def settle(self) -> None:
        """Make the scheduler expect requests that are routed as by the adapter, not as those that were forced."""
        await together(self.ask(self.prompt(16, row), 2) for row in range(64))
