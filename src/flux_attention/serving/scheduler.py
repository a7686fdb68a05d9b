"""Runs beside vLLM's scheduler: learns the routes of requests, and tells them with their answers."""

from __future__ import annotations

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler


class _Routed:
    """Stands before a scheduler of vLLM's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        #: Of each request in flight whether each routed layer is full.
        self.flux_routes: dict[str, list[bool]] = {}

    def update_from_output(self, scheduler_output, model_runner_output):
        """Learn the routes of requests that started in a step."""
        self.flux_routes.update(getattr(model_runner_output, "flux_routes", None) or {})
        return super().update_from_output(scheduler_output, model_runner_output)

    def _free_request(self, request, *args, **kwargs):
        """Tell a finished request's routes in the one field of an answer that passes through vLLM unread."""
        found = super()._free_request(request, *args, **kwargs)
        routes = self.flux_routes.pop(request.request_id, None)
        if routes is None:
            return found
        told = {"flux_attention": {"omega_msr": 1 - sum(routes) / len(routes)}}
        if isinstance(found, tuple):  # with the parameters of an encoder's transfer, since vLLM 0.26 or so
            return ({**(found[0] or {}), **told}, *found[1:])
        return {**(found or {}), **told}


class RoutedScheduler(_Routed, Scheduler):
    """vLLM's scheduler, with routes."""


class RoutedAsyncScheduler(_Routed, AsyncScheduler):
    """vLLM's scheduler for steps that are planned before the last one's tokens are known, with routes."""
