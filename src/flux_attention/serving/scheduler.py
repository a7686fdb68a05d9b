"""Runs beside vLLM's scheduler: learns the routes of requests, gives pages back, and tells routes with answers."""

from __future__ import annotations

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from flux_attention.serving.pages import PageCoordinator, pages_needed
from flux_attention.serving.settings import KEY, Settings

logger = init_logger("vllm.flux_attention")


class _Routed:
    """Stands before a scheduler of vLLM's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        #: Of each request in flight whether each routed layer is full.
        self.flux_routes: dict[str, list[bool]] = {}
        self.untold: dict[str, list[bool]] = {}
        settings = Settings.read(self.vllm_config.additional_config)
        config = settings.config()
        self.pages = PageCoordinator(
            self.kv_cache_manager.coordinator,
            config.base_model.routed_layers,
            config.sparse["sink"],
            config.sparse["window"],
            self.flux_routes,
            self.scheduler_config.max_num_batched_tokens * (2 if self.scheduler_config.async_scheduling else 1),
            None if config.ranking is None else len(config.full_layers),
        )
        self.kv_cache_manager.coordinator = self.pages
        if settings.debug:
            self.pages.returned = []
        self._tell(config)

    def _tell(self, config) -> None:
        """Say how many of the longest requests fit."""
        layers, longest = len(self.pages.managers), self.vllm_config.model_config.max_model_len
        room = self.kv_cache_config.num_blocks - 1  # one is vLLM's own

        def fit(full: float) -> float:
            sizes = self.pages.page, self.pages.sink, self.pages.window
            return room / pages_needed(longest, *sizes, full, layers - full)

        if config.budget is None:
            known = (
                f"{fit(layers / 2):.1f} if half of the layers run sparse, {fit(layers / 4):.1f} if three quarters do"
            )
        else:
            full = layers * (1 - config.budget) if config.ranking is None else len(config.full_layers)
            known = f"{fit(full):.1f} at a budget of {config.budget:.3g}"
        logger.info("flux-attention: %.1f requests of %d tokens fit dense, %s", fit(layers), longest, known)

    def schedule(self, *args, **kwargs):
        """Plan a step; a debugging server also tells which pages were given back."""
        output = super().schedule(*args, **kwargs)
        if self.pages.returned is not None:
            output.flux_returned = self.pages.take_returned()
        return output

    def update_from_output(self, scheduler_output, model_runner_output):
        """Learn the routes of requests that started in a step, and tell them with the first tokens."""
        if news := getattr(model_runner_output, "flux_routes", None):
            self.pages.learn(news)
            # A request may have been cancelled meanwhile.
            news = {request: routes for request, routes in news.items() if request in self.requests}
            self.flux_routes.update(news)
            self.untold.update(news)
        found = super().update_from_output(scheduler_output, model_runner_output)
        if self.untold:
            for output in (output for outputs in found.values() for output in outputs.outputs):
                if routes := self.untold.pop(output.request_id, None):
                    # The one field of an answer that passes through vLLM unread.
                    told = {KEY: {"omega_msr": 1 - sum(routes) / len(routes)}}
                    output.kv_transfer_params = {**(output.kv_transfer_params or {}), **told}
            self.untold = {request: routes for request, routes in self.untold.items() if request in self.requests}
        return found

    def _free_request(self, request, *args, **kwargs):
        """Let go of a request."""
        self.flux_routes.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)


class RoutedScheduler(_Routed, Scheduler):
    """vLLM's scheduler, with routes."""


class RoutedAsyncScheduler(_Routed, AsyncScheduler):
    """vLLM's scheduler for steps that are planned before the last one's tokens are known, with routes."""
