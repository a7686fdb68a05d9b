"""Tiny random models of every supported family, on the CPU, in float32."""

import os
import warnings

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

if not torch.cuda.is_available():  # before any kernel is imported
    os.environ["TRITON_INTERPRET"] = "1"

#: Triton's interpreter is on for the whole process or off.
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here, as there is a GPU")
DEVICES = [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]

# One test process a core: more threads than cores slow each other down many times over.
torch.set_num_threads(1)

#: Where fixtures that several folders share are.
pytest_plugins = ["helpers.shipped", "helpers.training"]

VOCAB = 96
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


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return tiny_model(family)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torchvision.*")
        yield
