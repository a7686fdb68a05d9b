"""Models that torchao and bitsandbytes quantised: the routed one is that model, and a cache gives what a mask does."""

import pytest
import torch
from helpers.models import in_steps
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from flux_attention import FluxConfig, attach
from flux_attention.names import BACKBONE

CONFIG = FluxConfig(sink=16, window=64, pool_size=16)


def by_torchao(config):
    def load():
        quantization = pytest.importorskip("torchao.quantization")
        model = AutoModelForCausalLM.from_pretrained(BACKBONE, dtype=torch.float32).eval()
        quantization.quantize_(model, getattr(quantization, config)())
        return model

    return load


def by_bitsandbytes(**options):
    def load():
        pytest.importorskip("bitsandbytes")
        config = BitsAndBytesConfig(**options)
        return AutoModelForCausalLM.from_pretrained(BACKBONE, dtype=torch.float32, quantization_config=config).eval()

    return load


QUANTISED = {
    "torchao int8": by_torchao("Int8WeightOnlyConfig"),
    "torchao int8, activations too": by_torchao("Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes int8": by_bitsandbytes(load_in_8bit=True),
    "bitsandbytes fp4": by_bitsandbytes(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    "bitsandbytes nf4": by_bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_model_is_routed(name, tokenizer):
    model = QUANTISED[name]()
    text = "\n".join(f"def part_{number}(): return {number}" for number in range(30))
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    stock = model(ids).logits
    routing = attach(model, CONFIG)
    torch.testing.assert_close(model(ids).logits, stock, atol=1e-3, rtol=1e-3)  # fresh routers change nothing
    # Their kernels for one token round otherwise than for many, in the stock model too: by how much depends on the CPU.
    with routing.force("full"):
        rounding = (in_steps(model, ids, ids.shape[1] - 4) - stock).abs()
    with routing.force([2, 6]):
        expected = model(ids, use_cache=False).logits
        found = in_steps(model, ids, ids.shape[1] - 4)
    apart, routed = (found - expected)[:, -4:].abs().mean(), (expected - stock)[:, -4:].abs().mean()
    assert apart < 1.5 * rounding[:, -4:].mean() + 1e-5 < routed and routed > 0.1
    most = max(1e-4, 1.5 * rounding[:, :-4].max().item())
    torch.testing.assert_close(found[:, :-4], expected[:, :-4], atol=most, rtol=1e-4)
    routing.detach()
    assert torch.equal(model(ids).logits, stock)


@torch.no_grad()
def test_quantising_after_attach_decides_as_before_it(tokenizer):
    quantization = pytest.importorskip("torchao.quantization")
    ids = tokenizer("def area(width, height):\n" * 20, return_tensors="pt")["input_ids"]
    logits = []
    for later in (False, True):
        model = AutoModelForCausalLM.from_pretrained(BACKBONE, dtype=torch.float32).eval()
        if later:
            routing = attach(model, "shipped")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        if not later:
            routing = attach(model, "shipped")
        model(ids)
        logits.append(routing.routes.logits_BL2)
    torch.testing.assert_close(*logits)
