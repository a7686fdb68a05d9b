"""Tiny random models of every supported family, in float32, with inputs, configurations and routers for them."""

from dataclasses import replace

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from flux_attention import FluxConfig

VOCAB = 96
#: Versions that lack what tests of these matters need; what it is, each says where it looks at this.
IS_OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
#: family -> (model type, what differs from SMALL)
FAMILIES = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", dict(head_dim=16)),
    "mistral": ("mistral", dict(sliding_window=None)),
    "phi3": ("phi3", {}),
    "gemma3": (
        "gemma3_text",
        dict(
            head_dim=16, num_hidden_layers=4, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2
        ),
    ),
    "olmo2": ("olmo2", {}),
    "glm4": ("glm4", dict(head_dim=16, partial_rotary_factor=0.5)),
    "qwen3_moe": ("qwen3_moe", dict(head_dim=16, **MOE)),
    "qwen2_vl": ("qwen2_vl", {}),
}


def tiny_config(family: str, **changes):
    model_type, differences = FAMILIES[family]
    sizes = {**SMALL, **differences, **changes}
    if family == "qwen2_vl":
        sizes["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        vision = dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=1, patch_size=4)
        return transformers.Qwen2VLConfig(text_config=sizes, vision_config=vision, pad_token_id=0)
    return AutoConfig.for_model(model_type, **sizes)


def tiny_model(family: str, seed: int = 0, **changes):
    """A random model whose attention is not nearly uniform, so that dropping keys shows."""
    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    if family == "qwen2_vl":
        model = transformers.Qwen2VLForConditionalGeneration(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6.0 if "q_proj" in name or "k_proj" in name or "qkv" in name else 2.0)
    return model.float().eval()


@torch.no_grad()
def in_steps(model, ids, start):
    """Logits (B, S, vocabulary) of a prompt's first ``start`` tokens, and of the others one by one."""
    parts = [model(ids[:, :start], use_cache=True)]
    for place in range(start, ids.shape[1]):
        parts.append(model(ids[:, place : place + 1], past_key_values=parts[0].past_key_values))
    return torch.cat([part.logits for part in parts], 1)


CONFIG = FluxConfig(sink=4, window=9, pool_size=6)
TRIANGLE = FluxConfig(pattern="triangle", sink=4, window=9, last_n=5, pool_size=6)
#: One configuration of each sparse pattern, for the sizes of these models.
PATTERNS = {config.sparse["pattern"]: config for config in (CONFIG, TRIANGLE)}
#: Sizes rounded to blocks, 4 and 12 tokens.
PATTERNS |= {
    f"{name}, blocks": replace(config, sparse=config.sparse | {"block_size": 4}) for name, config in PATTERNS.items()
}


def ids(batch, length, seed=0):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def randomize(routing, seed=0):
    """Routers that decide differently for different inputs and layers."""
    generator = torch.Generator().manual_seed(seed)
    for router in routing.routers.values():
        with torch.no_grad():
            weight = router.head[-1].weight
            weight.copy_(torch.empty(weight.shape).normal_(std=3.0, generator=generator))
            router.head[-1].bias.zero_()
            router.encoder[0].weight.mul_(8.0)
            router.encoder[2].weight.mul_(4.0)
    return routing


def packed(rows):
    """What a forward of these sequences packed into one row takes."""
    lengths = [len(row) for row in rows]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return dict(input_ids=torch.cat(rows)[None], position_ids=positions[None], sequence_lengths=lengths)
