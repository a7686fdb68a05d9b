"""Runs beside vLLM's scheduler: learns the routes of requests, and tells them with their answers."""

from __future__ import annotations

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from flux_attention.serving.pages import PageCoordinator
from flux_attention.serving.settings import KEY, Settings


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
        )
        self.kv_cache_manager.coordinator = self.pages
        if settings.debug:
            self.pages.returned = []

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
