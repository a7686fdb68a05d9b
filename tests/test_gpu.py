"""On an NVIDIA GPU (`make gpu-test`): the same truths as on the CPU, in the precisions that GPUs run."""

import numpy as np
import pytest
import torch
from helpers.models import CONFIG, PATTERNS, VOCAB, ids, tiny_model
from helpers.oracles import error, oracle

from flux_attention import attach, kernels
from flux_attention.hf.generation.step import DecodeStep
from flux_attention.patterns import Full, Streaming
from flux_attention.shipped import load_shipped
from flux_attention.tasks.samples import Haystack, make_sample
from flux_attention.tasks.text import local_texts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 2e-3), (torch.float32, 2e-3)])
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 4, 64), (8, 2, 128), (4, 1, 256)])
@pytest.mark.parametrize("keys, length", [(1, 1), (129, 129), (700, 700), (700, 1), (1500, 37), (1500, 1500)])
def test_kernels_against_float64(dtype, tolerance, heads, kv_heads, dim, keys, length):
    generator = torch.Generator("cuda").manual_seed(keys + dim)
    query = torch.randn(2, heads, length, dim, generator=generator, device="cuda").to(dtype)
    key, value = (torch.randn(2, kv_heads, keys, dim, generator=generator, device="cuda").to(dtype) for _ in range(2))
    scale = dim**-0.5
    for pattern in (Full(), Streaming(16, 100), Streaming(100, 200, block_size=128)):
        mask = pattern.mask(keys)[keys - length :].cuda()
        assert error(pattern.prefill(query, key, value, scale), oracle(query, key, value, mask, scale)) < tolerance
    lengths = [max(1, keys - 3), keys]
    mask = (torch.arange(keys) < torch.tensor(lengths)[:, None])[:, None, None].cuda()
    last = query[:, :, -1:]
    assert error(kernels.decode(last, key, value, lengths, scale), oracle(last, key, value, mask, scale)) < tolerance


@pytest.mark.parametrize("config", PATTERNS.values(), ids=PATTERNS)
@torch.no_grad()
def test_generation_equals_the_cpus(config):
    routes = torch.tensor([[1, 0, 0], [0, 1, 0]])
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :13] = 0
    outputs = []
    for device in ("cpu", "cuda"):
        model = tiny_model("qwen3").to(device)
        with attach(model, config).force(routes):
            tokens = model.generate(
                ids(2, 40).to(device), attention_mask=mask.to(device), max_new_tokens=10, do_sample=False
            )
        outputs.append(tokens.cpu())
    assert torch.equal(*outputs)


@torch.no_grad()
def test_shipped_model_answers_in_bfloat16():
    model, tokenizer, routing = load_shipped()
    model.to("cuda", torch.bfloat16)
    haystack = Haystack(local_texts(True, max_chars=200_000), tokenizer)
    right = 0
    for seed in range(8):
        sample = make_sample("two_hop", haystack, tokenizer, 4096, seed)
        prompt = torch.from_numpy(sample.prompt_ids.astype(np.int64))[None].cuda()
        new = model.generate(prompt, max_new_tokens=len(sample.answer_ids), do_sample=False, pad_token_id=2)
        right += new[0, prompt.shape[1] :].tolist() == sample.answer_ids.tolist()
    assert right >= 6
    assert routing.routes.msr[0] > 0


def test_routers_follow_the_model_to_its_device():
    model = tiny_model("qwen3")
    routing = attach(model, CONFIG)
    model.to("cuda")
    with torch.no_grad():
        model(ids(1, 20).cuda())
    assert all(parameter.is_cuda for parameter in routing.routers.parameters())


@pytest.mark.parametrize("config", PATTERNS.values(), ids=PATTERNS)
def test_prefill_in_chunks_does_not_wait_for_the_device(config):
    """With forced routes: routers' decisions are waited for."""
    model = tiny_model("qwen3").to("cuda", torch.bfloat16)
    prompt = ids(3, 60).cuda()

    def run():
        cache = model(prompt[:, :40], use_cache=True).past_key_values
        model(prompt[:, 40:57], past_key_values=cache)
        return model(prompt[:, 57:], past_key_values=cache).logits

    with torch.no_grad(), attach(model, config).force(torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1]])):
        expected = run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            actual = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("how", [dict(), dict(do_sample=True), dict(eos_token_id=VOCAB + 7, pad_token_id=0)])
def test_the_decode_loop_does_not_wait_for_the_device(how, monkeypatch):
    """But for the event by which it learns, a step late, whether all sequences have ended."""
    model = tiny_model("qwen3", hidden_size=64, vocab_size=VOCAB).to("cuda", torch.float16)
    attach(model, CONFIG)
    how = dict(do_sample=False, inputs=ids(3, 20).to("cuda"), max_new_tokens=24) | how
    model.generate(**how)  # captures the step
    run, steps = DecodeStep.run, []

    def watched(step):
        steps.append(step)
        torch.cuda.set_sync_debug_mode("error" if 3 <= len(steps) < 20 else "default")
        return run(step)

    monkeypatch.setattr(DecodeStep, "run", watched)
    try:
        model.generate(**how)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 23
