"""Decoding on a GPU: one step of the model as a CUDA graph, and the loop around it that ``model.generate`` uses.

A step reads everything that changes (the token, lengths, where each row's keys lie) from fixed places in device memory,
so one captured graph serves all steps and all later generations of the same batch size, whatever their routes.

Shape suffixes: B batch, S query length, H query heads, K KV heads, D head dim, L routed layers, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import logging

from flux_attention import kernels
from flux_attention.attach import CALL
from flux_attention.cache import PassThroughCache

if TYPE_CHECKING:
    from flux_attention.attach import Routing

logger = logging.get_logger(__name__)

#: Tokens for which room is made in the KV cache at a time.
ROOM = 1024
#: Batch sizes whose steps are kept.
MOST_STEPS = 8
#: Arguments of a generation that do not change what a step computes.
ARGUMENTS = {
    "attention_mask",
    "cache_position",
    "inputs_embeds",
    "logits_to_keep",
    "past_key_values",
    "position_ids",
    "tokenizer",
    "use_cache",
}
#: Rotary embeddings whose frequencies depend on the sequence's length, which a graph would freeze.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class DecodeStep:
    """
    One decode step of a routed model, for one batch size.

    Parameters
    ----------
    routing : Routing
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

    is_step = True  # unlike a ``call.Call``
    decides = finished = False

    @torch.inference_mode(False)  # what is made here is written to in any mode later
    def __init__(self, routing: Routing, batch: int):
        from flux_attention.kernels.triton_decode import DecodeSpace, work_table

        began = time.perf_counter()
        self.routing, self.batch = routing, batch
        self.lock = threading.Lock()  # one generation at a time: they share the places in memory
        base, device = routing.config.base_model, routing.model.device
        self.ids_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.lengths_B = torch.zeros(batch, dtype=torch.int32, device=device)
        # Until a cache is loaded, each row is a full one whose only token lies in a buffer of one.
        spare = torch.zeros(2, base.num_kv_heads, 1, base.head_dim, dtype=routing.model.dtype, device=device)
        row = [spare[0].data_ptr(), spare[1].data_ptr(), spare.stride(1), kernels.FULL]
        self._spare, self._cache = spare, PassThroughCache(base.num_layers)
        self._space = DecodeSpace(batch, base.num_heads, base.num_kv_heads, base.head_dim, device)
        self._work_table = functools.partial(
            work_table, sink=routing.pattern.sink, window=routing.pattern.window, programs=self._space.programs
        )
        table = self._work_table([row] * batch, [0] * batch)
        self.table_LW7 = torch.tensor([table] * len(routing.layers), device=device)
        self._places = {layer: place for place, layer in enumerate(routing.layers)}
        self.attended: set[int] = set()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits_BV = torch.empty(0)
        with self._ready():
            self._prepare()
        self.seconds = time.perf_counter() - began

    def finish(self) -> None:
        """Nothing is left to do after a forward; see ``call.Call.finish``."""

    def _step(self) -> torch.Tensor:
        output = self.routing.model(
            input_ids=self.ids_B1,
            position_ids=self.lengths_B[:, None].long(),
            past_key_values=self._cache,
            use_cache=True,
            **{CALL: self},
        )
        self.lengths_B += 1
        return output.logits[:, -1]

    @contextlib.contextmanager
    def _ready(self):
        """The model as a step needs it: on its device, and experts computed without asking how many tokens each has."""
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
            with _capturing(), torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.logits_BV = self._step()
        missing = sorted(set(self.routing.layers) - self.attended)
        if missing:
            raise ValueError(f"layers {missing} did not call the registered attention function")

    def attend(self, layer: int, query_BH1D, key_BK1D, value_BK1D, scale: float) -> torch.Tensor:
        """Attention output (B, 1, H, D) of one layer; called by the registered attention function."""
        from flux_attention.kernels.triton_decode import attend

        shape, dtype = (self.batch, self._spare.shape[1], 1, self._spare.shape[3]), self._spare.dtype
        if key_BK1D.shape != shape or value_BK1D.shape != shape or {key_BK1D.dtype, query_BH1D.dtype} != {dtype}:
            found = f"{tuple(key_BK1D.shape)}, {key_BK1D.dtype}"
            raise ValueError(f"layer {layer} has keys of {found}, expected {shape}, {dtype}")
        self.attended.add(layer)
        pattern = self.routing.pattern
        states = [states[:, :, 0] for states in (query_BH1D, key_BK1D, value_BK1D)]
        output = attend(
            *states,
            self.table_LW7[self._places[layer]],
            self.lengths_B,
            self._space,
            pattern.sink,
            pattern.window,
            scale,
        )
        return output[:, None]

    def load(self, cache: DynamicCache, more: int) -> None:
        """Continue the sequences of ``cache``, after making room for ``more`` tokens each."""
        layers = [cache.layers[layer] for layer in self.routing.layers]
        for layer in layers:
            layer.reserve(more)
        lengths = [length + more for length in layers[0].lengths]
        self.table_LW7.copy_(torch.tensor([self._work_table(layer.table(), lengths) for layer in layers]))
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


#: One capture at a time: garbage collection is off for all of them.
_CAPTURE = threading.Lock()


@contextlib.contextmanager
def without_collection():
    """Python's garbage collection off, and on again afterwards if it was on."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextlib.contextmanager
def _capturing():
    """Nothing but the captured work disturbs a capture, and one that fails leaves random numbers to be drawn."""
    with _CAPTURE:
        gc.collect()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        spare = generator.clone_state()
        with without_collection():  # an old graph, destroyed meanwhile, would end the capture
            try:
                yield
            except BaseException:
                generator.graphsafe_set_state(spare)  # the old state waits for the capture's end for ever
                raise


def unsupported(routing: Routing) -> str | None:
    """Why the routed model cannot decode by graph; None if it can."""
    model, base = routing.model, routing.config.base_model
    if model.training:
        return "it is in training mode"
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    if hooks > routing.hooks:
        return "its modules have forward hooks of others, which a graph would leave out"
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
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


def decode_step(routing: Routing, batch: int) -> DecodeStep:
    """
    The step of ``routing`` for ``batch`` sequences: made at the first call, then kept until the model's weights move.

    Raises
    ------
    ValueError
        If the model cannot decode by graph; the message says why.
    """
    reason = unsupported(routing)
    if reason:
        raise ValueError(f"{routing.config.base_model.name} cannot decode by CUDA graph: {reason}")
    return _captured(routing, batch)


def _captured(routing: Routing, batch: int) -> DecodeStep:
    with routing.steps_lock:  # a second generation waits for the first one's capture and shares it
        state = _state(routing.model)
        if any(made_for != state for made_for, _ in routing.steps.values()):
            routing.steps.clear()
        if batch not in routing.steps:
            while len(routing.steps) >= MOST_STEPS:
                del routing.steps[next(iter(routing.steps))]
            try:
                routing.steps[batch] = state, DecodeStep(routing, batch)
            except torch.OutOfMemoryError:
                raise ValueError("not enough memory to capture a decode step") from None
            except Exception as error:  # of whatever kind: it will not be otherwise next time
                routing.steps[batch] = state, str(error).strip().split("\n")[0] or type(error).__name__
        routing.steps[batch] = routing.steps.pop(batch)  # the last to be forgotten
        step = routing.steps[batch][1]
    if isinstance(step, str):
        raise ValueError(f"a decode step of {routing.config.base_model.name} could not be captured: {step}")
    return step


def _state(model) -> tuple:
    """What a captured step depends on besides its inputs: where weights lie, autocast, which adapters are active."""
    adapters = [
        (module.disable_adapters, tuple(module.active_adapters), tuple(module.merged_adapters))
        for module in model.modules()
        if hasattr(module, "merged_adapters")  # layers of PEFT
    ]
    tensors = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
    kind = model.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return tensors, autocast, tuple(adapters)


class _OneToken(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)


def sample(
    routing: Routing,
    stock: Callable,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer=None,
    **model_kwargs: Any,
):
    """
    Greedy decoding or sampling: the stock loop, from the second token on with captured steps, and without waiting for
    the device between them. Takes and returns what ``GenerationMixin._sample`` does.

    Where steps cannot be captured (``unsupported``, another cache, hidden states asked for) it is the stock loop.

    Parameters
    ----------
    routing : Routing
        Of the model that generates.
    stock : callable
        The model's own ``_sample``.
    """
    stock = functools.partial(stock, logits_processor=logits_processor, **model_kwargs)
    step = None
    if not (
        not routing.cuda_graphs
        or synced_gpus
        or type(model_kwargs.get("past_key_values")) is not DynamicCache
        or generation_config.output_attentions
        or generation_config.output_hidden_states
        or stopping_criteria.max_length == input_ids.shape[1] + 1  # a single token, which no step decodes
        or not set(model_kwargs) <= ARGUMENTS
        or not _positions_count_tokens(**model_kwargs)
        or unsupported(routing)
    ):
        try:
            step = _captured(routing, len(input_ids))
        except ValueError as error:
            logger.warning_once(f"decoding without a CUDA graph: {error}")
    if step is None or not step.lock.acquire(blocking=False):  # another generation runs it
        return stock(
            input_ids,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
        )
    try:
        with kernels.on_device(input_ids):
            return _loop(step, stock, input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    finally:
        step.lock.release()


def _positions_count_tokens(past_key_values, attention_mask=None, position_ids=None, **kwargs) -> bool:
    """Whether each row's last position is the number of its tokens before: what a step goes on from."""
    if position_ids is None:
        return True
    if position_ids.ndim != 2:
        return False
    last = position_ids[:, -1]
    if attention_mask is not None:
        return torch.equal(last, attention_mask.sum(1).to(last) - 1)
    count = position_ids.shape[1]  # of all tokens, or of those behind the cached ones
    past = past_key_values.get_seq_length()
    return bool(((last == count - 1) | (last == past + count - 1)).all())


def _loop(step, stock, input_ids, logits_processor, stopping_criteria, generation_config, streamer):
    first = copy.copy(generation_config)
    first.return_dict_in_generate = True
    if not generation_config.return_dict_in_generate:
        first.output_scores = first.output_logits = False
    start = stock(input_ids, stopping_criteria=StoppingCriteriaList([_OneToken()]), generation_config=first)
    cache, scores, raw_logits = start.past_key_values, start.scores, start.logits
    layers = [cache.layers[layer] for layer in step.routing.layers]
    length, limit = start.sequences.shape[1], stopping_criteria.max_length
    has_eos = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    known = all(type(criterion) in (EosTokenCriteria, MaxLengthCriteria) for criterion in stopping_criteria)
    pad = generation_config._pad_token_tensor
    ids = start.sequences
    tokens = ids[:, -1]
    unfinished = ~stopping_criteria(ids, scores)
    check = _LateCheck(tokens, streamer)
    check.begin(tokens, unfinished)
    stored = room = 0
    overran = False
    try:
        while limit is None or length < limit:
            if stored == room:
                for layer in layers:
                    layer.advance(stored)
                stored, room = 0, ROOM if limit is None else min(ROOM, limit - length)
                step.load(cache, room)
                ids = torch.cat([ids[:, :length], ids.new_empty(len(ids), room)], dim=1)
            step.ids_B1.copy_(tokens[:, None])
            overran = True  # until this step is counted
            logits = step.run().to(torch.float32, copy=True)
            if check.end():  # the device is busy with this step meanwhile
                break
            stored, overran = stored + 1, False
            # In one piece, as in the stock loop: processors and criteria may view them otherwise.
            token_scores = logits_processor(ids[:, :length].contiguous(), logits) if logits_processor else logits
            if scores is not None:
                scores += (token_scores,)
            if raw_logits is not None:
                raw_logits += (logits,)
            if generation_config.do_sample:
                tokens = torch.multinomial(token_scores.softmax(-1), num_samples=1)[:, 0]
            else:
                tokens = token_scores.argmax(-1)
            if has_eos:
                tokens = torch.where(unfinished, tokens, pad.to(tokens.device))
            ids[:, length] = tokens
            length += 1
            seen = ids[:, :length] if known else ids[:, :length].contiguous()
            unfinished = unfinished & ~stopping_criteria(seen, scores)
            check.begin(tokens, unfinished)
        else:
            check.end()
    finally:  # also if a streamer, a processor or Ctrl-C ends the loop: the caller may go on with the cache
        for layer in layers:
            layer.advance(stored, overran)
    if streamer is not None:
        streamer.end()
    ids = ids[:, :length].contiguous()
    if not generation_config.return_dict_in_generate:
        return ids
    return GenerateDecoderOnlyOutput(sequences=ids, scores=scores, logits=raw_logits, past_key_values=cache)


class _LateCheck:
    """Brings tokens and whether all sequences are finished to the host while the device works on the next step."""

    def __init__(self, tokens: torch.Tensor, streamer):
        pinned = tokens.is_cuda
        self.finished = torch.zeros((), dtype=torch.bool, pin_memory=pinned)
        self.tokens = torch.zeros(tokens.shape, dtype=tokens.dtype, pin_memory=pinned)
        self.event = torch.cuda.Event() if pinned else None
        self.streamer = streamer

    def begin(self, tokens: torch.Tensor, unfinished: torch.Tensor) -> None:
        self.finished.copy_(~unfinished.any(), non_blocking=True)
        if self.streamer is not None:
            self.tokens.copy_(tokens, non_blocking=True)
        if self.event is not None:
            self.event.record()

    def end(self) -> bool:
        if self.event is not None:
            self.event.synchronize()
        if self.streamer is not None:
            self.streamer.put(self.tokens.clone())
        return bool(self.finished)
