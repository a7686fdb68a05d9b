"""Models in GGUF files: the same model as in a folder, and what is refused."""

import json
import re

import pytest
import torch
from helpers.command import flux, flux_process
from helpers.gguf_files import llama, write_gguf
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from flux_attention import attach
from flux_attention.adapters import card
from flux_attention.errors import GgufError
from flux_attention.hf import loading
from flux_attention.training import Recipe
from flux_attention.training.run import check_model
from flux_attention.training.run import load_model as load_recipe

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A GGUF file, and the model of its weights."""
    model = llama()
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf", model), model


@torch.no_grad()
def logits(model):
    return model(torch.arange(3, 3 + 40)[None]).logits


def test_the_file_holds_the_same_model(pair):
    path, model = pair
    loaded = loading.load_model(str(path), "float32", "cpu")
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
    assert loaded.dtype == torch.float32 and not hasattr(loaded.config, "quantization_config")
    config = attach(loaded).config
    assert config.base_model.name == "tiny.Q8_0 (GGUF)"
    assert 'load_model("FILE.gguf"' in str(card(config)) and "base_model:" not in str(card(config))
    half = loading.load_model(str(path), "bfloat16", "cpu")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_the_name_in_the_file_goes_before_that_of_the_file(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", llama(), facts={"general.name": "owner/tiny"})
    assert loading.load_config(str(path)).name_or_path == "owner/tiny (GGUF)"


def test_the_command_line_takes_a_file(pair, tmp_path):
    path, _ = pair
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("x  12 = 3\n" * 9)
    result = flux_process("inspect", str(path), str(prompt), "--json", "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert len(facts["sequences"][0]["routes"]) == 2
    assert result.stderr.count("tiny.Q8_0.gguf: its weights are dequantised to float32") == 1
    unnamed = tmp_path / "sha256-1f"  # as some programs store them
    unnamed.write_bytes(path.read_bytes())
    assert flux("inspect", unnamed, prompt).returncode == 0
    assert "dequantised" in flux("generate", path, prompt, "--max-new-tokens", "2").stderr


def test_a_recipe_takes_a_file(pair, tmp_path):
    path, model = pair
    recipe = Recipe(model=str(path), output=str(tmp_path / "run"), data=[{"path": "x"}], dtype="float32", max_length=64)
    check_model(recipe)
    routing = load_recipe(recipe)
    assert torch.allclose(logits(routing.model), logits(model), atol=1e-5)


@pytest.mark.parametrize(
    "pre, tokens",
    [
        ("smollm", ["a", "ĠĠ", "1", "2", "3", "4"]),
        ("llama-bpe", ["a", "Ġ", "Ġ", "12", "3", "4"]),
        ("gpt-2", ["a", "Ġ", "Ġ", "12", "34"]),
    ],
)
def test_digits_are_split_as_the_file_says(tmp_path, pre, tokens):
    path = write_gguf(tmp_path / "tiny.gguf", llama(), pre=pre)
    assert loading.load_tokenizer(str(path)).tokenize("a  1234") == tokens


def test_what_lies_beside_the_file_is_not_read(pair, tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(pair[0].read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    alone, beside = (loading.load_tokenizer(str(one)) for one in (pair[0], path))
    assert type(beside) is type(alone) and set(beside("a")) == {"input_ids", "attention_mask"}
    assert beside.eos_token == "<|im_end|>"


LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def test_scaled_rotary_positions(tmp_path):
    model = llama(rope_parameters=LLAMA3)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    factors = LLAMA3["rope_theta"] ** -(torch.arange(8) / 8) / scaled
    assert factors.max() > 7 and factors.min() < 1.1
    path = write_gguf(tmp_path / "llama3.gguf", model, factors=factors)
    loaded = loading.load_model(str(path), "float32", "cpu")
    assert loaded.config.rope_parameters["factor"] == pytest.approx(8, rel=1e-4)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-4)
    for name, options in {
        "other": dict(factors=factors.flip(0)),
        "yarn": dict(facts={"llama.rope.scaling.type": "yarn"}),
    }.items():
        path = write_gguf(tmp_path / f"{name}.gguf", model, **options)
        with pytest.raises(GgufError, match="scales its rotary positions"):
            loading.load_config(str(path))


def test_files_that_cannot_be_read(pair, tmp_path):
    content = pair[0].read_bytes()
    for cut in (2, 20, 30, 200, 3000, len(content) // 2, len(content) - 1):
        path = tmp_path / "cut.gguf"
        path.write_bytes(content[:cut])
        with pytest.raises(GgufError, match="download it again"):
            loading.load_config(str(path))
    path.write_bytes(b"PK" + content)
    assert "does not begin with the bytes GGUF" in flux("inspect", path, __file__).stderr
    path.write_bytes(content[:4] + b"\x09" + content[5:])
    with pytest.raises(GgufError, match="version 9"):
        loading.load_config(str(path))
    for message, options in {
        "cannot read .* of architecture 'clip'": dict(architecture="clip"),
        "one part of 3, .* llama-gguf-split --merge": dict(facts={"split.count": 3}),
    }.items():
        write_gguf(path, llama(), **options)
        with pytest.raises(GgufError, match=message):
            loading.load_config(str(path))


def test_missing_packages_are_named(pair, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("a")
    result = flux("inspect", pair[0], prompt)
    assert result.returncode == 1 and "pip install 'flux-attention[gguf]'" in re.sub(r"\s+", " ", result.stderr)
