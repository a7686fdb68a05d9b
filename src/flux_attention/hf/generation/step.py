"""One decode step of a routed model as a CUDA graph.

A step reads everything that changes (the token, lengths, where each row's keys lie) from fixed places in device memory,
so one captured graph serves all steps and all later generations of the same batch size, whatever their routes.

Shape suffixes: B batch, S query length, H query heads, K KV heads, D head dim, L routed layers, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
from typing import cast

import torch
from transformers import DynamicCache

from flux_attention import kernels
from flux_attention.hf.cache.layer import RoutedLayer
from flux_attention.hf.capture import captured_state, capturing
from flux_attention.hf.context import CONTEXT, AttachedModel
from flux_attention.kernels.split_table import FULL, split_table
from flux_attention.patterns import Streaming

#: Batch sizes whose steps are kept.
MAX_STEPS = 8
#: Rotary embeddings whose frequencies depend on the sequence's length, which a graph would freeze.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class DecodeStep:
    """
    One decode step of a routed model, for one batch size (a ``ForwardContext``).

    Parameters
    ----------
    routing : AttachedModel
        Of a model that ``unsupported`` has nothing against.
    batch : int
        B.

    Attributes
    ----------
    ids_B1 : torch.Tensor
        int64, the token that the next ``run`` stores and reads.
    lengths_B : torch.Tensor
        int32, tokens before it; ``run`` adds one.
    logits_BV : torch.Tensor
        What the last ``run`` gave for the token after it.
    seconds : float
        What warm-up, compilation and capture took.
    """

    is_step = True
    finished = reads_queries = is_packed = False

    @torch.inference_mode(False)  # what is made here is written to in any mode later
    def __init__(self, routing: AttachedModel, batch: int):
        from flux_attention.kernels import triton_decode  # only where Triton is installed

        began = time.perf_counter()
        self.routing, self.batch, self.routed = routing, batch, routing.layers
        self._attend, pattern = triton_decode.attend, cast(Streaming, routing.sparse.later)
        self.lock = threading.Lock()  # one generation at a time: they share the places in memory
        base, device = routing.config.base_model, routing.model.device
        self.ids_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.lengths_B = torch.zeros(batch, dtype=torch.int32, device=device)
        # Until a cache is loaded, each row is a full one whose only token lies in a buffer of one.
        spare = torch.zeros(2, base.num_kv_heads, 1, base.head_dim, dtype=routing.model.dtype, device=device)
        row = [spare[0].data_ptr(), spare[1].data_ptr(), spare.stride(1), FULL]
        # What the model takes for the KV cache: empty layers that hand back what they get; the kernel stores it.
        self._spare, self._cache = spare, DynamicCache()
        self._cache.layers = [RoutedLayer(pattern) for _ in range(base.num_layers)]
        self._workspace = triton_decode.DecodeWorkspace(batch, base.num_heads, base.num_kv_heads, base.head_dim, device)
        self._split_table = functools.partial(
            split_table, sink=pattern.sink, window=pattern.window, programs=self._workspace.programs
        )
        table = self._split_table([row] * batch, [0] * batch)
        self.table_LW7 = torch.tensor([table] * len(routing.layers), device=device)
        self._places = {layer: place for place, layer in enumerate(routing.layers)}
        self.attended: set[int] = set()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits_BV = torch.empty(0)
        with self._ready():
            self._prepare()
        self.seconds = time.perf_counter() - began

    def observe(self, layer: int, output: torch.Tensor, source: torch.Tensor) -> None:
        """Do nothing: routes are in the cache."""

    def finish(self) -> None:
        """Do nothing: nothing was decided."""

    def _step(self) -> torch.Tensor:
        output = self.routing.model(
            input_ids=self.ids_B1,
            position_ids=self.lengths_B[:, None].long(),
            past_key_values=self._cache,
            use_cache=True,
            **{CONTEXT: self},
        )
        self.lengths_B += 1
        return output.logits[:, -1]

    @contextlib.contextmanager
    def _ready(self):
        """Have the model as a step needs it: on its device, experts without asking how many tokens each has."""
        optimized = getattr(self.routing.model, "_optimize_model_for_decode", contextlib.nullcontext)
        with torch.no_grad(), optimized(), kernels.on_device(self.ids_B1):
            yield

    def _prepare(self) -> None:
        """Run the step a few times, then capture it."""
        if self.ids_B1.device.type != "cuda":  # Triton's interpreter
            self._step()
        else:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.lengths_B.zero_()
                    self._step()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU meanwhile.
            with capturing(), torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.logits_BV = self._step()
        missing = sorted(set(self.routing.layers) - self.attended)
        if missing:
            raise ValueError(f"layers {missing} did not call the registered attention function")

    def attend(self, layer: int, query_BH1D, key_BK1D, value_BK1D, scale: float) -> torch.Tensor:
        """See ``ForwardContext.attend``; S = 1."""
        shape, dtype = (self.batch, self._spare.shape[1], 1, self._spare.shape[3]), self._spare.dtype
        if key_BK1D.shape != shape or value_BK1D.shape != shape or {key_BK1D.dtype, query_BH1D.dtype} != {dtype}:
            found = f"{tuple(key_BK1D.shape)}, {key_BK1D.dtype}"
            raise ValueError(f"layer {layer} has keys of {found}, expected {shape}, {dtype}")
        self.attended.add(layer)
        pattern = cast(Streaming, self.routing.sparse.later)
        states = [states[:, :, 0] for states in (query_BH1D, key_BK1D, value_BK1D)]
        table, workspace = self.table_LW7[self._places[layer]], self._workspace
        output = self._attend(*states, table, self.lengths_B, workspace, pattern.sink, pattern.window, scale)
        return output[:, None]

    def load(self, cache: DynamicCache, more: int) -> None:
        """Continue the sequences of ``cache``, after making room for ``more`` tokens each."""
        layers = cast(list[RoutedLayer], [cache.layers[layer] for layer in self.routing.layers])
        for layer in layers:
            layer.reserve(more)
        lengths = [length + more for length in layers[0].lengths]
        self.table_LW7.copy_(torch.tensor([self._split_table(layer.table(), lengths) for layer in layers]))
        self.lengths_B.copy_(torch.tensor(layers[0].lengths, dtype=torch.int32))

    def run(self) -> torch.Tensor:
        """Store the token ``ids_B1`` and return the next one's logits, in a buffer that the next ``run`` overwrites."""
        if self.graph is None:
            with self._ready():
                self.logits_BV = self._step()
        else:
            with kernels.on_device(self.ids_B1):
                self.graph.replay()
        return self.logits_BV


def unsupported(routing: AttachedModel) -> str | None:
    """Say why the routed model cannot decode by graph; None if it can."""
    model, base = routing.model, routing.config.base_model
    if model.training:
        return "it is in training mode"
    if routing.is_tensor_parallel:
        return "several processes share its heads"
    hooks = [(*module._forward_hooks.values(), *module._forward_pre_hooks.values()) for module in model.modules()]
    if not set(itertools.chain.from_iterable(hooks)) <= routing.own_hooks:
        return "its modules have forward hooks of others, which a graph would leave out"
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if routing.units != routing.layers:
        return "its heads are routed one by one"
    if len(routing.layers) < base.num_layers:
        return "some layers have no router"
    if model.dtype not in kernels.DTYPES:
        return f"its dtype is {model.dtype}"
    if base.head_dim not in kernels.HEAD_DIMS:
        return f"its head dim is {base.head_dim}"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "it is spread over several devices"
    if not kernels.has_triton(model.device):
        return f"Triton kernels do not run on {model.device}"
    if "mrope_section" in rope or rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
        return f"its rotary embedding ({rope.get('rope_type')}) depends on more than a token's position"
    return None


class CapturedSteps:
    """The captured decode steps of a model, by batch size: made at the first call, kept until the weights move."""

    def __init__(self):
        self.lock = threading.Lock()
        #: Of each batch size what the step was made for, and the step, or why there is none.
        self.made: dict[int, tuple[tuple, DecodeStep | str]] = {}

    def __len__(self) -> int:
        return len(self.made)

    def clear(self) -> None:
        """Forget all steps."""
        self.made.clear()

    def get(self, routing: AttachedModel, batch: int) -> DecodeStep:
        """
        Return the step for ``batch`` sequences of a model that ``unsupported`` has nothing against.

        Raises
        ------
        ValueError
            If it could not be captured; the message says why.
        """
        with self.lock:  # a second generation waits for the first one's capture and shares it
            state = captured_state(routing.model)
            if any(made_for != state for made_for, _ in self.made.values()):
                self.made.clear()
            if batch not in self.made:
                while len(self.made) >= MAX_STEPS:
                    del self.made[next(iter(self.made))]
                try:
                    self.made[batch] = state, DecodeStep(routing, batch)
                except torch.OutOfMemoryError:
                    raise ValueError("not enough memory to capture a decode step") from None
                except Exception as error:  # of whatever kind: it will not be otherwise next time
                    self.made[batch] = state, str(error).strip().split("\n")[0] or type(error).__name__
            self.made[batch] = self.made.pop(batch)  # the last to be forgotten
            step = self.made[batch][1]
        if isinstance(step, str):
            raise ValueError(f"a decode step of {routing.config.base_model.name} could not be captured: {step}")
        return step


def decode_step(routing: AttachedModel, batch: int) -> DecodeStep:
    """
    Return the captured step of ``routing`` for ``batch`` sequences.

    Raises
    ------
    ValueError
        If the model cannot decode by graph; the message says why.
    """
    reason = unsupported(routing)
    if reason:
        raise ValueError(f"{routing.config.base_model.name} cannot decode by CUDA graph: {reason}")
    return routing.steps.get(routing, batch)
