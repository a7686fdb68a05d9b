"""Runs in each worker of vLLM: decides the routes of new requests before their first step, and reports them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.outputs import AsyncModelRunnerOutput

from flux_attention import adapters
from flux_attention.config import FluxConfig
from flux_attention.errors import ServingError
from flux_attention.kernels import to_device
from flux_attention.kernels.block_sparse import BLOCK
from flux_attention.patterns import BlockSparse, full_pattern
from flux_attention.routes import parse_routes
from flux_attention.serving.backend import RoutedLayer, install
from flux_attention.serving.model import base_model, mean_over_ranks, rotary_embeddings, routed_attentions
from flux_attention.serving.pages import LayerSpec
from flux_attention.serving.requests import Wish
from flux_attention.serving.routes import InPrefill, Routers, Unrotation, lay_out, take_ends
from flux_attention.serving.settings import Settings

logger = init_logger(__name__)

#: What a debugging server fills pages with that were given back.
SPOILT = 3e4


class RequestRouter:
    """
    Decides the routes of requests and keeps them, on the host and where kernels look.

    Parameters
    ----------
    model : torch.nn.Module
        vLLM's, loaded.
    vllm_config
    settings : Settings

    Raises
    ------
    AdapterError, ServingError
        If the adapter is not for this model, or the model cannot be routed here.
    """

    def __init__(self, model: nn.Module, vllm_config, settings: Settings):
        self.model, self.vllm_config = model, vllm_config
        attentions = routed_attentions(vllm_config)
        self.layers = tuple(attentions)
        base = base_model(model, vllm_config, self.layers)
        config, routers = adapters.load(settings.routers, base)
        self.config: FluxConfig = settings.served(config)
        self.device = next(model.parameters()).device
        self.place_L = torch.arange(len(self.layers), device=self.device)
        self.routers = list(routers.to(self.device).values())
        self.attentions, rotary = attentions, rotary_embeddings(model, attentions)
        self.unrotations = [Unrotation(rotary[layer]) for layer in attentions]
        #: Of each request in flight its routes, uint8 (L,) on the device; and what the scheduler was not told yet.
        self.known: dict[str, torch.Tensor] = {}
        self.news = News()
        self.routes_LN: torch.Tensor | None = None
        #: The KV cache group of each routed layer.
        self.groups: list[int] = []
        #: Routers at once, for the ends; and where they decide in the prefill, what of, and since this step.
        self.at_once = Routers(self.routers) if self.routers and self.config.decide == "ends" else None
        self.in_prefill: InPrefill | None = None
        self.asked: dict[str, torch.Tensor] = {}

    def allocate(self, kv_cache_config) -> None:
        """Make room for routes, once it is known how many pages there are, and tell each layer where."""
        # A multiple of 16, so that all layers' rows are aligned alike: kernels are compiled once.
        pages = -(-kv_cache_config.num_blocks // 16) * 16
        names = [group.layer_names for group in kv_cache_config.kv_cache_groups]
        self.routes_LN = torch.ones(len(self.layers), pages, dtype=torch.uint8, device=self.device)
        self.groups = [
            next(place for place, some in enumerate(names) if attention.layer_name in some)
            for attention in self.attentions.values()
        ]
        workspace, blocks = self._workspace(), self._blocks()
        if self.routers and self.config.decide == "prefill":
            asked, budgets = torch.zeros(2, pages, device=self.device)
            self.in_prefill = InPrefill(
                self.routers, self.config.pool_size, mean_over_ranks, asked.to(torch.uint8), budgets
            )  # fmt: skip
        for place, (layer, attention) in enumerate(self.attentions.items()):
            attention.impl.routed = RoutedLayer(
                place=place,
                sink=self.config.sparse["sink"],
                window=self.config.sparse["window"],
                unrotate=self.unrotations[place],
                routes_N=self.routes_LN[place],
                blocks=blocks and blocks.of_layer(layer),
                workspace=workspace,
                in_prefill=self.in_prefill,
            )

    def _blocks(self) -> BlockSparse | None:
        full = full_pattern(self.config)
        if not isinstance(full, BlockSparse):
            return None
        if (page := self.vllm_config.cache_config.block_size) % full.stride:
            raise ServingError(
                f"block-sparse full layers with a stride of {full.stride} cannot read pages of {page} tokens; expected "
                "a --block-size that it divides"
            )
        return full

    def _workspace(self):
        if current_platform.is_cpu():
            return None
        from flux_attention.kernels.triton_paged import PagedWorkspace  # only where Triton is installed

        one = next(iter(self.attentions.values()))
        rows = self.vllm_config.scheduler_config.max_num_seqs
        rows = max(rows, self.vllm_config.compilation_config.max_cudagraph_capture_size or 0)
        return PagedWorkspace(rows, one.num_heads, one.num_kv_heads, one.head_size, self.device)

    def spoil(self, pages: list[int]) -> None:
        """
        Fill pages with a number that shows in answers; all layers share one pool.

        No NaN: vLLM's kernels multiply what stands behind a row's last token in its page by zero.
        """
        pools = {attention.kv_cache.data_ptr(): attention.kv_cache for attention in self.attentions.values()}
        for pool in pools.values():
            pool[torch.tensor(pages, dtype=torch.long, device=pool.device)] = SPOILT

    @torch.inference_mode()
    def admit(self, scheduled) -> None:
        """Decide the routes of a step's new requests, and put those of all that start, or start again, in place."""
        if pages := getattr(scheduled, "flux_returned", None):
            self.spoil(pages)
        for request in scheduled.finished_req_ids:
            self.known.pop(request, None)
        started = [(new.req_id, new.block_ids) for new in scheduled.scheduled_new_reqs]
        cached = scheduled.scheduled_cached_reqs
        started += [
            (request, pages)
            for request, pages in zip(cached.req_ids, cached.new_block_ids, strict=True)
            if request in cached.resumed_req_ids
        ]
        unknown = [new for new in scheduled.scheduled_new_reqs if new.req_id not in self.known]
        if unknown:
            asked = self.decide(unknown)
        if started:
            first_RL = torch.tensor([[groups[place][0] for place in self.groups] for _, groups in started])
            first_RL = to_device(first_RL, self.device)
            assert self.routes_LN is not None
            self.routes_LN[self.place_L, first_RL] = torch.stack([self.known[request] for request, _ in started])
            if self.in_prefill is not None:
                self._ask([request for request, _ in started], first_RL, asked if unknown else {})

    def _ask(self, started: Sequence[str], first_RL: torch.Tensor, budgets: dict[str, float | None]) -> None:
        """Let layers decide the routes of some of the requests that start, and those of no other."""
        asked = to_device(torch.tensor([request in budgets for request in started], dtype=torch.uint8), self.device)
        told = to_device(torch.tensor([budgets.get(request) or 0.0 for request in started]), self.device)
        self.in_prefill.asked_N[first_RL] = asked[:, None].expand_as(first_RL)
        self.in_prefill.budgets_N[first_RL] = told[:, None].expand_as(first_RL)
        self.asked = {request: row for request, row in zip(started, first_RL, strict=True) if request in budgets}

    def learn(self) -> None:
        """After a step: look at what layers decided in it."""
        if not self.asked:
            return
        first_RL = torch.stack(list(self.asked.values()))
        self.in_prefill.asked_N[first_RL] = 0
        self._know(list(self.asked), self.routes_LN[self.place_L, first_RL])
        self.asked = {}

    def _know(self, requests: Sequence[str], routes_RL: torch.Tensor) -> None:
        """Keep routes, uint8 on the device or the CPU, and have them told."""
        self.news.add(requests, routes_RL)
        self.known.update(zip(requests, to_device(routes_RL, self.device), strict=True))

    def decide(self, requests: Sequence[Any]) -> dict[str, float | None]:
        """
        Decide the routes of new requests: as they wish, else by routers or the ranking.

        Returns
        -------
        dict of str to float or None
            The budgets of those whose routers decide in the prefill; until then they are full.
        """
        wishes = {request.req_id: self._wish(request) for request in requests}
        prompts = {}
        routes = {}
        for request in requests:
            wish = wishes[request.req_id]
            if wish.routes is not None:
                routes[request.req_id] = parse_routes(wish.routes, 1, self.layers)[0]
            elif self.config.ranking is not None:
                layers = self.config.with_budget(wish.budget).full_layers
                routes[request.req_id] = parse_routes(list(layers), 1, self.layers)[0]
            else:
                prompts[request.req_id] = request.prompt_token_ids
        if routes:
            self._know(list(routes), torch.stack(list(routes.values())).to(torch.uint8))
        if self.in_prefill is not None:
            full = torch.ones(len(self.layers), dtype=torch.uint8, device=self.device)
            self.known.update(dict.fromkeys(prompts, full))
            return {request: wishes[request].budget for request in prompts}
        for budget in {wishes[request].budget for request in prompts}:
            some = [request for request in prompts if wishes[request].budget == budget]
            most = self.vllm_config.scheduler_config.max_num_batched_tokens // (2 * self.config.end_tokens)
            for start in range(0, len(some), most):
                part = some[start : start + most]
                self._know(part, self.read([prompts[request] for request in part], budget))
        return {}

    def _wish(self, request: Any) -> Wish:
        """Read what a request wishes; it was checked when it came in, and is no reason to fail for all others."""
        try:
            return Wish.of(request.sampling_params, self.config, self.layers)
        except ServingError as error:
            logger.warning("request %s is routed as if it had no wish: %s", request.req_id, error)
            return Wish(None, self.config.budget)

    def read(self, prompts: Sequence[Sequence[int]], budget: float | None = None) -> torch.Tensor:
        """Run the model over prompts' ends and return what its routers say: uint8 (R, L) on the device."""
        return self.at_once(self.pooled(prompts), budget).to(torch.uint8)

    def pooled(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return what the routers read: float32 (L, R, D), the mean over the heads of all ranks."""
        ends = [take_ends(prompt, self.config.end_tokens) for prompt in prompts]
        tokens, positions, metadata = lay_out(ends, self.config.pool_size, self.device)
        with set_forward_context(metadata, self.vllm_config, num_tokens=len(tokens), slot_mapping={}):
            self.model(input_ids=tokens, positions=positions)
        return mean_over_ranks(metadata.pooled(self.unrotations))

    def take_news(self) -> News:
        """Return the routes that the scheduler was not told yet."""
        news, self.news = self.news, News()
        return news

    def warm_up(self) -> None:
        """Compile what no warm-up of vLLM's runs: kernels of sparse rows, and of block-sparse ones of any length."""
        if current_platform.is_cpu():
            return
        from flux_attention.kernels.triton_paged import sparse_prefill  # only where Triton is installed

        attention = next(iter(self.attentions.values()))
        mine, pages = attention.impl.routed, attention.impl.pages(attention.kv_cache)
        query = torch.zeros(1, attention.num_heads, attention.head_size, dtype=attention.dtype, device=self.device)
        table, starts = (torch.zeros(size, dtype=torch.int32, device=self.device) for size in ((1, 1), 2))
        starts[1] = 1
        lengths = torch.ones(1, dtype=torch.int32, device=self.device)  # aligned as a step's are: else other kernels
        sparse_prefill(
            *(query, *pages, torch.empty_like(query), table, starts, lengths, torch.zeros_like(mine.routes_N)),
            *(mine.sink, mine.window, attention.impl.scale),
        )
        if mine.blocks is None:
            return
        longest = self.vllm_config.model_config.max_model_len
        length = max(mine.blocks.selects_from(query.transpose(0, 1)[None]), BLOCK)
        while length < 2 * longest:  # the selection's kernel is another for each power of two
            step = SimpleNamespace(query_start_loc=starts, max_seq_len=length)  # a single token: nothing is computed
            attention.impl.attend_blocks(query, pages, torch.empty_like(query), step, table, lengths, 0)
            length *= 2


class News:
    """Holds routes on their way to the scheduler: a GPU brings them to the host while it does other things."""

    def __init__(self):
        self.parts: list[tuple[list[str], torch.Tensor, Any]] = []

    def add(self, requests: Sequence[str], routes_RL: torch.Tensor) -> None:
        """Send routes, uint8 on any device."""
        arrived = None
        if routes_RL.is_cuda:
            there = torch.empty(routes_RL.shape, dtype=routes_RL.dtype, pin_memory=True)
            routes_RL = there.copy_(routes_RL, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.parts.append((list(requests), routes_RL, arrived))

    def read(self) -> dict[str, list[bool]]:
        """Return the routes of each request, once they are there."""
        found: dict[str, list[bool]] = {}
        for requests, routes_RL, arrived in self.parts:
            if arrived is not None:
                arrived.synchronize()
            found.update(zip(requests, routes_RL.bool().tolist(), strict=True))
        return found


class RoutedWorker:
    """Stands before a worker class of vLLM's: installs routing in it, and routes what it executes."""

    router: RequestRouter | None = None

    def load_model(self, *args, **kwargs):
        """Load vLLM's model with routed attention, and the adapter."""
        install()
        super().load_model(*args, **kwargs)
        settings = Settings.read(self.vllm_config.additional_config)
        self.router = RequestRouter(self.model_runner.get_model(), self.vllm_config, settings)

    def get_kv_cache_spec(self):
        """Describe the KV cache as vLLM does, with a group for each routed layer."""
        found = super().get_kv_cache_spec()
        layers = {attention.layer_name: layer for layer, attention in self.router.attentions.items()}
        return {name: LayerSpec.of(spec, layers[name]) if name in layers else spec for name, spec in found.items()}

    def initialize_from_config(self, kv_cache_config, *args, **kwargs):
        """Allocate KV cache and routes."""
        self.router.allocate(kv_cache_config)
        found = super().initialize_from_config(kv_cache_config, *args, **kwargs)
        self.router.warm_up()
        return found

    def execute_model(self, scheduler_output, *args, **kwargs):
        """Route the new requests, then run the step."""
        self.router.admit(scheduler_output)
        output = super().execute_model(scheduler_output, *args, **kwargs)
        self.router.learn()
        return output if output is None else self._with_news(output)

    def sample_tokens(self, *args, **kwargs):
        """Sample, and report routes to the scheduler with the tokens."""
        return self._with_news(super().sample_tokens(*args, **kwargs))

    def _with_news(self, output):
        news = self.router.take_news()
        if output is None or not news.parts:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return _WithRoutes(output, news)
        output.flux_routes = news.read()
        return output


class _WithRoutes(AsyncModelRunnerOutput):
    """An output that is waited for later, with routes."""

    def __init__(self, output: AsyncModelRunnerOutput, news: News):
        self.output, self.news = output, news

    def get_output(self):
        found = self.output.get_output()
        found.flux_routes = self.news.read()
        return found

    def __getattr__(self, name: str):
        return getattr(self.output, name)


def _cpu_worker() -> type:
    from vllm.v1.worker.cpu_worker import CPUWorker

    return type("RoutedCpuWorker", (RoutedWorker, CPUWorker), {"__module__": __name__})


def _gpu_worker() -> type:
    from vllm.v1.worker.gpu_worker import Worker

    return type("RoutedGpuWorker", (RoutedWorker, Worker), {"__module__": __name__})


PlatformWorker = _cpu_worker() if current_platform.is_cpu() else _gpu_worker()
"""The platform's worker, routed."""
