"""The decode loop: what ``model.generate`` runs for greedy decoding and sampling, with captured steps.

Shape suffixes: B batch, S tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import logging

from flux_attention import kernels
from flux_attention.hf.context import AttachedModel, generated_prompt
from flux_attention.hf.generation.step import unsupported

logger = logging.get_logger(__name__)

#: Tokens for which room is made in the KV cache at a time.
ROOM = 1024
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


def sample(
    routing: AttachedModel,
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
    Decode greedily or by sampling: the stock loop, from the second token on with captured steps, and without waiting
    for the device between them. Takes and returns what ``GenerationMixin._sample`` does.

    Where steps cannot be captured (``unsupported``, another cache, hidden states asked for) it is the stock loop.

    Parameters
    ----------
    routing : AttachedModel
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
    ):
        if reason := unsupported(routing):
            logger.info_once(f"decoding without a CUDA graph: {reason}")
        else:
            try:
                step = routing.steps.get(routing, len(input_ids))
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


def _first_token(stock, input_ids, generation_config):
    """Run the stock loop for one token, prefill included; returns what it returns as a dict."""
    first = copy.copy(generation_config)
    first.return_dict_in_generate = True
    if not generation_config.return_dict_in_generate:
        first.output_scores = first.output_logits = False
    one_token = StoppingCriteriaList([MaxLengthCriteria(max_length=input_ids.shape[1] + 1)])
    return stock(input_ids, stopping_criteria=one_token, generation_config=first)


def _choose(scores_BV: torch.Tensor, samples: bool) -> torch.Tensor:
    """Pick each sequence's next token: drawn by the scores, or the most likely one."""
    if samples:
        return torch.multinomial(scores_BV.softmax(-1), num_samples=1)[:, 0]
    return scores_BV.argmax(-1)


def _loop(step, stock, input_ids, logits_processor, stopping_criteria, generation_config, streamer):
    start = _first_token(stock, input_ids, generation_config)
    generated_prompt.get().progress.finish_prompt()
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
            tokens = _choose(token_scores, generation_config.do_sample)
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
