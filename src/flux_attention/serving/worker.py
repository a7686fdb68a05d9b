"""Runs in each worker of vLLM: decides the routes of new requests before their first step, and reports them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.config import get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.outputs import AsyncModelRunnerOutput

from flux_attention import adapters
from flux_attention.config import BaseModel, FluxConfig
from flux_attention.errors import ServingError
from flux_attention.routes import parse_routes
from flux_attention.serving.backend import RoutedAttention, RoutedLayer, install
from flux_attention.serving.pages import LayerSpec
from flux_attention.serving.requests import Wish
from flux_attention.serving.routes import Routers, Unrotation, lay_out, take_ends
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
        self.routers = None if self.config.ranking is not None else Routers(list(routers.values())).to(self.device)
        self.attentions, self.rotary = attentions, rotary_embeddings(model, attentions)
        #: Of each request in flight its routes, bool (L,) on the CPU, and those that the scheduler was not told yet.
        self.known: dict[str, torch.Tensor] = {}
        self.news: dict[str, list[bool]] = {}
        self.routes_LN: torch.Tensor | None = None
        #: The KV cache group of each routed layer.
        self.groups: list[int] = []

    def allocate(self, kv_cache_config) -> None:
        """Make room for routes, once it is known how many pages there are, and tell each layer where."""
        pages, names = kv_cache_config.num_blocks, [group.layer_names for group in kv_cache_config.kv_cache_groups]
        self.routes_LN = torch.ones(len(self.layers), pages, dtype=torch.uint8, device=self.device)
        self.groups = [
            next(place for place, some in enumerate(names) if attention.layer_name in some)
            for attention in self.attentions.values()
        ]
        workspace = self._workspace()
        for place, (layer, attention) in enumerate(self.attentions.items()):
            attention.impl.routed = RoutedLayer(
                place,
                self.config.sparse["sink"],
                self.config.sparse["window"],
                Unrotation(self.rotary[layer]),
                self.routes_LN[place],
                workspace,
            )

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
            routes = self.decide(unknown)
            for new, row in zip(unknown, routes, strict=True):
                self.known[new.req_id] = row
                self.news[new.req_id] = row.tolist()
        if started:
            self._put([pages for _, pages in started], torch.stack([self.known[request] for request, _ in started]))

    def _put(self, pages: Sequence[tuple[list[int], ...]], routes_RL: torch.Tensor) -> None:
        """Write routes at the requests' first pages."""
        first_RL = torch.tensor([[groups[place][0] for place in self.groups] for groups in pages])
        place_L = torch.arange(len(self.layers))
        self.routes_LN[place_L.to(self.device), first_RL.to(self.device)] = routes_RL.to(self.device, torch.uint8)

    def decide(self, requests: Sequence[Any]) -> torch.Tensor:
        """Return the routes of new requests, bool (R, L) on the CPU: as they wish, else by routers or the ranking."""
        wishes = [self._wish(request) for request in requests]
        routes = torch.ones(len(requests), len(self.layers), dtype=torch.bool)
        by_routers = []
        for row, (wish, request) in enumerate(zip(wishes, requests, strict=True)):
            if wish.routes is not None:
                routes[row] = parse_routes(wish.routes, 1, self.layers)[0]
            elif self.config.ranking is not None:
                layers = self.config.with_budget(wish.budget).full_layers
                routes[row] = parse_routes(list(layers), 1, self.layers)[0]
            elif request.prompt_token_ids:
                by_routers.append(row)
        for budget in {wishes[row].budget for row in by_routers}:
            rows = [row for row in by_routers if wishes[row].budget == budget]
            prompts = [requests[row].prompt_token_ids for row in rows]
            most = max(1, self.vllm_config.scheduler_config.max_num_batched_tokens // (2 * self.config.end_tokens))
            for start in range(0, len(rows), most):
                routes[rows[start : start + most]] = self.read(prompts[start : start + most], budget)
        return routes

    def _wish(self, request: Any) -> Wish:
        """Read what a request wishes; it was checked when it came in, and is no reason to fail for all others."""
        try:
            return Wish.of(request.sampling_params, self.config, self.layers)
        except ServingError as error:
            logger.warning("request %s is routed as if it had no wish: %s", request.req_id, error)
            return Wish(None, self.config.budget)

    def read(self, prompts: Sequence[Sequence[int]], budget: float | None = None) -> torch.Tensor:
        """Run the model over prompts' ends and return what its routers say: bool (R, L) on the CPU."""
        return self.routers(self.pooled(prompts), budget).cpu()

    def pooled(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return what the routers read: float32 (L, R, D), the mean over the heads of all ranks."""
        ends = [take_ends(prompt, self.config.end_tokens) for prompt in prompts]
        tokens, positions, metadata = lay_out(ends, self.config.pool_size, self.device)
        with set_forward_context(metadata, self.vllm_config, num_tokens=len(tokens), slot_mapping={}):
            self.model(input_ids=tokens, positions=positions)
        pooled = torch.stack([metadata.pooled[place] for place in range(len(self.layers))])
        ranks = get_tensor_model_parallel_world_size()
        return tensor_model_parallel_all_reduce(pooled) / ranks if ranks > 1 else pooled

    def take_news(self) -> dict[str, list[bool]]:
        """Return the routes that the scheduler was not told yet."""
        news, self.news = self.news, {}
        return news


def routed_attentions(vllm_config) -> dict[int, Attention]:
    """
    Find the layers that attend over the whole context, by index.

    Raises
    ------
    ServingError
        For layers whose attention is not plain causal softmax, or not by the backend that is routed.
    """
    found = {}
    for name, attention in get_layers_from_vllm_config(vllm_config, Attention).items():
        if attention.sliding_window is not None:
            continue
        impl = attention.impl
        if not isinstance(impl, RoutedAttention):
            raise ServingError(
                f"{name} attends by {type(impl).__name__}, which is not routed; choose --attention-backend FLASH_ATTN"
            )
        for what in ("logits_soft_cap", "alibi_slopes", "sinks", "kv_sharing_target_layer_name"):
            value = getattr(impl, what, None)
            if value is not None and not (isinstance(value, int | float) and value == 0):
                raise ServingError(f"{name} has {what}, which routed attention does not compute")
        found[extract_layer_index(name)] = attention
    if not found:
        raise ServingError("the model has no layer that attends over the whole context, so there is nothing to route")
    return dict(sorted(found.items()))


def rotary_embeddings(model: nn.Module, attentions: dict[int, Attention]) -> dict[int, nn.Module | None]:
    """Find the rotary embedding beside each attention; None where there is none."""
    layers = {id(attention): layer for layer, attention in attentions.items()}
    found: dict[int, nn.Module | None] = {}
    for module in model.modules():
        for child in module.children():
            if id(child) in layers:
                found[layers[id(child)]] = getattr(module, "rotary_emb", None)
    return found


def base_model(model: nn.Module, vllm_config, layers: tuple[int, ...]) -> BaseModel:
    """Describe a model, as adapters are checked against it."""
    model_config = vllm_config.model_config
    config = model_config.hf_text_config
    heads = config.num_attention_heads
    return BaseModel(
        name=model_config.model,
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=model_config.get_head_size(),
        vocab_size=config.vocab_size,
        routed_layers=layers,
        sample=_sample(model, config.vocab_size),
    )


def _sample(model: nn.Module, vocab_size: int) -> tuple[float, ...] | None:
    """Return the embedding weights that ``BaseModel.sample`` holds; those of other ranks come from there."""
    embedding = getattr(getattr(model, "model", None), "embed_tokens", None)
    weight = getattr(embedding, "weight", None)
    if weight is None or not weight.is_floating_point() or weight.ndim != 2:
        return None
    rows = torch.linspace(0, vocab_size - 1, 6, device=weight.device).long()[1:-1]
    shard = getattr(embedding, "shard_indices", None)
    first, end = (0, vocab_size) if shard is None else (shard.org_vocab_start_index, shard.org_vocab_end_index)
    mine = (rows >= first) & (rows < end)
    values = torch.zeros(4, 4, device=weight.device)
    values[mine] = weight[rows[mine] - first, :4].float()
    if get_tensor_model_parallel_world_size() > 1:
        values = tensor_model_parallel_all_reduce(values)
    return tuple(float(f"{value:.4g}") for value in values.flatten().tolist())


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
        return super().initialize_from_config(kv_cache_config, *args, **kwargs)

    def execute_model(self, scheduler_output, *args, **kwargs):
        """Route the new requests, then run the step."""
        self.router.admit(scheduler_output)
        return self._with_news(super().execute_model(scheduler_output, *args, **kwargs))

    def sample_tokens(self, *args, **kwargs):
        """Sample, and report routes to the scheduler with the tokens."""
        return self._with_news(super().sample_tokens(*args, **kwargs))

    def _with_news(self, output):
        if output is None or not self.router.news:
            return output
        news = self.router.take_news()
        if isinstance(output, AsyncModelRunnerOutput):
            return _WithRoutes(output, news)
        output.flux_routes = news
        return output


class _WithRoutes(AsyncModelRunnerOutput):
    """An output that is waited for later, with routes."""

    def __init__(self, output: AsyncModelRunnerOutput, routes: dict[str, list[bool]]):
        self.output, self.routes = output, routes

    def get_output(self):
        found = self.output.get_output()
        found.flux_routes = self.routes
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
