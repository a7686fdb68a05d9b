"""Runs beside vLLM's scheduler: learns the routes of requests, and tells them with their answers."""

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
        settings = Settings.read(self.vllm_config.additional_config)
        config = settings.config()
        self.pages = PageCoordinator(
            self.kv_cache_manager.coordinator,
            config.base_model.routed_layers,
            config.sparse["sink"],
            config.sparse["window"],
            self.flux_routes,
            None if config.ranking is None else len(config.full_layers),
            # Two steps are under way where one is planned before the last one's tokens are known.
            self.scheduler_config.max_num_batched_tokens * (2 if isinstance(self, AsyncScheduler) else 1),
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
            return room / pages_needed(longest, *sizes, full + self.pages.unrouted, layers - full)

        if config.ranking is None:
            known = (
                f"{fit(layers / 2):.1f} if half of the layers run sparse, {fit(layers / 4):.1f} if three quarters do"
            )
        else:
            known = f"{fit(len(config.full_layers)):.1f} at a budget of {config.budget:.3g}"
        logger.info("flux-attention: %.1f requests of %d tokens fit dense, %s", fit(layers), longest, known)

    def schedule(self, *args, **kwargs):
        """Plan a step; a debugging server also tells which pages were given back."""
        output = super().schedule(*args, **kwargs)
        if self.pages.returned is not None:
            output.flux_returned = self.pages.take_returned()
        return output

    def update_from_output(self, scheduler_output, model_runner_output):
        """Learn the routes of requests that started in a step."""
        if news := getattr(model_runner_output, "flux_routes", None):
            self.pages.learn(news)
            # A request may have been cancelled meanwhile.
            self.flux_routes.update({request: routes for request, routes in news.items() if request in self.requests})
        return super().update_from_output(scheduler_output, model_runner_output)

    def _free_request(self, request, *args, **kwargs):
        """Tell a finished request's routes in the one field of an answer that passes through vLLM unread."""
        found = super()._free_request(request, *args, **kwargs)
        routes = self.flux_routes.pop(request.request_id, None)
        if routes is None:
            return found
        told = {KEY: {"omega_msr": 1 - sum(routes) / len(routes)}}
        if isinstance(found, tuple):  # with the parameters of an encoder's transfer, since vLLM 0.26 or so
            return ({**(found[0] or {}), **told}, *found[1:])
        return {**(found or {}), **told}


class RoutedScheduler(_Routed, Scheduler):
    """vLLM's scheduler, with routes."""


class RoutedAsyncScheduler(_Routed, AsyncScheduler):
    """vLLM's scheduler for steps that are planned before the last one's tokens are known, with routes."""
