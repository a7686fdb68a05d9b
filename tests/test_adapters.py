"""Adapters: what is saved comes back, and damage of every kind is named."""

import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers.models import CONFIG, TRIANGLE, ids, randomize, tiny_model
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import PushToHubMixin

from flux_attention import AdapterError, FluxConfig, adapters, attach
from flux_attention.adapters import load_config
from flux_attention.names import BACKBONE, RANKINGS, ROUTERS, known_rankings
from flux_attention.sizes import SHAPES


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "flux_config.json", "routers.safetensors"]


@torch.no_grad()
def test_an_adapter_of_version_0_1_0_still_gives_its_routes():
    """Files, and routes of eight prompts, as that version wrote them."""
    model = tiny_model("qwen3")
    routing = attach(model, Path(__file__).parent / "fixtures" / "adapter_0.1.0")
    assert routing.config.sparse == {"pattern": "streaming", "sink": 4, "window": 9}
    assert (routing.config.pool_size, routing.config.granularity) == (6, "layer")
    model(ids(8, 40))
    found = ["".join("sF"[int(bit)] for bit in row) for row in routing.routes.routes_BL]
    assert found == ["FFs", "sss", "sFs", "ssF", "FFF", "FsF", "FFs", "sFs"]


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
    "no directory": (shutil.rmtree, "no such folder .*adapter; .*expected flux_config.json there, and routers"),
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
        r"unknown keys \['x'\] in FluxConfig",
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
    with pytest.raises(AdapterError, match="is a file, expected a folder"):
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


@pytest.mark.parametrize(
    "name", ["./me/routers", "/me", "~/routers", "..", "runs/me/last", "me/routers/", Path("me/r")]
)
def test_what_can_only_be_a_path_is_not_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with mock.patch("flux_attention.adapters.snapshot_download", side_effect=AssertionError("the Hub was asked")):
        with pytest.raises(AdapterError, match=r"no such folder|has no flux_config.json"):
            adapters.load_config(name)
        (tmp_path / "home" / "routers").mkdir(parents=True)
        assert adapters.resolve("~/routers") == tmp_path / "home" / "routers"


@pytest.mark.parametrize("name", ["routers", "me/routers", "me/routers-v1.2"])
def test_what_can_be_an_id_is_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = mock.Mock(return_value="offline")
    monkeypatch.setattr(adapters, "unreachable", asked)
    with pytest.raises(AdapterError, match=r"neither a directory nor a Hub repository that can be .*\(offline\)"):
        adapters.resolve(name, "v2")
    assert asked.call_args.args == (name, adapters.CONFIG_FILE, "v2")


def test_the_card_says_what_the_adapter_is_and_how_to_use_it(saved):
    _, config = adapters.load_config(saved)
    for changes, name, metadata, words in (
        (
            {},
            "org/model",
            "org/model",
            ("of 3 layers", "streaming, sink 4, window 9 |", "from_pretrained('org/model')"),
        ),
        ({"granularity": "head"}, "org/model", "org/model", ("# Head routers for org/model", "each of 6 KV heads")),
        (
            dict(sparse=TRIANGLE.sparse),
            "/data/model",
            None,
            ("triangle, sink 4, window 9, last_n 5 |", "('/data/model')"),
        ),
        ({}, str(saved), None, ("first and the last 6 tokens",)),
        ({}, "flux-attention/shipped", "flux-attention/shipped", ("shipped import BACKBONE\n", "(BACKBONE)")),
    ):
        card = adapters.card(replace(config, **changes, base_model=replace(config.base_model, name=name)))
        assert card.data.base_model == metadata and card.data.library_name == "flux-attention"
        assert "sparse-attention" in card.data.tags
        for each in words:
            assert each in card.text
    name = repr(config.base_model.name)
    assert f"from_pretrained({name}, rope_theta=1)" in adapters.card(config, {"rope_theta": 1}).text


def test_the_cards_python_runs(saved, tmp_path, monkeypatch):
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path / "base")
    _, config = adapters.load_config(saved)
    text = adapters.card(replace(config, base_model=replace(config.base_model, name=str(tmp_path / "base")))).text
    code = text.split("```python\n")[1].split("```")[0].replace(adapters.PLACE, str(saved))
    found = {}
    exec(code, found)
    assert found["routing"].config.sparse["window"] == 9


def test_a_card_that_is_there_stays(saved):
    routing = attach(tiny_model("qwen3"), saved)
    assert "# Layer routers for" in ModelCard.load(saved / "README.md").text
    (saved / "README.md").write_text("by hand")
    routing.save_pretrained(saved)
    assert (saved / "README.md").read_text() == "by hand"


def test_what_was_pushed_can_be_attached(saved, hub):
    routing = attach(tiny_model("qwen3"), saved)
    assert routing.push_to_hub("routers", token="secret", private=True) == "https://hub/me/routers/commit/main"
    assert hub.said == {
        "token": "secret",
        "private": True,
        "message": "Upload layer routers",
        "commit_description": None,
        "create_pr": False,
    }
    routing.detach()
    again = attach(routing.model, "me/routers")
    for name, weight in again.routers.state_dict().items():
        assert torch.equal(weight, routing.routers.state_dict()[name])
    assert "# Layer routers for" in (hub.root / "me/routers/main/README.md").read_text()


def test_a_push_keeps_the_card_on_the_hub_and_makes_its_branch(saved, hub):
    routing = attach(tiny_model("qwen3"), saved)
    routing.push_to_hub("me/routers")
    (hub.root / "me/routers/main/README.md").write_text("by hand")
    (hub.root / "me/routers/main/routers.safetensors").unlink()
    routing.push_to_hub("me/routers")
    assert (hub.root / "me/routers/main/README.md").read_text() == "by hand"
    assert (hub.root / "me/routers/main/routers.safetensors").exists()
    assert routing.push_to_hub("me/routers", revision="v2", commit_message="v2", create_pr=True).endswith("/v2")
    assert {path.name for path in (hub.root / "me/routers/v2").iterdir()} == {path.name for path in saved.iterdir()}
    assert (hub.said["message"], hub.said["create_pr"]) == ("v2", True)


def test_a_push_brings_the_card_of_the_folder_with_what_it_shows(saved, hub):
    shown = "![Training](training.svg) [recipe](recipe.yaml) [none](no.svg)"
    text = f"# Trained\n{shown}\nattach(model, '{adapters.PLACE}')\n"
    (saved / "README.md").write_text(text)
    (saved / "training.svg").write_text("<svg/>")
    (saved / "checkpoint-20").mkdir()
    (saved / "optimizer.pt").write_text("not shown")
    routing = attach(tiny_model("qwen3"), saved)
    routing.push_to_hub("me/trained")
    pushed = hub.root / "me/trained/main"
    assert (pushed / "README.md").read_text() == text.replace(adapters.PLACE, "me/trained")
    assert {path.name for path in pushed.iterdir()} == {
        "README.md",
        "flux_config.json",
        "routers.safetensors",
        "training.svg",
    }
    randomize(routing)  # other routers than that card is of
    routing.push_to_hub("me/changed")
    assert "# Layer routers for" in (hub.root / "me/changed/main/README.md").read_text()


def test_a_pushed_card_is_complete(saved, hub):
    """What the Hub reads, and what a stranger needs: how to load it from there, and what it cannot do."""
    _, config = adapters.load_config(saved)
    routing = randomize(attach(tiny_model("qwen3"), saved))  # others than the folder's, whose card is not theirs
    routing.config = replace(config, base_model=replace(config.base_model, name="org/model"))
    routing.push_to_hub("me/routers")
    card = ModelCard.load(hub.root / "me/routers/main/README.md")
    assert (card.data.base_model, card.data.pipeline_tag) == ("org/model", "text-generation")
    assert {"adapter", "kv-cache"} <= set(card.data.tags)
    for words in (
        'attach(model, "me/routers")',
        "FLUX_ATTENTION_ROUTERS=me/routers vllm serve org/model",
        "flux-attention eval org/model --routers me/routers",
        "Prompts of up to 13 tokens",
        "Licence",
        'decide="ends"',
    ):
        assert words in card.text


def test_push_takes_what_transformers_takes():
    theirs = inspect.signature(PushToHubMixin.push_to_hub).parameters
    ours = inspect.signature(adapters.AdapterMixin.push_to_hub).parameters
    assert set(ours) == set(theirs) - {"max_shard_size", "tags"}  # of models, and of a card that is made elsewhere
    assert all(ours[name].kind == theirs[name].kind for name in ours)


def test_the_adapter_that_comes_along_has_a_name():
    routing = attach(AutoModelForCausalLM.from_pretrained(BACKBONE), "shipped")
    assert routing.config.sparse == adapters.load_config(ROUTERS)[1].sparse
    assert adapters.resolve("shipped") == ROUTERS


@pytest.mark.parametrize("name", known_rankings())
def test_rankings_that_come_along_fit_the_models_that_they_are_called_after(name, monkeypatch):
    sizes = next(sizes for shape, sizes in SHAPES.items() if name.lower().startswith(shape))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**sizes, "intermediate_size": 8}))
    with pytest.raises(AdapterError, match="its shape fits, but its embedding weights are others"):
        attach(model, name)
    monkeypatch.setattr("flux_attention.hf.support._sample", lambda model: load_config(name)[1].base_model.sample)
    routing = attach(model, name, budget=0.5)
    assert len(routing.config.full_layers) == len(routing.layers) / 2


def test_a_model_in_a_folder_of_that_name_is_no_adapter(tmp_path, monkeypatch):
    name = known_rankings()[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert load_config(name)[0].parent == RANKINGS
    (tmp_path / name / "flux_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="missing keys"):
        load_config(name)
