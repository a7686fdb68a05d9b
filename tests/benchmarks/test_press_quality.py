"""Answers from shortened KV caches, and the tables made of them."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import tiny_model

from flux_attention.tasks.generation import generate_answers
from flux_attention.tasks.samples import Sample


@pytest.fixture
def press_quality(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("press_quality")


class Last:
    """A press that keeps the last tokens, of layers or, if they are masked, of heads."""

    def __init__(self, count, heads=None):
        self.count, self.heads = count, heads

    def compress(self, module, hidden, keys, values, attentions, kwargs):
        if self.heads is None:
            return keys[:, :, -self.count :], values[:, :, -self.count :]
        masked = torch.zeros(keys.shape[:3], dtype=torch.bool)
        masked[:, self.heads, : -self.count] = True
        module.masked_key_indices = masked.nonzero(as_tuple=True)
        return keys, values


@pytest.mark.parametrize("cut", [0, 7])
def test_rows_are_decoded_as_they_are_alone(press_quality, tokenizer, cut):
    """Whole caches answer as ``generate`` does, shortened ones as with no others; the given end of a prompt is read."""
    model = tiny_model("qwen3", vocab_size=len(tokenizer))
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 96, length).astype(np.int32) for length in (40, 17, 33)]
    samples = [
        Sample(np.append(prompt, 5).astype(np.int32), [(len(prompt), len(prompt) + 1)], "any") for prompt in prompts
    ]
    presses = {"whole": None, "last": Last(9), "heads": Last(9, [0]), "every head": Last(9, slice(None))}
    rows = {
        name: [
            press_quality.pressed(model, prompt.tolist(), len(prompt) - cut, {name: press}, 12)[name]
            for prompt in prompts
        ]
        for name, press in presses.items()
    }
    expected = generate_answers(model, tokenizer, samples, max_new_tokens=12).tokens
    ends = press_quality.end_tokens(model, tokenizer)
    flat = [row for some in rows.values() for row in some]
    together = press_quality.decode(model, flat, ends)
    assert together[:3] == expected
    assert together == [press_quality.decode(model, [row], ends)[0] for row in flat]
    assert together[3:6] == together[9:]  # masked or not there
    size = [row.kv_bytes for row in (rows["whole"][0], rows["last"][0], rows["heads"][0], rows["every head"][0])]
    assert size[1] == size[3] < size[2] < size[0] and size[1] * (40 - cut) == size[0] * 9
    assert model.config._attn_implementation == "sdpa"


@pytest.fixture
def show(monkeypatch):
    """A function that makes the tables of such rows."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    module = importlib.import_module("show_press")

    def tables(files):
        monkeypatch.setattr(module, "load", lambda name: files.get(name, {"meta": {}, "rows": []}))
        return module.press_tables()

    return tables


def rows_of(right, **facts):
    for task in ("look_up", "counting"):
        many = right if task == "look_up" else 5
        scores = [1] * many + [0] * (10 - many)
        yield dict(task=task, seq_len=4096, n=10, accuracy=many / 10, scores=scores, **facts)


@pytest.fixture
def files():
    facts = dict(question_apart=False, model="some", baseline_kv_bytes=1000)
    rows = [
        *rows_of(10, method="dense", kept=1.0, budget=None, kv_bytes=1000, **facts),
        *rows_of(9, method="static-nll", kept=None, budget=0.5, kv_bytes=640, **facts),
        *rows_of(10, method="static-nll", kept=None, budget=0.25, kv_bytes=800, **facts),
        *rows_of(4, method="SnapKVPress", kept=0.5, budget=None, kv_bytes=500, **facts),
    ]
    meta = {"device": "a GPU", "transformers": "5", "settings": {"text": "1f", "kvpress": "0.5"}}
    return {"press_quality": {"meta": meta, "rows": rows}}


def test_presses_stand_beside_dense_and_calibrated_layers(show, files):
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in show(files).splitlines() if line[:1] == "|"
    ]
    dense, *calibrated, press = lines[2:]
    assert dense == ["dense", "1.00", "0.750", "", ""]
    assert [line[:2] for line in calibrated] == [
        ["calibrated layers, budget 0.25", "0.80"],
        ["calibrated layers, budget 0.5", "0.64"],
    ]
    assert calibrated[1][3].startswith("−5.0") and calibrated[1][4] == ""
    assert press[:3] == ["`SnapKVPress`", "0.50", "0.450"]
    assert [cell.split(" ±")[0] for cell in press[3:]] == ["−30.0", "−25.0"]


def test_nothing_measured_is_said(show):
    assert "Not measured here" in show({})
