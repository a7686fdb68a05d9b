"""Prompts for engines of vLLM's on the shipped model, and the transformers engine to compare with."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_WORKER_MULTIPROCESSING_METHOD="spawn")

import torch
from helpers.models import randomize
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config
from vllm import SamplingParams, TokensPrompt

from flux_attention import FluxConfig, attach
from flux_attention.adapters import CONFIG_FILE, load_config, save
from flux_attention.names import BACKBONE, ROUTERS
from flux_attention.tasks.families import FAMILIES
from flux_attention.tasks.samples import Haystack, make_sample
from flux_attention.tasks.text import local_texts

SINK, WINDOW, CHUNK, LAYERS = 64, 704, 256, 10
NEW = 16


def make_prompts(page):
    """Make prompts of all families, and of lengths around every boundary, as token ids."""
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    haystack = Haystack(local_texts(True, max_chars=300_000), tokenizer)
    found = [
        list(make_sample(family, haystack, tokenizer, length, 0, held_out=True).prompt_ids)
        for family, length in zip(FAMILIES, [900, 1100, 1300, 1500, 1700, 2000, 800], strict=True)
    ]
    text = found[2]
    edges = [1, 2, page, page + 1, SINK - 1, SINK + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1]
    edges += [SINK + WINDOW - 1, SINK + WINDOW, SINK + WINDOW + 1, SINK + WINDOW + page, 4 * CHUNK + 1]
    return [[int(token) for token in prompt] for prompt in [*found, *(text[:length] for length in edges)]]


def block_sparse_adapter(folder):
    """Write the shipped adapter with full layers that select few blocks of a prompt; return the folder's name."""
    shutil.copytree(ROUTERS, folder, dirs_exist_ok=True)
    _, config = load_config("shipped")
    threshold = {str(layer): 0.9 if layer % 2 else 0.7 for layer in config.base_model.routed_layers}
    config = replace(config, full={"pattern": "block_sparse", "threshold": threshold, "from_tokens": 0})
    (Path(folder) / CONFIG_FILE).write_text(json.dumps(config.to_dict()))
    return str(folder)


def ranked_adapter(folder, budget=0.5):
    """Write an adapter of the shipped model with a ranking instead of routers; return the folder's name."""
    _, config = load_config("shipped")
    ranking = (0, 3, 6, 9, 2, 5, 8, 1, 4, 7)
    config = FluxConfig(sink=SINK, window=WINDOW, ranking=ranking, budget=budget, base_model=config.base_model)
    save(folder, config, nn.ModuleDict())
    return str(folder)


def wide_model(folder, hidden_size, heads, head_dim, layers=6, device="cpu"):
    """
    Write a random Qwen3 of 8 KV heads, which four cards can share, and routers that differ by prompt and layer.

    Returns the folders of both.
    """
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=AutoTokenizer.from_pretrained(BACKBONE).vocab_size, hidden_size=hidden_size,
        intermediate_size=3 * hidden_size, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8,
        head_dim=head_dim, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():  # else attention is nearly uniform, and what a layer drops hardly shows
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.mul_(3.0)
    routing = randomize(attach(model, FluxConfig(sink=SINK, window=WINDOW)))
    routers, backbone = Path(folder) / "routers", Path(folder) / "model"
    routing.save_pretrained(routers)
    routing.detach()
    model.save_pretrained(backbone)
    return str(backbone), str(routers)


def transformers_engine(decide, device="cpu", routers="shipped", model=BACKBONE):
    """Give the log-probabilities of a prompt's next tokens, and its Omega, by the transformers engine in float32."""
    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
    routing = attach(model, routers, decide=decide)

    def score(prompt, answer, routes=None):
        with torch.no_grad(), routing.force(routes):
            ids = torch.tensor([prompt + answer[:-1]], device=device)
            logits = model(ids, prompt_lengths=[len(prompt)]).logits[0, len(prompt) - 1 :]
        return logits.log_softmax(-1)[range(len(answer)), answer].cpu(), routing.routes.msr[0]

    return score


def ask(llm, prompts, new=NEW, wishes=None):
    """Let an engine answer: tokens, their log-probabilities, and Omega, None where the engine does not route."""
    params = [
        SamplingParams(max_tokens=new, temperature=0, logprobs=0, ignore_eos=True, extra_args=wish or {})
        for wish in wishes or [None] * len(prompts)
    ]
    found = []
    for output in llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], params, use_tqdm=False):
        (answer,) = output.outputs
        told = output.kv_transfer_params or {}
        losses = [next(iter(token.values())).logprob for token in answer.logprobs]
        found.append((list(answer.token_ids), losses, told.get("flux_attention", {}).get("omega_msr")))
    return found


def metric(llm, name):
    """Read one of an engine's metrics."""
    (found,) = [metric.value for metric in llm.get_metrics() if metric.name == name]
    return found
