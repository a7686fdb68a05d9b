"""Released checkpoints: what is imported routes and computes as a plain computation says; damage is named."""

import json
from unittest import mock

import pytest
import torch
from helpers.command import flux
from helpers.models import ids, in_steps
from helpers.released import SETTINGS, plain_logits, write_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flux_attention import FluxConfigError, attach, checkpoints
from flux_attention.checkpoints import import_checkpoint
from flux_attention.errors import CheckpointError


def loaded(imported):
    model = AutoModelForCausalLM.from_pretrained(imported.model, dtype=torch.float32).eval()
    return model, attach(model, imported.adapter)


@torch.no_grad()
@pytest.mark.parametrize("copy", [False, True], ids=["linked", "copied"])
@pytest.mark.parametrize("exact", [False, True], ids=["blocks", "exact"])
@pytest.mark.parametrize("toggle", ["streaming", "triangle"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_routes_and_outputs_are_those_of_a_plain_computation(family, toggle, exact, copy, tmp_path):
    settings = SETTINGS | {"toggle_type": toggle}
    checkpoint, shards = tmp_path / "released", 1 if family == "llama" else 3
    stock, weights = write_checkpoint(checkpoint, family, shards=shards, settings=settings)
    imported = import_checkpoint(checkpoint, tmp_path / "out", exact=exact, copy=copy)
    model, routing = loaded(imported)
    found, prompt, more = [], 440, 3
    for seed in range(3):
        tokens = ids(1, prompt + more, seed)
        actual = in_steps(model, tokens, prompt)
        expected, routes = plain_logits(stock, weights, tokens[0], prompt, settings, 1 if exact else 128)
        assert routing.routes.routes_BL[0].tolist() == routes
        torch.testing.assert_close(actual[0], expected, atol=3e-4, rtol=1e-3)
        found += routes
    assert set(found) == {True, False}


@torch.no_grad()
@pytest.mark.parametrize("family, name, block", [("qwen3", "retrieval_mode", 128), ("llama", "toggle_type", 1)])
def test_what_is_block_sparse_is_computed_as_plainly(family, name, block, tmp_path):
    settings = SETTINGS | {name: "xattn"}
    stock, weights = write_checkpoint(tmp_path / "released", family, settings=settings)
    model, routing = loaded(import_checkpoint(tmp_path / "released", tmp_path / "out"))
    found, changes, prompt, more = [], [], 900, 2
    for seed in range(2):
        tokens = ids(1, prompt + more, seed)
        actual = in_steps(model, tokens, prompt)
        expected, routes = plain_logits(stock, weights, tokens[0], prompt, settings, block)
        assert routing.routes.routes_BL[0].tolist() == routes
        torch.testing.assert_close(actual[0], expected, atol=3e-4, rtol=1e-3)
        exact, _ = plain_logits(stock, weights, tokens[0], prompt, settings | {name: "full"}, block)
        found += routes
        changes.append((exact - expected).abs().max().item())
    assert set(found) == {True, False} and max(changes) > 1e-2


@torch.no_grad()
def test_blocks_and_exact_tokens_are_not_the_same(tmp_path):
    """Else the test above could not tell them apart."""
    stock, weights = write_checkpoint(tmp_path / "released")
    changes = []
    for seed in range(3):
        tokens = ids(1, 443, seed)[0]
        exact, blocks = (plain_logits(stock, weights, tokens, 440, SETTINGS, block)[0] for block in (1, 128))
        changes.append((exact - blocks).abs().max().item())
    assert max(changes) > 1e-2


def test_the_model_folder_is_a_stock_one(tmp_path):
    checkpoint = tmp_path / "released"
    stock, weights = write_checkpoint(checkpoint, "llama", shards=2, tie_word_embeddings=True)
    imported = import_checkpoint(checkpoint, tmp_path / "out", copy=True)
    config = json.loads((imported.model / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert not {"auto_map", *SETTINGS} & set(config)
    assert {path.name for path in imported.model.iterdir()} == {
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer_config.json",
    }
    _, told = AutoModelForCausalLM.from_pretrained(imported.model, output_loading_info=True)
    assert not told["unexpected_keys"] and not told["missing_keys"]
    expected = {name for name in stock.state_dict() if name != "lm_head.weight"}
    written = {}
    for file in imported.model.glob("*.safetensors"):
        assert not file.is_symlink()
        written |= load_file(file)
    assert set(written) == expected and all(torch.equal(written[name], weights[name]) for name in expected)
    assert imported.ignored == (
        "log_temp",
        *(f"model.layers.{layer}.self_attn.attn_mask_log_alphas" for layer in range(3)),
        "model.sparsity_lambda2_task",
        "sparsity_lambda1_task",
    )


def test_linked_weights_are_the_checkpoints_files(tmp_path):
    checkpoint = tmp_path / "released"
    write_checkpoint(checkpoint)
    imported = import_checkpoint(checkpoint, tmp_path / "out")
    link = imported.model / "model.safetensors"
    assert link.is_symlink() and link.resolve() == (checkpoint / "model.safetensors").resolve()


def test_the_adapter_says_what_the_checkpoint_says(tmp_path):
    write_checkpoint(tmp_path / "released", settings={"toggle_type": "triangle"})
    config = import_checkpoint(tmp_path / "released", tmp_path / "out").config
    assert config.sparse == {"pattern": "triangle", "sink": 100, "window": 200, "last_n": 40, "block_size": 128}
    assert (config.pool_size, config.full, config.decide) == (30, {"pattern": "full"}, "prefill")
    exact = import_checkpoint(tmp_path / "released", tmp_path / "exact", exact=True).config
    assert "block_size" not in exact.sparse
    assert (tmp_path / "out/adapter/README.md").is_file()
    assert str(tmp_path / "out/model") in (tmp_path / "out/adapter/README.md").read_text()


def test_what_is_block_sparse_stays_so(tmp_path):
    write_checkpoint(tmp_path / "released", settings={"retrieval_mode": "xattn"})
    blocks = {"pattern": "block_sparse", "threshold": 0.8, "select": "mass", "from_tokens": 0}
    found = import_checkpoint(tmp_path / "released", tmp_path / "out").config
    assert found.full == blocks and found.sparse["block_size"] == 128
    assert import_checkpoint(tmp_path / "released", tmp_path / "exact", full="full").config.full == {"pattern": "full"}
    write_checkpoint(tmp_path / "sparse", settings={"toggle_type": "xattn"})
    found = import_checkpoint(tmp_path / "sparse", tmp_path / "other")
    assert found.config.sparse == {**blocks, "sink": 100, "window": 200} and found.config.full == {"pattern": "full"}
    attach(AutoModelForCausalLM.from_pretrained(found.model), found.adapter)


def _drop(name):
    return lambda weights: weights.pop(name)


def _set(name, value):
    return lambda weights: weights.update({name: value})


ROUTER = "model.layers.1.self_attn.mask_allocator"
#: name: settings, what is done to the weights, what is said
DAMAGE = {
    "toggle type": ({"toggle_type": "ring"}, None, r"toggle_type is 'ring', expected one of \['streaming'"),
    "retrieval mode": ({"retrieval_mode": None}, None, "retrieval_mode is None, expected one of"),
    "pooling mode": ({"pooling_mode": "mean"}, None, "pooling_mode is 'mean', expected 'ctx_q'"),
    "softmax": ({"use_softmax": False}, None, "use_softmax is False, expected true"),
    "pool size": ({"pool_size": 0}, None, "pool_size is 0, expected a whole number, at least 1"),
    "window": ({"local_window_size": "1024"}, None, "local_window_size is '1024'"),
    "triangle": ({"toggle_type": "triangle", "triangle_n_last": None}, None, r"missing keys \['triangle_n_last'\]"),
    "architecture": ({"architectures": ["PawGemmaForCausalLM"]}, None, "architectures is .*expected one of"),
    "stock": ({"architectures": ["Qwen3ForCausalLM"]}, None, "stock models need no import"),
    "unknown weight": (
        {},
        _set("model.layers.0.self_attn.gate.weight", torch.zeros(2)),
        "unknown weights.*gate.weight",
    ),
    "router of another kind": (
        {},
        _set(f"{ROUTER}.mlp.0.weight", torch.zeros(2)),
        "unknown weights.*mask_allocator.mlp",
    ),
    "missing router": ({}, _drop(f"{ROUTER}.cls_feat_extractor.2.bias"), "missing weights.*cls_feat_extractor.2.bias"),
    "missing weight": ({}, _drop("model.layers.2.mlp.up_proj.weight"), "missing weights.*layers.2.mlp.up_proj.weight"),
    "missing head": ({}, _drop("lm_head.weight"), "missing weights.*lm_head.weight"),
    "missing embeddings": ({}, _drop("model.embed_tokens.weight"), "missing weights.*embed_tokens"),
    "shape of a router": (
        {},
        _set(f"{ROUTER}.cls_router_head_agnostic.4.bias", torch.zeros(1)),
        r"cls_router_head_agnostic.4.bias has shape \(1,\), expected \(2,\)",
    ),
    "shape of a weight": (
        {},
        _set("model.norm.weight", torch.ones(31)),
        r"norm.weight has shape \(31,\), expected \(32,\)",
    ),
    "infinite router": (
        {},
        _set(f"{ROUTER}.cls_router_head_agnostic.4.bias", torch.tensor([0.0, torch.inf])),
        "1.head.4.bias holds NaN or infinity",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_cannot_be_imported_is_named_and_leaves_nothing(name, tmp_path):
    settings, change, message = DAMAGE[name]
    write_checkpoint(tmp_path / "released", settings=settings, change=change, tie_word_embeddings=False)
    if "architectures" in settings:
        path = tmp_path / "released/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(tmp_path / "released", tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("key", sorted(set(SETTINGS) - {"triangle_n_last"}))
def test_missing_settings_are_named(key, tmp_path):
    write_checkpoint(tmp_path / "released")
    path = tmp_path / "released/config.json"
    values = json.loads(path.read_text())
    del values[key]
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=rf"config.json is incomplete: missing keys \['{key}'\]"):
        import_checkpoint(tmp_path / "released", tmp_path / "out")


def test_files_that_cannot_be_read_are_named(tmp_path):
    folder, out = tmp_path / "released", tmp_path / "out"
    write_checkpoint(folder, shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:100])
    with pytest.raises(CheckpointError, match=r"00002-of-00002.safetensors cannot be read.*truncated"):
        import_checkpoint(folder, out)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"lacks \['model-00002-of-00002.safetensors'\]"):
        import_checkpoint(folder, out)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lacks \['../elsewhere.safetensors'\]"):
        import_checkpoint(folder, out)
    index.write_text('{"weight_map": ')
    with pytest.raises(CheckpointError, match=r"index.json cannot be read"):
        import_checkpoint(folder, out)
    index.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(CheckpointError, match=r"expected safetensors; pytorch_model.bin would run code"):
        import_checkpoint(folder, out)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is not valid JSON"):
        import_checkpoint(folder, out)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        import_checkpoint(folder, out)
    with pytest.raises(CheckpointError, match="no such folder"):
        import_checkpoint(tmp_path / "nowhere", out)


def test_arguments_that_cannot_be(tmp_path):
    write_checkpoint(tmp_path / "released", settings={"sink_size": 2**29})
    with pytest.raises(FluxConfigError, match="sink is 536870912, expected at most"):
        import_checkpoint(tmp_path / "released", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"full is 'dense', expected one of \['full'"):
        import_checkpoint(tmp_path / "released", tmp_path / "out", full="dense")
    with pytest.raises(CheckpointError, match="not an empty folder; name another output"):
        import_checkpoint(tmp_path / "released", tmp_path / "released")


def test_a_hub_repository_is_refused_before_its_weights_are_fetched(tmp_path):
    write_checkpoint(tmp_path / "hub", settings={"toggle_type": "ring"})
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(tmp_path / "hub")

    with (
        mock.patch.object(checkpoints, "snapshot_download", download),
        mock.patch.object(checkpoints, "unreachable", return_value=None),
    ):
        with pytest.raises(CheckpointError, match="toggle_type is 'ring'"):
            import_checkpoint("owner/name", tmp_path / "out", revision="v1")
        assert asked == [("owner/name", "v1", ["config.json"])]
        path = tmp_path / "hub/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | SETTINGS))
        import_checkpoint("owner/name", tmp_path / "out", revision="v1")
    assert "*.safetensors" in asked[-1][2] and not any("py" in pattern or "bin" in pattern for pattern in asked[-1][2])


def test_the_command(tmp_path):
    write_checkpoint(tmp_path / "released")
    result = flux("import", tmp_path / "released", "--output", tmp_path / "out")
    text = " ".join(result.stdout.split())
    assert result.returncode == 0 and result.stderr == ""
    assert "sparse layers streaming, sink 100, window 200, block_size 128; full layers full" in text
    assert "log_temp" in text and "linked to the checkpoint" in text and f"--routers {tmp_path / 'out/adapter'}" in text
    result = flux("import", tmp_path / "released", "--output", tmp_path / "more", "--exact", "--copy", "--json")
    facts = json.loads(result.stdout)
    assert facts["sparse"] == {"pattern": "streaming", "sink": 100, "window": 200}
    assert facts["model"] == str(tmp_path / "more/model") and "log_temp" in facts["ignored"]
    result = flux("import", tmp_path / "released", "--output", tmp_path / "out")
    assert result.returncode == 1 and "name another output" in result.stderr
