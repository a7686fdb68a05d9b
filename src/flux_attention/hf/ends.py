"""The two ends of prompts, read in a short pass of their own: all routes are known before the prompt is computed.

Shape suffixes: B batch, W tokens of the longest pair of ends, D head dim, U units.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers.utils import logging

from flux_attention import kernels
from flux_attention.decision import PooledQueries, budgets_of
from flux_attention.hf.capture import captured_state, capturing
from flux_attention.hf.context import CONTEXT
from flux_attention.hf.forward import ForwardPass
from flux_attention.hf.inputs import Inputs, Prompt
from flux_attention.hf.layout import BatchLayout
from flux_attention.router import LayerRouter, Pooling
from flux_attention.routes import Unit

logger = logging.get_logger(__name__)

#: Graphs that are kept.
MAX_GRAPHS = 8


def take_ends(prompt: Prompt, end_tokens: int) -> tuple[torch.Tensor, list[int]]:
    """
    Take the first and the last ``end_tokens`` tokens of each prompt; of a prompt of up to twice as many, all.

    Returns
    -------
    tokens : torch.Tensor
        int64 (B, W), or (B, W, hidden size) of embeddings; padded on the right by the last token.
    lengths : list of int
        How many are real.
    """
    lengths = [min(length, 2 * end_tokens) for length in prompt.lengths]
    slot_W = torch.arange(max(lengths), device="cpu")
    length_B1 = torch.tensor(prompt.lengths, device="cpu")[:, None]
    gap_B1 = (length_B1 - 2 * end_tokens).clamp(min=0)
    slots_BW = torch.where(slot_W < end_tokens, slot_W, slot_W + gap_B1).minimum(length_B1 - 1)
    columns_BW = kernels.to_device(prompt.layout.columns(slots_BW), prompt.tokens.device)
    rows = torch.arange(len(lengths), device=prompt.tokens.device)
    if prompt.layout.starts is not None:  # all sequences stand in one row
        rows = torch.zeros_like(rows)
    return prompt.tokens[rows[:, None], columns_BW], lengths


class EndsReader:
    """
    Runs a routed decoder over the ends of prompts, everything full, and gives the routers what they read.

    Parameters
    ----------
    decoder : torch.nn.Module
        With routers attached.
    units : tuple of Unit
        What is routed.
    routers : mapping of Unit to LayerRouter
    make_pass : callable
        Makes a forward pass that runs everything full from ``Inputs`` and a ``Decision``.
    make_pooling : callable
        Makes a ``Pooling`` from prompts' lengths and a function to columns.
    end_tokens : int
        E, tokens of each end.
    """

    def __init__(
        self,
        decoder: nn.Module,
        units: tuple[Unit, ...],
        routers: Mapping[Unit, LayerRouter],
        make_pass: Callable[[Inputs, PooledQueries], ForwardPass],
        make_pooling: Callable[[list[int], Callable], Pooling],
        end_tokens: int,
    ):
        self.decoder, self.units, self.routers = decoder, units, routers
        self.make_pass, self.make_pooling, self.end_tokens = make_pass, make_pooling, end_tokens
        #: Of each batch size what the graph was made for, and the graph; None where it could not be captured.
        self._graphs: dict[int, tuple[tuple, _EndsGraph | None]] = {}
        self._lock = threading.Lock()  # one call at a time: graphs have fixed places in memory

    def pooled(self, prompt: Prompt) -> dict[Unit, torch.Tensor]:
        """Return each unit's pooled query states, float32 (B, D), without gradients."""
        tokens, lengths = take_ends(prompt, self.end_tokens)
        return self._run(tokens, *self._plan(tokens, lengths))

    def _plan(self, tokens: torch.Tensor, lengths: list[int]) -> tuple[BatchLayout, Pooling, torch.Tensor]:
        """Return the layout of the ends, the pooling of their queries, and their attention mask."""
        real_BW = torch.arange(tokens.shape[1], device="cpu") < torch.tensor(lengths, device="cpu")[:, None]
        layout = BatchLayout.from_mask(real_BW, tokens.device)
        # A mask also where all tokens are real: without one transformers looks for packed sequences, which waits for
        # the device, and while a graph is captured takes all calls for packed.
        return layout, self.make_pooling(lengths, layout.columns), real_BW.long().to(tokens.device)

    @torch.no_grad()
    def _run(self, tokens: torch.Tensor, layout: BatchLayout, pooling: Pooling, mask: torch.Tensor):
        reading = PooledQueries(self.units, pooling)
        inputs = Inputs(layout, layout.lengths, {}, Prompt(tokens, layout, layout.lengths))
        self.decoder(
            **{"input_ids" if tokens.ndim == 2 else "inputs_embeds": tokens},
            attention_mask=mask,
            use_cache=False,
            **{CONTEXT: self.make_pass(inputs, reading)},
        )
        return reading.pooled

    def logits(self, pooled: Mapping[Unit, torch.Tensor], budget: float | torch.Tensor | None = None) -> torch.Tensor:
        """Return what the routers make of pooled query states, and of a budget: float32 (B, U, 2)."""
        outputs = []
        for unit in self.units:
            router, x_BD = self.routers[unit], pooled[unit]
            _place(router, x_BD.device)
            with torch.autocast(x_BD.device.type, enabled=False):
                outputs.append(router(x_BD, budgets_of(budget, x_BD)))
        return torch.stack([output.to(outputs[0].device) for output in outputs], dim=1)

    @torch.no_grad()
    def read(self, prompt: Prompt, by_graph: bool, budget: float | None = None) -> torch.Tensor:
        """
        Read the prompts' ends, and wait for what the routers say.

        Parameters
        ----------
        prompt : Prompt
        by_graph : bool
            Whether the pass may be a CUDA graph, kept for each batch size.
        budget : float, optional
            What routers that take one are told.

        Returns
        -------
        torch.Tensor
            float32 (B, U, 2) on the CPU.
        """
        tokens, lengths = take_ends(prompt, self.end_tokens)
        if by_graph and tokens.ndim == 2 and min(lengths) == 2 * self.end_tokens:
            with self._lock:
                graph = self._graph(tokens, lengths, budget)
                if graph is not None:
                    return graph.run(tokens, budget)
        return self._logits_of(tokens, lengths)(tokens, budget).cpu()

    def _graph(self, tokens: torch.Tensor, lengths: list[int], budget: float | None) -> _EndsGraph | None:
        """Return the graph for so many prompts; None if it could not be captured."""
        for router in self.routers.values():  # now: a graph is of what lies where
            _place(router, tokens.device)
        state = captured_state(self.decoder, self.routers.values())
        if any(made_for != state for made_for, _ in self._graphs.values()):
            self._graphs.clear()
        if len(tokens) not in self._graphs:
            while len(self._graphs) >= MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            try:
                graph = _EndsGraph(self._logits_of(tokens, lengths), tokens, budget)
            except Exception as error:  # of whatever kind: it will not be otherwise next time
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                logger.warning_once(f"reading the ends of prompts without a CUDA graph: {reason}")
                graph = None
            self._graphs[len(tokens)] = state, graph
        return self._graphs[len(tokens)][1]

    def _logits_of(
        self, tokens: torch.Tensor, lengths: list[int]
    ) -> Callable[[torch.Tensor, float | torch.Tensor | None], torch.Tensor]:
        """Make what gives the logits of ends of these lengths, with all that is not the GPU's work done before."""
        plan = self._plan(tokens, lengths)
        return lambda ends, budget: self.logits(self._run(ends, *plan), budget)

    def clear(self) -> None:
        """Forget all graphs."""
        self._graphs.clear()


def _place(router: LayerRouter, device: torch.device) -> None:
    """Bring a router to a device, if it is elsewhere."""
    if next(router.parameters()).device != device:
        router.to(device)


class _EndsGraph:
    """The pass over the ends of so many long prompts, and the routers, as one CUDA graph."""

    @torch.inference_mode(False)  # what is made here is written to in any mode later
    def __init__(self, logits_of: Callable, tokens: torch.Tensor, budget: float | None):
        self.tokens = tokens.clone()
        self.budget_B = None if budget is None else torch.full(tokens.shape[:1], float(budget), device=tokens.device)
        with kernels.on_device(tokens), torch.no_grad():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    logits_of(self.tokens, self.budget_B)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU meanwhile.
            with capturing(), torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.logits_BU2 = logits_of(self.tokens, self.budget_B)

    def run(self, tokens: torch.Tensor, budget: float | None) -> torch.Tensor:
        with kernels.on_device(tokens):
            self.tokens.copy_(tokens)
            if self.budget_B is not None:
                self.budget_B.fill_(float(budget))
            self.graph.replay()
            return self.logits_BU2.cpu()
