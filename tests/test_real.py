"""What must stay true, on a real pretrained model: ``make test-real MODEL=DIR``. Takes minutes on two CPU cores."""

import json
import os
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from helpers.models import in_steps, randomize, tiny_model
from helpers.oracles import error, oracle_logits
from transformers import AutoModelForCausalLM

from flux_attention import AdapterError, FluxConfig, attach
from flux_attention.calibration.calibrator import Calibrator
from flux_attention.calibration.samples import generated_samples
from flux_attention.hf.loading import load_config, load_model, load_tokenizer
from flux_attention.names import known_rankings
from flux_attention.patterns import sparse_pattern
from flux_attention.tasks.scoring import evaluate

pytestmark = pytest.mark.real

#: A folder, a Hub id or a GGUF file.
MODEL = os.environ.get("MODEL") or "HuggingFaceTB/SmolLM2-135M-Instruct"
#: Small, so that short prompts already lose most of their keys.
CONFIG = FluxConfig(sink=16, window=112, pool_size=32)
LENGTH, NEW = 700, 12


def load(dtype="float32"):
    return load_model(MODEL, dtype, "cpu").eval()


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(scope="module")
def prompt():
    """Source text of the Python installation, (1, LENGTH)."""
    text = Path(json.decoder.__file__).read_text(encoding="utf-8")
    ids = load_tokenizer(MODEL)(text, return_tensors="pt")["input_ids"][:, :LENGTH]
    assert ids.shape[1] == LENGTH
    return ids


@pytest.fixture
def routing(model):
    """Routers that decide differently for different layers."""
    routing = randomize(attach(model, CONFIG))
    yield routing
    routing.detach()


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """A folder with routers for the model in float32."""
    folder = tmp_path_factory.mktemp("adapter")
    routing = randomize(attach(model, CONFIG))
    routing.save_pretrained(folder)
    routing.detach()
    return folder


def generate(model, prompt):
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False)


def test_fresh_routers_generate_as_the_stock_model_does(model, prompt):
    expected = generate(model, prompt)
    routing = attach(model, CONFIG)
    try:
        assert torch.equal(generate(model, prompt), expected)
        assert routing.routes.msr == [0]
    finally:
        routing.detach()


def test_sparse_layers_through_the_cache_equal_the_model_under_masks(model, prompt, routing):
    start = LENGTH - NEW
    with routing.force("sparse"):
        actual = in_steps(model, prompt, start)
    layers = routing.config.base_model.routed_layers
    routing.detach()
    masks = dict.fromkeys(layers, sparse_pattern(CONFIG).mask(LENGTH, start))
    expected = oracle_logits(model, prompt, masks)
    assert error(actual, expected) < 1e-4
    assert error(oracle_logits(model, prompt, {}), expected) > 1e-2  # what is left out matters


def test_a_saved_adapter_decides_and_answers_the_same(model, prompt, routing, tmp_path):
    with torch.no_grad():
        expected = model(prompt).logits
    routes = routing.routes
    assert 0 < routes.msr[0] < 1
    routing.save_pretrained(tmp_path)
    routing.detach()
    loaded = attach(model, tmp_path)
    try:
        with torch.no_grad():
            assert torch.equal(model(prompt).logits, expected)
        assert loaded.routes.to_dict() == routes.to_dict()
    finally:
        loaded.detach()


@torch.no_grad()
def rounded_to_int8(model):
    """Round every matrix to 255 steps a row, as weight-only quantisation does."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            step = parameter.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            parameter.div_(step).round_().mul_(step)
    return model


def test_an_adapter_fits_its_model_in_other_precisions(adapter):
    attach(load("bfloat16"), adapter)
    attach(rounded_to_int8(load()), adapter)


def test_an_adapter_refuses_another_model(adapter):
    with pytest.raises(AdapterError, match="its embedding weights are others"):
        attach(AutoModelForCausalLM.from_config(load_config(MODEL)), adapter)
    with pytest.raises(AdapterError, match=r"were made for .*, expected"):
        attach(tiny_model("qwen3"), adapter)


def test_calibrated_layers_answer_better_than_layers_spread_evenly(model):
    """Ranked on one question, a third of the layers is judged on two others."""
    tokenizer = load_tokenizer(MODEL)
    samples = generated_samples(tokenizer, ["look_up"], 400, samples=1, judged=2)
    routing = attach(model, CONFIG)
    try:
        ranking = Calibrator(routing, tokenizer, samples).rank()
        count = len(ranking) // 3
        losses = {
            name: fmean(evaluate(model, samples.judged["look_up"], routing, routes=routes).nats)
            for name, routes in (
                ("dense", "full"),
                ("calibrated", sorted(ranking[:count])),
                ("even", 1 - count / len(ranking)),
                ("sparse", "sparse"),
            )
        }
    finally:
        routing.detach()
    assert losses["dense"] < losses["even"]
    assert losses["calibrated"] < losses["even"] - 0.1, losses


def test_routes_by_the_ends_are_the_same_in_chunks(model, prompt):
    routing = randomize(attach(model, replace(CONFIG, decide="ends", end_tokens=64)))
    try:
        expected = generate(model, prompt)
        routes = routing.routes
        assert 0 < routes.msr[0] < 1
        arguments = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False)
        assert torch.equal(model.generate(prompt, prefill_chunk_size=200, **arguments), expected)
        assert torch.equal(routing.routes.logits_BL2, routes.logits_BL2)
    finally:
        routing.detach()


def test_the_ranking_that_comes_along_is_this_models(model):
    """Of whatever precision its weights are: the fingerprint is compared loosely."""
    name = next((name for name in known_rankings() if name.lower() in MODEL.lower()), None)
    name = name or ("SmolLM2-135M-Instruct" if "smollm2" in MODEL.lower() else None)
    if name is None:
        pytest.skip("no ranking of this model comes along")
    routing = attach(model, name, budget=0.5)
    assert len(routing.config.full_layers) == len(routing.layers) / 2
    routing.detach()
