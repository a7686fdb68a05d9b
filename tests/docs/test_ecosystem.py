"""Each example of docs/ecosystem.md runs, with the shipped model in place of the reader's."""

import re
from functools import partial

import pytest
import torch
from helpers.examples import as_a_reader, sections
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from flux_attention import attach
from flux_attention.names import BACKBONE

SECTIONS = sections("docs/ecosystem.md")
#: Those that want more, or that are tested elsewhere.
TESTED = {"A chat template", "A chat pipeline", "Streaming", "A batch", "accelerate", "PEFT", "torchao", "bitsandbytes"}
TESTED |= {"lm-eval", "The Hub", "vLLM"}  # the last one where vLLM is: tests/serving/test_vllm_example.py


@pytest.fixture
def run(short_adapter, tmp_path, monkeypatch):
    """Run a section behind the page's first block, and return its names."""
    monkeypatch.chdir(tmp_path)
    swap = as_a_reader(tmp_path, short_adapter)

    def run(name, old="", new=""):
        names = {}
        assert old in "".join(SECTIONS[name])
        for title in ("", name):
            for code in SECTIONS[title]:
                code = swap(code.replace(old, new) if old else code)
                exec(compile(code, f"docs/ecosystem.md, {title}", "exec"), names)
        return names

    return run


def test_every_example_is_tested():
    assert {title for title, codes in SECTIONS.items() if codes and title} == TESTED


def test_a_chat_template(run, capsys):
    names = run("A chat template")
    prompt = names["tokenizer"].decode(names["inputs"]["input_ids"][0])
    assert prompt.startswith("<|bos|>user: ") and prompt.endswith("What is this text about?\nassistant:")
    assert re.search(r"[█░]{10}.*\n.*layers sparse", capsys.readouterr().out)
    assert names["routing"].routes.lengths == (names["inputs"]["input_ids"].shape[1],)


def test_a_chat_pipeline(run):
    names = run("A chat pipeline")
    roles = [message["role"] for message in names["answer"][0]["generated_text"]]
    assert roles == ["user", "assistant"]
    assert names["routing"].report().new_tokens == 64


def test_streaming(run, capsys):
    names = run("Streaming")
    model, inputs, tokenizer = names["model"], names["inputs"], names["tokenizer"]
    whole = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(whole) in capsys.readouterr().out


def test_a_batch(run):
    names = run("A batch")
    together = names["routing"].routes
    assert together.routes_BL.shape == (2, 10) and together.lengths[0] > together.lengths[1]
    for row, text in enumerate((names["text"], names["text"][:500] + "\nWhat is this text about?")):
        names["model"].generate(**names["tokenizer"](text, return_tensors="pt"), max_new_tokens=2)
        assert torch.equal(names["routing"].routes.routes_BL[0], together.routes_BL[row])


def on_disk(layers):
    """A device map with these layers offloaded to disk."""
    others = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return others | {f"model.layers.{layer}": "disk" if layer in layers else "cpu" for layer in range(10)}


def test_accelerate_with_layers_on_disk(run):
    device_map = 'device_map="auto", offload_folder'
    names = run("accelerate", device_map, device_map.replace('"auto"', str(on_disk(range(5, 10)))))
    assert names["model"].model.layers[7].mlp.up_proj.weight.is_meta
    assert not any(weight.is_meta for weight in names["routing"].routers.parameters())
    found = names["routing"].routes
    model = AutoModelForCausalLM.from_pretrained(BACKBONE)
    routing = attach(model, names["ADAPTER"])
    model.generate(**names["inputs"], max_new_tokens=2)
    torch.testing.assert_close(routing.routes.logits_BL2, found.logits_BL2)


def test_peft(run, tmp_path):
    peft = pytest.importorskip("peft")

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(BACKBONE)
    lora = peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "path-of-lora")
    names = run("PEFT")
    without = names["routing"].routes.logits_BL2
    names["tuned"].generate(**names["inputs"], max_new_tokens=1)
    assert not torch.allclose(names["routing"].routes.logits_BL2, without, atol=1e-2)


@pytest.mark.parametrize("package", ["torchao", "bitsandbytes"])
def test_quantised(run, package):
    pytest.importorskip(package)
    names = run(package)
    weight = names["model"].model.layers[3].mlp.up_proj.weight
    assert type(weight).__module__.startswith(package)
    assert names["routing"].routes.logits_BL2.isfinite().all()


def test_lm_eval(run, tasks):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval, "simple_evaluate", partial(lm_eval.simple_evaluate, task_manager=manager))
        names = run("lm-eval", "hellaswag", "flux_choice")
    assert 0 <= names["results"]["results"]["flux_choice"]["acc,none"] <= 1
    assert 0 < names["lm"].get_model_info()["flux_attention"]["mean_msr"] <= 1


def test_the_hub(run, hub, monkeypatch):
    def place(name):
        return hub.root / name / "main/README.md"

    load = ModelCard.load
    monkeypatch.setattr(ModelCard, "load", lambda name: load(place(name)))
    monkeypatch.setattr(ModelCard, "push_to_hub", lambda card, name: card.save(place(name)))
    names = run("The Hub")
    card = load(place("me/routers"))
    assert card.data.license == "apache-2.0" and 'attach(model, "me/routers"' in card.text
    names["routing"].detach()
    again = attach(names["model"], "me/routers")
    assert torch.equal(*(each.routers["3"].head[0].weight for each in (again, names["routing"])))
