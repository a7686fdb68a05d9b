"""Shortens a prompt's KV cache by presses behind the prefill, and answers from such caches in batches.

A press is any object with kvpress's ``compress``. Used by press_quality.py.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@contextmanager
def behind(model, call):
    """Call ``call(module, hidden states, keys, values, kwargs)`` behind each layer's attention."""

    def hook(module, args, kwargs, output):
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        call(module, kwargs["hidden_states"], layer.keys, layer.values, kwargs)

    attentions = [layer.self_attn for layer in model.model.layers]
    for attention in attentions:
        attention.rotary_emb = model.model.rotary_emb  # presses look for it there
    handles = [attention.register_forward_hook(hook, with_kwargs=True) for attention in attentions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for attention in attentions:
            del attention.rotary_emb


@torch.no_grad()
def prefill(model, prompt, call):
    """Read a prompt with ``call`` behind each layer; return the most likely next token."""
    ids = torch.as_tensor(prompt, dtype=torch.long, device=model.device)[None]
    with behind(model, call):
        return (
            model(ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1).logits[0, -1].argmax().item()
        )


@dataclass
class Row:
    """
    Holds what one answer is generated from.

    Attributes
    ----------
    layers : list of (keys, values, kept)
        (K, T, D) twice, and bool (K or 1, T): what is seen of them.
    given : list of int
        Tokens behind the cached ones: the rest of the prompt, or the first one of the answer.
    position : int
        Of the first of them.
    room : int
        Tokens of the answer at most.
    """

    layers: list
    given: list
    position: int
    room: int

    @property
    def kv_bytes(self):
        return sum(
            2 * keys.shape[-1] * keys.itemsize * int(kept.expand(keys.shape[:2]).sum()) for keys, _, kept in self.layers
        )

    @property
    def longest(self):
        return max(keys.shape[1] for keys, _, _ in self.layers)


def pressed(model, prompt, cut, presses, room):
    """Read a prompt up to ``cut`` and return {(name, share): Row}; the press None keeps all."""
    layers = {key: [] for key in presses}

    def call(module, hidden, keys, values, kwargs):
        for key, press in presses.items():
            if press is None:
                mine = keys, values
            else:
                mine = press.compress(module, hidden, keys, values, None, kwargs)
            kept = torch.ones(1, mine[0].shape[2], dtype=torch.bool, device=keys.device)
            if (dropped := getattr(module, "masked_key_indices", None)) is not None:
                kept = kept.repeat(keys.shape[1], 1)
                kept[dropped[1], dropped[2]] = False
                module.masked_key_indices = None
            layers[key].append((mine[0][0], mine[1][0], kept))

    first = prefill(model, prompt[:cut], call)
    given = list(prompt[cut:]) or [first]
    return {key: Row(found, given, cut, room) for key, found in layers.items()}


def padded(tensors, size, dim):
    """Stack tensors that differ in length, with nothing before the shorter ones."""
    before = [[0, 0] * (-1 - dim) + [size - tensor.shape[dim], 0] for tensor in tensors]
    return torch.stack([F.pad(tensor, pad) for tensor, pad in zip(tensors, before, strict=True)])


def attend_kept(masks, module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attend with one query to what is kept: the form of attention functions in transformers."""
    mask = masks[module.layer_idx]
    mask = F.pad(mask, (0, key.shape[2] - mask.shape[2]), value=True)[:, :, None]
    query = query.reshape(len(query), key.shape[1], -1, query.shape[-1])  # query heads of one KV head as rows
    mask = mask.expand(-1, -1, query.shape[2], -1)
    output = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return output.flatten(1, 2)[:, None], None


@torch.no_grad()
def decode(model, rows, ends):
    """Generate the most likely tokens to all rows at once; return those behind what was given, the first included."""
    cache, masks, device = DynamicCache(), {}, model.device
    for layer, parts in enumerate(zip(*(row.layers for row in rows), strict=True)):
        keys, values, kept = zip(*parts, strict=True)
        size = max(each.shape[1] for each in keys)
        cache.update(padded(keys, size, -2), padded(values, size, -2), layer)
        heads = max(map(len, kept))
        masks[layer] = padded([each.expand(heads, -1) for each in kept], size, -1)
    ALL_ATTENTION_FUNCTIONS["kept"] = partial(attend_kept, masks)
    before, model.config._attn_implementation = model.config._attn_implementation, "kept"
    alive, found = list(range(len(rows))), [list(row.given[-1:]) if len(row.given) == 1 else [] for row in rows]
    tokens = torch.tensor([row.given[0] for row in rows], device=device)[:, None]
    positions = torch.tensor([row.position for row in rows], device=device)[:, None]
    over = [bool(some) and (some[-1] in ends or len(some) >= row.room) for some, row in zip(found, rows, strict=True)]
    try:
        for step in range(1, max(len(row.given) + row.room for row in rows)):
            if all(over):
                break
            if sum(not over[index] for index in alive) <= len(alive) // 2:  # let the others go
                going = torch.tensor([place for place, index in enumerate(alive) if not over[index]], device=device)
                alive = [index for index in alive if not over[index]]
                cache.batch_select_indices(going)
                masks.update({layer: mask[going] for layer, mask in masks.items()})
                tokens, positions = tokens[going], positions[going]
            logits = model(tokens, past_key_values=cache, position_ids=positions, use_cache=True).logits[:, -1]
            likely = logits.argmax(-1).tolist()
            for place, index in enumerate(alive):
                row = rows[index]
                if step < len(row.given):
                    likely[place] = row.given[step]
                elif not over[index]:
                    found[index].append(likely[place])
                    over[index] = likely[place] in ends or len(found[index]) >= row.room
            tokens, positions = torch.tensor(likely, device=device)[:, None], positions + 1
    finally:
        model.config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS["kept"]
    return found
