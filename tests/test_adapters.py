"""Adapters: what is saved comes back, and damage of every kind is named."""

import json
import shutil
from unittest import mock

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from test_attach import CONFIG, ids, randomize

from flux_attention import AdapterError, FluxConfig, adapters, attach


@pytest.fixture
def saved(tmp_path):
    routing = randomize(attach(tiny_model("qwen3"), CONFIG))
    routing.save_pretrained(tmp_path / "adapter")
    routing.detach()
    return tmp_path / "adapter"


def rewrite(path, change):
    weights = load_file(path / adapters.WEIGHTS_FILE)
    change(weights)
    save_file(weights, path / adapters.WEIGHTS_FILE)


@torch.no_grad()
def test_save_and_load_give_the_same_routes(family, tmp_path):
    model, prompt = tiny_model(family), ids(8, 40)
    routing = randomize(attach(model, CONFIG))
    logits = model(prompt).logits
    before = routing.routes
    routing.save_pretrained(tmp_path)
    routing.detach()
    again = attach(model, tmp_path)
    assert torch.equal(model(prompt).logits, logits)
    assert torch.equal(again.routes.logits_BL2, before.logits_BL2)
    assert again.config == routing.config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flux_config.json", "routers.safetensors"]


def test_half_precision_on_disk(saved, tmp_path):
    routing = attach(tiny_model("qwen3"), saved)
    routing.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    sizes = [(path / adapters.WEIGHTS_FILE).stat().st_size for path in (saved, tmp_path / "half")]
    assert sizes[1] < 0.6 * sizes[0]
    routing.detach()
    assert next(attach(routing.model, tmp_path / "half").routers.parameters()).dtype == torch.float32


def test_another_model_is_refused_with_the_reason(saved):
    with pytest.raises(AdapterError, match=r"made for .*: model_type is 'llama', expected 'qwen3'"):
        attach(tiny_model("llama", head_dim=16), saved)
    with pytest.raises(
        AdapterError, match=r"num_layers is 2, expected 3; routed_layers is \(0, 1\), expected \(0, 1, 2\)"
    ):
        attach(tiny_model("qwen3", num_hidden_layers=2), saved)
    model = tiny_model("qwen3", num_hidden_layers=2)
    with pytest.raises(AdapterError):
        attach(model, saved)
    attach(model).detach()  # a refused adapter leaves the model as it was
    with pytest.raises(AdapterError, match="its shape fits, but its embedding weights are others"):
        attach(tiny_model("qwen3", seed=1), saved)


def test_fine_tunes_and_other_dtypes_of_the_model_are_not_others(saved):
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.02)
    attach(model, saved).detach()
    attach(tiny_model("qwen3").to(torch.float16), saved).detach()


DAMAGE = {
    "no directory": (shutil.rmtree, "no such folder"),
    "no weights": (lambda p: (p / adapters.WEIGHTS_FILE).unlink(), "has no routers.safetensors"),
    "no config": (lambda p: (p / adapters.CONFIG_FILE).unlink(), "has no flux_config.json"),
    "empty weights": (lambda p: (p / adapters.WEIGHTS_FILE).write_bytes(b""), "cannot be read.*truncated"),
    "truncated weights": (
        lambda p: (p / adapters.WEIGHTS_FILE).write_bytes((p / adapters.WEIGHTS_FILE).read_bytes()[:-100]),
        "cannot be read.*truncated",
    ),
    "truncated header": (
        lambda p: (p / adapters.WEIGHTS_FILE).write_bytes((p / adapters.WEIGHTS_FILE).read_bytes()[:40]),
        "cannot be read.*truncated",
    ),
    "not safetensors": (lambda p: torch.save({"a": torch.ones(1)}, p / adapters.WEIGHTS_FILE), "cannot be read"),
    "an error page": (
        lambda p: (p / adapters.WEIGHTS_FILE).write_text("<html>429 Too Many Requests</html>"),
        "cannot be read",
    ),
    "truncated config": (
        lambda p: (p / adapters.CONFIG_FILE).write_text((p / adapters.CONFIG_FILE).read_text()[:50]),
        "not valid JSON",
    ),
    "config without keys": (lambda p: (p / adapters.CONFIG_FILE).write_text("{}"), r"missing keys \['base_model'"),
    "config without base model": (lambda p: FluxConfig().to_json(p / adapters.CONFIG_FILE), "names no base_model"),
    "unknown config key": (
        lambda p: (p / adapters.CONFIG_FILE).write_text(json.dumps({"x": 1})),
        r"unknown FluxConfig keys \['x'\]",
    ),
    "missing weight": (lambda p: rewrite(p, lambda w: w.pop("1.head.0.bias")), r"missing weights \['1.head.0.bias'\]"),
    "unknown weight": (lambda p: rewrite(p, lambda w: w.update(x=torch.ones(1))), r"unknown weights \['x'\]"),
    "wrong shape": (
        lambda p: rewrite(p, lambda w: w.update({"1.head.0.bias": torch.ones(3)})),
        r"1.head.0.bias has shape \(3,\), expected \(64,\)",
    ),
    "NaN": (lambda p: rewrite(p, lambda w: w["1.head.0.bias"].fill_(float("nan"))), "1.head.0.bias holds NaN"),
    "integers": (
        lambda p: rewrite(p, lambda w: w.update({"1.head.0.bias": torch.ones(64, dtype=torch.int32)})),
        "no floating-point",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_the_model_left_alone(saved, damage, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    act, message = DAMAGE[damage]
    act(saved)
    model = tiny_model("qwen3")
    with pytest.raises(AdapterError, match=message):
        attach(model, saved)
    attach(model).detach()


def test_a_file_is_not_a_directory(saved):
    with pytest.raises(AdapterError, match="is a file; expected a directory"):
        attach(tiny_model("qwen3"), saved / adapters.WEIGHTS_FILE)


def test_an_interrupted_save_keeps_the_former_adapter(saved, monkeypatch):
    routing = attach(tiny_model("qwen3"), saved)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapters, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        routing.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_push_and_download_talk_to_the_hub_library(saved, tmp_path):
    """The Hub itself is out of reach in tests: what is uploaded, and what is asked for, is checked."""
    routing = attach(tiny_model("qwen3"), saved)
    uploaded = {}

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, tmp_path / "hub")
        uploaded[repo_id] = commit_message
        return "https://hub/commit"

    with (
        mock.patch("huggingface_hub.HfApi.create_repo"),
        mock.patch("huggingface_hub.HfApi.upload_folder", upload_folder),
    ):
        assert routing.push_to_hub("me/routers") == "https://hub/commit"
    assert uploaded == {"me/routers": "Upload layer routers"}
    routing.detach()
    with (
        mock.patch("flux_attention.adapters.unreachable", return_value=None),
        mock.patch("flux_attention.adapters.snapshot_download", return_value=str(tmp_path / "hub")) as download,
    ):
        again = attach(routing.model, "me/routers")
    assert download.call_args.args == ("me/routers",)
    for name, weight in again.routers.state_dict().items():
        assert torch.equal(weight, routing.routers.state_dict()[name])
