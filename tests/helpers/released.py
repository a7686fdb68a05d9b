"""Checkpoints in the layout of the released ones, with random weights, and a plain computation of what they compute."""

import json

import torch
import torch.nn.functional as F
from helpers.blocks import BLOCK, naive_mass, naive_scores
from helpers.models import tiny_model
from safetensors.torch import save_file
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ARCHITECTURES = {"qwen3": "PawQwen3ForCausalLM", "llama": "PawLlamaForCausalLM"}
SETTINGS = dict(
    toggle_type="streaming",
    retrieval_mode="full",
    sink_size=100,
    local_window_size=200,
    triangle_n_last=40,
    pool_size=30,
    pooling_mode="ctx_q",
    use_softmax=True,
)


def router_weights(layers, dim, seed):
    """Random routers under their names in a released checkpoint; which way they decide differs by input and layer."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "cls_feat_extractor": {0: (8 * dim, dim), 2: (2 * dim, 8 * dim)},
        "cls_router_head_agnostic": {0: (4 * dim, 2 * dim), 2: (dim, 4 * dim), 4: (2, dim)},
    }
    found = {}
    for layer in range(layers):
        for part, linears in sizes.items():
            for number, (rows, columns) in linears.items():
                name = f"model.layers.{layer}.self_attn.mask_allocator.{part}.{number}"
                found[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * 4 / columns**0.5
                found[f"{name}.bias"] = torch.randn(rows, generator=generator) * 0.1
    return found


def write_checkpoint(folder, family="qwen3", seed=0, shards=1, settings=None, change=None, **model):
    """Write a checkpoint to ``folder``; returns the stock model and all weights. ``change`` may spoil the weights."""
    loaded = tiny_model(family, seed, **model)
    config = loaded.config.to_dict() | SETTINGS | (settings or {})
    config |= {"architectures": [ARCHITECTURES[family]], "auto_map": {"AutoModelForCausalLM": "modeling.Paw"}}
    weights = {name: weight.detach().clone().contiguous() for name, weight in loaded.state_dict().items()}
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    layers, dim = config["num_hidden_layers"], loaded.model.layers[0].self_attn.head_dim
    weights |= router_weights(layers, dim, seed)
    for layer in range(layers):
        weights[f"model.layers.{layer}.self_attn.attn_mask_log_alphas"] = torch.zeros(2)
    weights |= {name: torch.zeros(3) for name in ("sparsity_lambda1_task", "model.sparsity_lambda2_task", "log_temp")}
    if change is not None:
        change(weights)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "modeling.py").write_text("raise SystemExit('code of a checkpoint was run')")
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return loaded, weights
    names, index = sorted(weights), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        some = {name: weights[name] for name in names[shard::shards]}
        save_file(some, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(some, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return loaded, weights


def sees(i, j, prompt, length, settings, block):
    """Whether query i sees key j, by the definition and one pair at a time."""
    sink, window = (-(-settings[name] // block) * block for name in ("sink_size", "local_window_size"))
    if j > i:
        return False
    if i < prompt and settings["toggle_type"] == "full":
        return True
    if settings["toggle_type"] == "triangle" and prompt - settings["triangle_n_last"] <= i < prompt:
        return True
    if i < prompt:
        return j // block < sink // block or i // block - j // block < window // block
    return j < sink or i - j < window


def selected(query, key, scale):
    """What each head of a prompt's queries (H, S, D) sees by blocks that hold 0.8 of a row: bool (H, S, S)."""
    heads, length = query.shape[:2]
    seen = torch.zeros(heads, length, length, dtype=torch.bool)
    for head in range(heads):
        scores = naive_scores(query[head], key[head // (heads // len(key))], 16, scale)
        for row, shares in scores.items():
            for n in naive_mass(shares, row, 0.8):
                seen[head, row * BLOCK : (row + 1) * BLOCK, n * BLOCK : (n + 1) * BLOCK] = True
    return seen.tril()


def plain_logits(model, weights, tokens, prompt, settings, block):
    """Logits and routes (L,) of one sequence, by the released weights and formulas alone."""
    length = len(tokens)
    masks = {
        True: torch.ones(length, length, dtype=torch.bool).tril(),
        False: torch.tensor(
            [[sees(i, j, prompt, length, settings, block) for j in range(length)] for i in range(length)]
        ),
    }
    pooled, routes, pool = {}, {}, settings["pool_size"]

    def read(layer, heads, dim):
        def hook(module, args, output):
            query = output.reshape(length, heads, dim)[:prompt].float()
            pooled[layer] = torch.cat([query[:pool], query[-pool:]]).mean((0, 1))

        return hook

    def linear(x, layer, name):
        name = f"model.layers.{layer}.self_attn.mask_allocator.{name}"
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def attention(module, query, key, value, attention_mask, **kwargs):
        layer = module.layer_idx
        x = linear(F.silu(linear(pooled[layer], layer, "cls_feat_extractor.0")), layer, "cls_feat_extractor.2")
        x = F.silu(linear(x, layer, "cls_router_head_agnostic.0"))
        logits = linear(F.silu(linear(x, layer, "cls_router_head_agnostic.2")), layer, "cls_router_head_agnostic.4")
        routes[layer] = bool(logits[1] > logits[0])
        mask = masks[routes[layer]].expand(1, query.shape[1], -1, -1)
        if settings["retrieval_mode" if routes[layer] else "toggle_type"] == "xattn":
            mask = mask.clone()
            mask[0, :, :prompt, :prompt] = selected(query[0, :, :prompt], key[0, :, :prompt], kwargs["scaling"])
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("released", attention)
    hooks = []
    for index, layer in enumerate(model.model.layers):
        read_from = getattr(layer.self_attn, "q_norm", layer.self_attn.q_proj)
        hooks.append(read_from.register_forward_hook(read(index, 4, layer.self_attn.head_dim)))
    before, model.config._attn_implementation = model.config._attn_implementation, "released"
    try:
        with torch.no_grad():
            logits = model(torch.as_tensor(tokens)[None], use_cache=False).logits[0]
    finally:
        model.config._attn_implementation = before
        for hook in hooks:
            hook.remove()
    return logits, [routes[layer] for layer in sorted(routes)]
