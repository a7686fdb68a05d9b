"""Training as a product: recipes, data, the Trainer; resuming and sharing give the same run."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.checkpoint import noop_context_fn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from flux_attention import AdapterError, FluxConfig, UnsupportedModelError, attach, shipped
from flux_attention.call import Call
from flux_attention.training import Recipe, RecipeError, RouterTrainer, SparsityObjective, load_data, train
from flux_attention.training import trainer as trainer_module
from flux_attention.training.data import PLAIN, DataError, collate, encode_record, pack
from flux_attention.training.run import check_output, dry_run, load_model
from flux_attention.training.trainer import RoutedTraining, Steps, keep_attention, last_checkpoint, noise_of

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shipped.BACKBONE)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """A tiny model on disk, with a real tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("qwen3", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def record(task="Single QA", index=0, **changes):
    return {
        "context": f"def f{index}(x):\n    return x + {index}\n" * (3 + index % 4),
        "question": f"What does f{index} add?",
        "answer": f"It adds {index}.",
        "metadata": {"task": task, "is_prefix": bool(index % 2)},
        **changes,
    }


@pytest.fixture
def recipe(base, tmp_path):
    """Of a run that takes seconds."""
    path = tmp_path / "data.jsonl"
    records = [record(("Single QA", "Code")[i % 2], i) for i in range(24)] + [{"text": "import os\n" * 20}] * 4
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return Recipe.from_dict(
        dict(
            model=str(base),
            output=str(tmp_path / "run"),
            data=[{"path": str(path)}],
            routers=dict(sink=4, window=12, pool_size=6),
            targets={"Single QA": 0.3, "Code": 0.9, PLAIN: 1.0},
            max_length=192,
            batch_size=2,
            dtype="float32",
            gradient_checkpointing=False,
            objective=dict(multiplier_start=0.5, multiplier_lr=0.01),
            training=dict(max_steps=6, save_steps=2, learning_rate=3e-3),
        )
    )


# --- Recipes ----------------------------------------------------------------------------------------------------------


def test_recipes_round_trip_and_default_to_the_papers(tmp_path):
    recipe = Recipe.from_dict(dict(model="a", output="b", data=[{"path": "c.jsonl"}]))
    recipe.to_yaml(tmp_path / "r.yaml")
    assert Recipe.from_yaml(tmp_path / "r.yaml").resolved == recipe.resolved
    assert "learning_rate: 0.0005" in (tmp_path / "r.yaml").read_text()
    (tmp_path / "r.yaml").write_text("{model: a, output: b, data: [], training: {learning_rate: 5e-4, max_steps: 20}}")
    assert Recipe.from_yaml(tmp_path / "r.yaml").training == {"learning_rate": 5e-4, "max_steps": 20}
    args = recipe.training_arguments
    assert (args["max_steps"], recipe.batch_size, recipe.max_length) == (300, 48, 65_536)
    assert (args["learning_rate"], args["adam_beta1"], args["adam_beta2"], args["weight_decay"]) == (
        5e-4,
        0.9,
        0.95,
        0.1,
    )
    assert (args["warmup_steps"], args["lr_scheduler_type"], args["max_grad_norm"]) == (0.2, "cosine", 5.0)
    assert recipe.objective.multiplier_lr == 1e-3
    assert recipe.targets["MultiHop QA"] == 0.45 and recipe.targets["Code"] == 1.0


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(steps=3), r"unknown keys \['steps'\]"),
        (dict(objective=dict(tau=1)), r"unknown keys \['tau'\] in objective"),
        (dict(objective=dict(temperature_end=0)), "above 0"),
        (dict(objective=dict(multiplier_lr="fast")), "multiplier_lr is 'fast'"),
        (dict(routers=dict(window=0)), "routers: window is 0"),
        (dict(routers=dict(windows=3)), "routers: .*windows"),
        (dict(targets={"Code": 1.5}), "'Code' is 1.5"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(max_length=100, pack_length=99), "pack_length is 99"),
        (dict(data="x.jsonl"), "expected a list of sources"),
        (dict(training=dict(output_dir="x")), "training.output_dir cannot be set"),
        (dict(dtype="int8"), "dtype is 'int8'"),
        (dict(dtype="float16"), "dtype is 'float16'"),
        (dict(objective=dict(temperature_until=0)), "temperature_until must be above 0"),
        (dict(training=dict(num_train_epochs=3)), "training.num_train_epochs cannot be set"),
        (dict(training=dict(save_only_model=True)), "training.save_only_model cannot be set"),
        (dict(training=dict(logging_steps=0.1)), "training.logging_steps is 0.1, expected a whole number"),
        (dict(training=dict(save_steps=0)), "training.save_steps is 0, expected a whole number"),
        (dict(training=dict(save_steps=5, logging_steps=2)), "multiple of logging_steps"),
        (dict(training=dict(max_steps=0)), "max_steps is 0"),
        (dict(model=""), "model is ''"),
        (dict(start=3), "start is 3"),
        (dict(start="x", routers=dict(sink=4)), "routers and start are both there"),
    ],
)
def test_wrong_recipes_are_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict({**dict(model="a", output="b", data=[]), **change})


def test_damaged_recipe_files_name_the_file(tmp_path):
    path = tmp_path / "r.yaml"
    for text, message in (("a: [", "not YAML"), ("- 1", "list, expected keys"), ("model: a", "incomplete")):
        path.write_text(text)
        with pytest.raises(RecipeError, match=f"r.yaml.*{message}"):
            Recipe.from_yaml(path)


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_the_repository_pass_a_dry_run(path):
    counted = dry_run(Recipe.from_yaml(path))
    layers = {"qwen3-4b": 36, "qwen3-8b": 36, "llama-3.1-8b": 32}.get(path.stem)
    if layers:
        assert counted["trained"] / layers == pytest.approx(592e3, rel=0.01)
        billions = {"qwen3-4b": 4.02, "qwen3-8b": 8.19, "llama-3.1-8b": 8.03}[path.stem]
        assert counted["parameters"] / 1e9 == pytest.approx(billions, abs=0.01)
        assert counted["steps"] == 300 and counted["tokens_per_step"] == 48 * 65_536
    assert counted["total"] == counted["weights"] + counted["optimizer"] + counted["activations"]


def test_a_dry_run_counts_the_model_itself_where_it_is_there(recipe):
    counted = dry_run(recipe)
    assert dry_run(Recipe.from_dict({**recipe.to_dict(), "shape": "qwen3-8b"})) == counted
    away = Recipe.from_dict({**recipe.to_dict(), "model": "nobody/nothing", "shape": "qwen3-8b"})
    assert dry_run(away)["parameters"] > 1000 * counted["parameters"]
    with pytest.raises(RecipeError, match="shape is 'gpt'"):
        dry_run(Recipe.from_dict({**recipe.to_dict(), "shape": "gpt"}))


# --- Data -------------------------------------------------------------------------------------------------------------


def test_records_become_prompt_and_labelled_answer(tokenizer):
    example, cut = encode_record(record(index=2), tokenizer, 512, chat_template=False)
    prompt, answer = example.input_ids[: example.labels_from], example.input_ids[example.labels_from :]
    assert not cut and example.prompt_length == example.labels_from
    assert tokenizer.decode(prompt, skip_special_tokens=True).strip().endswith("What does f2 add?")
    assert tokenizer.decode(answer, skip_special_tokens=True) == "It adds 2."
    assert answer[-1] == tokenizer.eos_token_id or tokenizer.eos_token_id is None
    prefix, _ = encode_record(record(index=3), tokenizer, 512, chat_template=False)
    assert tokenizer.decode(prefix.input_ids, skip_special_tokens=True).strip().startswith("What does f3 add?")
    text, _ = encode_record({"text": "import os\n"}, tokenizer, 512, chat_template=False)
    assert (text.labels_from, text.prompt_length, text.task) == (1, len(text.input_ids), PLAIN)


def test_chat_templates_frame_the_prompt(tokenizer):
    import copy

    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant{{ mood }}]"
    example, _ = encode_record(record(index=2), chat, 512, chat_template=True)
    prompt = chat.decode(example.input_ids[: example.labels_from])
    assert prompt.startswith("[user] def f2(x)") and prompt.endswith("What does f2 add?\n[assistant]")
    example, _ = encode_record(record(index=2), chat, 512, True, {"mood": ", calm"})
    assert chat.decode(example.input_ids[: example.labels_from]).endswith("[assistant, calm]")


def test_long_prompts_are_cut_in_the_middle(tokenizer):
    whole, _ = encode_record(record(index=2), tokenizer, 10_000, chat_template=False)
    short, cut = encode_record(record(index=2), tokenizer, 60, chat_template=False)
    answer = len(whole.input_ids) - whole.labels_from
    assert cut and len(short.input_ids) == 60 and short.labels_from == 60 - answer
    half = short.labels_from // 2
    assert np.array_equal(short.input_ids[:half], whole.input_ids[:half])
    assert np.array_equal(short.input_ids[-answer - half :], whole.input_ids[-answer - half :])


def test_long_answers_and_texts_are_reported(tokenizer):
    long = record(answer="It adds 1. " * 200)
    example, cut = encode_record(long, tokenizer, 100, chat_template=False)
    assert cut and len(example.input_ids) == 100 and example.labels_from == 50
    text, cut = encode_record({"text": "import os\n" * 200}, tokenizer, 100, chat_template=False)
    assert cut and len(text.input_ids) == 100


def test_an_end_that_a_tokenizer_adds_does_not_stand_before_the_answer(tokenizer):
    class Ending:
        eos_token_id, bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id

        def __call__(self, text, add_special_tokens=True):
            ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
            return {"input_ids": ids + [self.eos_token_id] * add_special_tokens}

    plain, _ = encode_record(record(), tokenizer, 512, chat_template=False)
    ended, _ = encode_record(record(), Ending(), 512, chat_template=False)
    assert plain.input_ids.tolist() == ended.input_ids.tolist()


def test_malformed_records_are_reported_with_their_lines(recipe, tokenizer, tmp_path):
    bad = [
        ("{", "not JSON"),
        ("[1]", "list, expected an object"),
        (json.dumps({"context": "a", "question": "b"}), "no answer"),
        (json.dumps(record(answer=" ")), "answer is empty"),
        (json.dumps(record(question=3)), "question is int, expected text"),
        (json.dumps(record(metadata=None)), "no metadata"),
        (json.dumps(record(task="Poetry")), "task 'Poetry' has no target"),
        (json.dumps(record(metadata={"task": "Code", "is_prefix": "no"})), "is_prefix is 'no'"),
        (json.dumps({"text": " "}), "text is empty"),
        (json.dumps(record(metadata={"task": ["Code"]})), "task ['Code'] has no target"),
        (json.dumps(record(answer="\ud800")), "answer is not UTF-8 text"),
        ("[" * 100_000, "not JSON"),
        ("1" * 5000, "not JSON"),
    ]
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([json.dumps(record()), "", *(line for line, _ in bad), json.dumps(record(index=1))]))
    recipe.data = [{"path": str(path)}]
    data, report = load_data(recipe, tokenizer)
    assert report.used == 2 and report.tasks == {"Single QA": 2}
    assert [where for where, _ in report.malformed] == [f"{path}, line {line}" for line in range(3, 3 + len(bad))]
    for (_, found), (_, expected) in zip(report.malformed, bad, strict=True):
        assert expected in found
    assert "13 malformed records were left out" in str(report) and "line 3: not JSON" in str(report)
    path.write_text(bad[0][0])
    with pytest.raises(DataError, match=r"no usable record is left(.|\n)*line 1: not JSON"):
        load_data(recipe, tokenizer)


def test_sources_that_cannot_be_read_are_named(recipe, tokenizer, tmp_path):
    for source, error, message in (
        ({"path": str(tmp_path / "none.jsonl")}, DataError, "cannot read .*none.jsonl: No such file"),
        ({"path": str(tmp_path / "none.parquet")}, DataError, "cannot read .*none.parquet"),
        ({"file": "x"}, RecipeError, "neither of"),
        ({"path": "x.jsonl", "lines": 3}, RecipeError, r"unknown keys \['lines'\]"),
        ({"generated": 0, "tasks": {}}, RecipeError, "how many sequences"),
        ({"generated": 5}, RecipeError, "have no target"),
        ({"generated": 5, "tasks": None}, RecipeError, "tasks is None, expected dict"),
        (
            {"generated": 5, "tasks": {"plain": "Code"}, "lengths": ["a"]},
            RecipeError,
            "expected a list of whole numbers",
        ),
        ({"generated": 5, "tasks": {"poems": PLAIN}}, RecipeError, r"unknown families \['poems'\]"),
        ({"generated": 5, "tasks": []}, RecipeError, r"tasks is \[\], expected dict"),
        ({"generated": 5, "tasks": {}}, RecipeError, "of 0 families"),
        (
            {"generated": 5, "tasks": {"multi_key": PLAIN}, "lengths": [256], "max_chars": 10**5},
            ValueError,
            "cannot hold",
        ),
        ({"path": "x.jsonl", "limit": "2"}, RecipeError, "limit is '2'"),
        ({"path": "x.jsonl", "limit": 0}, RecipeError, "limit is 0"),
        ({"path": "x.jsonl", "chat_template": "no"}, RecipeError, "chat_template is 'no'"),
    ):
        recipe.data, recipe.max_length = [source], 512
        with pytest.raises(error, match=message):
            load_data(recipe, tokenizer)
    recipe.data = []
    with pytest.raises(DataError, match="there is no data"):
        load_data(recipe, tokenizer)


def test_parquet_gives_the_same_sequences(recipe, tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    records = [record(("Single QA", "Code")[i % 2], i) for i in range(5)] + [{"text": "import os\n" * 20}]
    columns = dict.fromkeys([*records[0], "text"])  # which every row has
    datasets.Dataset.from_list([{**columns, **one} for one in records]).to_parquet(tmp_path / "d.parquet")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    found = []
    for name in ("d.parquet", "d.jsonl"):
        recipe.data = [{"path": str(tmp_path / name)}]
        data, report = load_data(recipe, tokenizer)
        found.append([(number, e.input_ids.tolist(), e.task) for items in data for number, e in items])
    assert found[0] == found[1] and len(found[0]) == 6


def test_a_dataset_is_read_by_name_and_split(recipe, tokenizer, tmp_path, monkeypatch):
    """A folder as the Hub holds one: configurations in the card, a file for each split."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "questions"
    folder.mkdir()
    files = [("qa", "train", 3), ("qa", "validation", 2), ("code", "train", 4)]
    card = "---\nconfigs:\n"
    for name in ("qa", "code"):
        card += f"- config_name: {name}\n  data_files:\n"
        card += "".join(f"  - {{split: {s}, path: {n}-{s}.jsonl}}\n" for n, s, _ in files if n == name)
    (folder / "README.md").write_text(f"{card}---\n")
    for name, split, count in files:
        lines = [json.dumps(record("Single QA" if name == "qa" else "Code", i)) for i in range(count)]
        (folder / f"{name}-{split}.jsonl").write_text("\n".join(lines))
    for source, tasks in (
        ({"name": "qa"}, {"Single QA": 3}),
        ({"name": "qa", "split": "validation"}, {"Single QA": 2}),
        ({"name": "code", "split": "train[:50%]"}, {"Code": 2}),
    ):
        recipe.data = [{"path": str(folder), **source}]
        data, report = load_data(recipe, tokenizer)
        assert report.tasks == tasks and not report.malformed
    for source, message in (({"name": "poems"}, "poems"), ({"name": "qa", "split": "test"}, "test")):
        recipe.data = [{"path": str(folder), **source}]
        with pytest.raises(DataError, match=f"cannot read .*questions.*{message}"):
            load_data(recipe, tokenizer)


def test_generated_questions_need_no_file(recipe, tokenizer):
    recipe.targets = {"look-up": 0.8, PLAIN: 1.0}
    tasks = {"single_needle": "look-up", "plain": PLAIN}
    recipe.data, recipe.max_length = [{"generated": 8, "lengths": [256, 400], "tasks": tasks, "max_chars": 10**5}], 800
    data, report = load_data(recipe, tokenizer)
    assert report.tasks == {"look-up": 4, PLAIN: 4}
    numbers = sorted(number for items in data for number, _ in items)
    assert numbers == list(range(8))
    recipe.data = recipe.data * 2
    twice, _ = load_data(recipe, tokenizer)
    assert len({example.input_ids.tobytes() for items in twice for _, example in items}) == 16
    recipe.data = recipe.data[:1]
    again, _ = load_data(recipe, tokenizer)
    for one, two in zip(data, again, strict=True):
        assert all(np.array_equal(a.input_ids, b.input_ids) for (_, a), (_, b) in zip(one, two, strict=True))
    recipe.training = {**recipe.training, "seed": 1}
    other, _ = load_data(recipe, tokenizer)
    assert len({example.input_ids.tobytes() for some in (again, other) for items in some for _, example in items}) == 16


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(20, 100), st.integers(0, 5))
def test_packs_hold_every_sequence_once_within_the_budget(lengths, budget, seed):
    packs = pack(lengths, budget, seed)
    assert sorted(index for some in packs for index in some) == list(range(len(lengths)))
    for some in packs:
        assert sum(lengths[index] for index in some) <= budget or len(some) == 1
    assert packs == pack(lengths, budget, seed)


# --- The loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_pack_is_the_plain_formula(recipe, tokenizer):
    """Against each sequence alone, its routes forced to the gates, and the whole vocabulary's logits."""
    model = tiny_model("qwen3", vocab_size=len(tokenizer))
    routing = attach(model, FluxConfig(sink=4, window=12, pool_size=6))
    for router in routing.routers.values():
        router.head[-1].bias.data.zero_()
    objective = SparsityObjective(recipe.targets, initial=0.7)
    data, _ = load_data(recipe, tokenizer)
    batch = collate([data[0], data[1]], objective.classes)
    numbers = batch.pop("numbers").tolist()
    noise = noise_of(0, 3, numbers, 3)
    outputs = RoutedTraining(routing, objective)(**batch, temperature=1.3, noise=noise, progress=1.0)
    gates = outputs["gates_NL"]
    assert 0 < gates.mean() < 1 and torch.equal(gates, (noise[..., 1] > noise[..., 0]).float())
    examples = [example for items in (data[0], data[1]) for _, example in items]
    expected = []
    for example, z, lm_loss in zip(examples, gates, outputs["lm_loss_N"], strict=True):
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        with torch.no_grad(), routing.force(z):
            logits = model(ids, prompt_lengths=[example.prompt_length], use_cache=False).logits[0]
        start = example.labels_from
        nats = F.cross_entropy(logits[start - 1 : -1], ids[0, start:])
        torch.testing.assert_close(lm_loss, nats, atol=1e-5, rtol=1e-5)
        gap = (1 - z.mean()) - recipe.targets[example.task]
        expected.append(nats + 0.7 * gap.abs() + 0.7 * gap.square())
    torch.testing.assert_close(outputs["loss"], torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)


def calls_of(routing):
    """The forward calls that are still in memory."""
    gc.collect()
    return [item for item in gc.get_objects() if issubclass(type(item), Call) and item.routing is routing]


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_checkpointing_keeps_nothing_for_longer_than_needed(recipe, tokenizer, granularity, monkeypatch):
    data, _ = load_data(recipe, tokenizer)
    model = tiny_model("qwen3", vocab_size=len(tokenizer)).train()
    settings = {"use_reentrant": False, "context_fn": keep_attention(torch.device("cpu"))}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    routing = attach(model, FluxConfig(sink=60, window=100, pool_size=6, granularity=granularity))
    begin, calls = routing._begin, []
    monkeypatch.setattr(routing, "_begin", lambda kwargs: calls.append(begin(kwargs)) or calls[-1])
    objective = SparsityObjective(recipe.targets, initial=0.7)
    batch = collate([data[0]], objective.classes)
    noise = noise_of(0, 3, batch.pop("numbers").tolist(), len(routing.units))
    left = []
    for number, layer in enumerate(model.model.layers):  # the layers behind it have been computed again, and are done
        layer.register_full_backward_pre_hook(lambda *_, number=number: left.append((number, set(calls[-1].gates))))
    module = RoutedTraining(routing, objective)
    loss = module(**batch, temperature=2.0, noise=noise, progress=1.0)["loss"]
    loss.backward()
    behind = [{unit for unit in gates if (unit if granularity == "layer" else unit[0]) > n} for n, gates in left]
    assert len(left) == 3 and behind == [set()] * 3 and not calls[-1].gates
    for _ in range(2):  # and nothing at all of a forward that no backward follows
        module(**batch, temperature=2.0, noise=noise, progress=1.0)
    routing.gates = None
    calls.clear()
    assert not calls_of(routing)


def test_checkpointing_keeps_attention_and_gradients(recipe, tokenizer):
    """Attention runs once a branch and layer; all else twice."""
    data, _ = load_data(recipe, tokenizer)
    grads, counts = [], []
    for context in (None, keep_attention(torch.device("cpu")), noop_context_fn):
        torch.manual_seed(0)
        model = tiny_model("qwen3", vocab_size=len(tokenizer)).train()
        if context is not None:
            settings = {"use_reentrant": False, "context_fn": context}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        routing = attach(model, FluxConfig(sink=60, window=100, pool_size=6))
        objective = SparsityObjective(recipe.targets, initial=0.7)
        batch = collate([data[0]], objective.classes)
        noise = noise_of(0, 3, batch.pop("numbers").tolist(), 3)
        module = RoutedTraining(routing, objective)
        for router in routing.routers.values():
            torch.nn.init.normal_(router.head[-1].weight, generator=torch.Generator().manual_seed(1))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            module(**batch, temperature=2.0, noise=noise, progress=1.0)["loss"].backward()
        # Checkpointing looks at each call, which shows as an event too; one that computes makes its output.
        attention = [e for e in profiler.events() if e.name == "aten::_scaled_dot_product_flash_attention_for_cpu"]
        counts.append(sum(any(child.name == "aten::empty" for child in event.cpu_children) for event in attention))
        grads.append([parameter.grad for parameter in routing.routers.parameters()])
        assert not calls_of(routing)  # one that is kept keeps what its attention gave, in every layer
    sequences = len(batch["sequence_lengths"])
    assert counts[:2] == [2 * 3 * sequences] * 2 and counts[2] > counts[1]
    for others in grads[1:]:
        for plain, other in zip(grads[0], others, strict=True):
            torch.testing.assert_close(other, plain, atol=1e-6, rtol=1e-4)


def test_noise_depends_on_seed_step_and_sequence_alone():
    together = noise_of(1, 2, [5, 9], 4)
    assert torch.equal(together, torch.cat([noise_of(1, 2, [5], 4), noise_of(1, 2, [9], 4)]))
    for other in (noise_of(2, 2, [5], 4), noise_of(1, 3, [5], 4), noise_of(1, 2, [6], 4)):
        assert not torch.equal(together[:1], other)


# --- Runs -------------------------------------------------------------------------------------------------------------


def losses(folder):
    rows = json.loads((Path(folder) / "training_log.json").read_text())
    return [(row["step"], row["loss"], row["grad_norm"], row.get("Code/msr")) for row in rows]


def test_a_run_leaves_an_adapter_and_a_frozen_model(recipe, base, capsys):
    recipe.gradient_checkpointing = True
    before = load_file(base / "model.safetensors")
    trainer = train(recipe)
    after = trainer.routing.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    folder = Path(recipe.output)
    assert len(losses(folder)) == 6
    multipliers = trainer.model.objective.multipliers_C2.detach()
    assert (multipliers != 0.5).any(1).all() and (multipliers >= 0).all()
    card = (folder / "README.md").read_text()
    assert f"| base model | {base} (qwen3, 3 layers) |" in card and "| Code | 0.9 |" in card
    assert "<svg" in (folder / "training.svg").read_text()
    trainer.routing.detach()
    fresh = tiny_model("qwen3", vocab_size=before["model.embed_tokens.weight"].shape[0])
    fresh.load_state_dict(before, strict=False)
    loaded = attach(fresh, folder)
    for name, tensor in trainer.routing.routers.state_dict().items():
        assert torch.equal(loaded.routers.state_dict()[name], tensor)
    assert not torch.equal(tensor, torch.tensor([0.0, 4.5]))
    # Begun again with other knobs, it is refused; with the same ones there is nothing left to do.
    recipe.objective.multiplier_lr = 0.02
    with pytest.raises(RecipeError, match="its objective differ"):
        check_output(recipe, folder)


def test_head_level_routers_train_by_the_same_recipe(recipe):
    recipe = Recipe.from_dict({**recipe.to_dict(), "routers": dict(sink=4, window=12, pool_size=6, granularity="head")})
    recipe.training["max_steps"] = 2
    trainer = train(recipe)
    assert trainer.routing.config.granularity == "head" and trainer.routing.gates.shape[1] == 3 * 2
    rows = json.loads((Path(recipe.output) / "training_log.json").read_text())
    assert {key.split("fa_rate_")[1] for row in rows for key in row if key.startswith("Code/fa")} == {
        f"{layer}.{head}" for layer in range(3) for head in range(2)
    }
    assert "6 KV heads" in (Path(recipe.output) / "README.md").read_text()


def test_training_goes_on_from_an_adapter(recipe, tmp_path):
    train(recipe)
    first = Path(recipe.output)
    values = {**recipe.to_dict(), "routers": {}, "start": str(first), "output": str(tmp_path / "second")}
    second = Recipe.from_dict({**values, "training": {**recipe.training, "max_steps": 1, "learning_rate": 0.0}})
    trainer = train(second)
    assert trainer.routing.config.window == 12
    before, after = (load_file(folder / "routers.safetensors") for folder in (first, Path(second.output)))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert dry_run(second)["trained"] == dry_run(recipe)["trained"]
    with pytest.raises(RecipeError, match="made for another model: num_layers is 10, expected 3"):
        dry_run(Recipe.from_dict({**values, "model": "shipped"}))
    train(second)  # which is done: the recipe that lies there is the same one
    with pytest.raises(AdapterError, match=r"has no flux_config\.json"):
        load_model(Recipe.from_dict({**values, "start": str(tmp_path)}))


def test_a_restart_forgets_the_run_before(recipe, tmp_path):
    train(recipe)
    recipe.targets = {**recipe.targets, "Code": 0.1}
    with pytest.raises(RecipeError, match="targets differ"):
        train(recipe)
    recipe.training["max_steps"] = 4
    folder, data = Path(recipe.output), recipe.data
    recipe.data = [{"path": str(tmp_path / "none.jsonl")}]
    with pytest.raises(DataError):  # before anything is lost
        train(recipe, restart=True)
    assert last_checkpoint(folder) is not None and (folder / "routers.safetensors").exists()
    (tmp_path / "bad.jsonl").write_text("{\n" * 12)
    recipe.data = [*data, {"path": str(tmp_path / "bad.jsonl")}]
    train(recipe, restart=True)
    assert len((folder / "malformed.txt").read_text().splitlines()) == 12
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert len(losses(folder)) == 4


def test_what_is_not_of_an_unfinished_run_is_not_deleted(recipe, tmp_path):
    folder = Path(recipe.output)
    folder.mkdir()
    (folder / "README.md").write_text("a project's own")
    for restart in (False, True):
        with pytest.raises(RecipeError, match=r"holds README\.md, but no recipe\.yaml"):
            train(recipe, restart=restart)
    (folder / "README.md").unlink()
    train(recipe)
    for checkpoint in folder.glob("checkpoint-*"):  # to save space
        shutil.rmtree(checkpoint)
    adapter = (folder / "routers.safetensors").read_bytes()
    with pytest.raises(RecipeError, match="no checkpoint to go on from"):
        train(recipe)
    recipe.start = str(folder)
    for restart in (False, True):
        with pytest.raises(RecipeError, match="the adapter that is started from"):
            train(recipe, restart=restart)
    assert (folder / "routers.safetensors").read_bytes() == adapter
    recipe.start = None
    train(recipe, restart=True)
    assert len(losses(folder)) == recipe.training["max_steps"]


def test_a_run_that_is_done_is_not_trained_further(recipe):
    first = train(recipe).routing.routers.state_dict()
    folder = Path(recipe.output)
    before = losses(folder)
    for name in ("README.md", "training_log.json", "routers.safetensors"):
        (folder / name).unlink()  # as if killed before they were written
    second = train(recipe).routing.routers.state_dict()
    assert losses(folder) == before and all(torch.equal(first[name], second[name]) for name in first)
    assert (folder / "README.md").exists() and (folder / "routers.safetensors").exists()


def test_other_data_is_refused(recipe):
    train(recipe)
    path = Path(recipe.data[0]["path"])
    path.write_text(path.read_text().replace("It adds 2.", "It adds two."))
    with pytest.raises(RecipeError, match="the data is not what"):
        train(recipe)


def test_damaged_checkpoints_are_passed_over(recipe, tmp_path):
    train(recipe)
    folder = Path(recipe.output)
    assert last_checkpoint(folder).name == "checkpoint-6"
    for name, content in (("training.safetensors", b"\x10"), ("optimizer.pt", b"PK"), ("trainer_state.json", b"null")):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        (copy / "checkpoint-6" / name).write_bytes(content)
        assert last_checkpoint(copy).name == "checkpoint-4"


def test_a_loss_that_is_not_finite_stops_the_run(recipe, monkeypatch):
    forward = RoutedTraining.forward

    def broken(self, **kwargs):
        outputs = forward(self, **kwargs)
        return {**outputs, "loss": outputs["loss"] * (float("nan") if kwargs["progress"] > 0.4 else 1.0)}

    monkeypatch.setattr(RoutedTraining, "forward", broken)
    with pytest.raises(FloatingPointError, match=r"the loss of step 4 is nan on sequences \["):
        train(recipe)
    assert last_checkpoint(recipe.output).name == "checkpoint-2"
    assert not (Path(recipe.output) / "routers.safetensors").exists()


def test_multipliers_learn_at_a_constant_rate(recipe, tokenizer):
    rates = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append([group["lr"] for group in optimizer.param_groups])

    trainer = RouterTrainer(load_model(recipe), recipe, load_data(recipe, tokenizer)[0], callbacks=[Watch()])
    trainer.train()
    assert [multipliers for _, multipliers in rates] == [0.01] * 6
    assert max(router for router, _ in rates) == pytest.approx(3e-3) and rates[0][0] == 0.0
    assert [group["maximize"] for group in trainer.optimizer.param_groups] == [False, True]


def test_packs_may_be_longer_than_sequences(recipe, tokenizer):
    recipe = Recipe.from_dict({**recipe.to_dict(), "pack_length": 1000})
    data, _ = load_data(recipe, tokenizer)
    sizes = [sum(len(example.input_ids) for _, example in items) for items in data]
    assert max(sizes) > 192 and max(sizes) <= 1000
    assert max(len(example.input_ids) for items in data for _, example in items) <= 192


def test_every_pass_is_shuffled_and_no_step_is_short(recipe, tokenizer):
    data, _ = load_data(recipe, tokenizer)
    steps = Steps(data, 3 * len(data) - 1, seed=0)
    assert len(steps) == 3 * len(data) - 1
    orders = [[[n for n, _ in steps[t * len(data) + i]] for i in range(len(data))] for t in range(2)]
    assert orders[0] != orders[1] and sorted(map(str, orders[0])) == sorted(map(str, orders[1]))
    again = Steps(data, 3 * len(data) - 1, seed=0)
    assert [n for n, _ in again[len(data) + 1]] == orders[1][1]


def test_dropout_is_off_and_the_model_left_as_it_was(recipe, base, monkeypatch):
    config = json.loads((base / "config.json").read_text())
    recipe.config = {"attention_dropout": 0.5}
    recipe.gradient_checkpointing = True
    trainer = train(recipe)
    assert config["attention_dropout"] == 0.0
    model = trainer.routing.model
    assert not model.training and not model.is_gradient_checkpointing and model.config.use_cache
    assert {layer.self_attn.attention_dropout for layer in model.model.layers} == {0.5}


def test_attention_is_kept_for_the_device_that_trains(recipe, monkeypatch):
    asked = []
    monkeypatch.setattr(trainer_module, "keep_attention", lambda device: asked.append(device) or keep_attention(device))
    recipe.gradient_checkpointing = True
    trainer = train(recipe)
    assert asked == [trainer.args.device]


def test_models_that_scale_logits_are_refused(recipe):
    config = AutoConfig.for_model("granite", **SMALL, logits_scaling=3.0)
    with pytest.raises(UnsupportedModelError, match="scales or caps its logits"):
        RoutedTraining(attach(AutoModelForCausalLM.from_config(config)), SparsityObjective({"a": 0.5}))


def test_prompts_beyond_the_models_positions_are_refused(recipe):
    recipe.max_length = 100_000
    with pytest.raises(RecipeError, match="has 512 positions"):
        train(recipe)


def command(recipe, tmp_path, processes=1, program=("-m", "flux_attention.cli")):
    recipe.to_yaml(tmp_path / "recipe.yaml")
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*start, *program, "--debug", "train", str(tmp_path / "recipe.yaml")]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def test_a_killed_run_goes_on_to_the_same_end(recipe, tmp_path):
    """Killed hard after a checkpoint, with the next one left half-written."""
    recipe.training["save_total_limit"] = 10  # it may get further before it is killed
    whole = tmp_path / "whole"
    recipe.output, killed = str(whole), tmp_path / "killed"
    train(recipe)
    recipe.output = str(killed)
    run = subprocess.Popen(
        command(recipe, tmp_path), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    for _ in range(600):
        if last_checkpoint(killed) is not None:
            break
        assert run.poll() is None, run.stdout.read().decode()
        time.sleep(0.1)
    run.send_signal(signal.SIGKILL)
    run.wait()
    for later in (4, 6):
        shutil.rmtree(killed / f"checkpoint-{later}", ignore_errors=True)
    for result in ("training_log.json", "routers.safetensors"):
        (killed / result).unlink(missing_ok=True)
    (killed / "checkpoint-4").mkdir()
    (killed / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4, "epo')
    assert last_checkpoint(killed) == killed / "checkpoint-2"
    done = subprocess.run(command(recipe, tmp_path), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on from {killed / 'checkpoint-2'}" in done.stdout
    assert losses(killed) == losses(whole)
    first, second = (load_file(folder / "routers.safetensors") for folder in (whole, killed))
    assert all(torch.equal(first[name], second[name]) for name in first)


#: What shards the model of ``recipe``.
FSDP = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"],
    },
}


@pytest.mark.parametrize("sharding", [{}, FSDP], ids=["ddp", "fsdp"])
def test_two_processes_give_the_same_run_as_one(recipe, tmp_path, sharding):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    recipe.output = str(alone)
    train(recipe)
    recipe.output, recipe.training = str(shared), {**recipe.training, **sharding}
    program = ("-m", "flux_attention.cli") if not sharding else (str(Path(__file__).parent / "fsdp_on_cpu.py"),)

    def run():
        both = command(recipe, tmp_path, 2, program)
        done = subprocess.run(both, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run()
    if sharding:  # which names what it saves; a run that was stopped goes on to the same end
        saved = torch.load(shared / "checkpoint-4/optimizer.pt", weights_only=True)
        assert {name.split(".")[0] for name in saved["state"]} == {"routers", "objective"}
        before = load_file(shared / "routers.safetensors")
        shutil.rmtree(shared / "checkpoint-6")
        (shared / "routers.safetensors").unlink()
        assert f"going on from {shared / 'checkpoint-4'}" in run()
        after = load_file(shared / "routers.safetensors")
        assert all(torch.equal(before[name], after[name]) for name in before)
    same_losses(alone, shared, 1e-4)
    first, second = (load_file(folder / "routers.safetensors") for folder in (alone, shared))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=1e-3)


def same_losses(alone, shared, tolerance):
    for one, two in zip(losses(alone), losses(shared), strict=True):
        assert one[0] == two[0] and one[1:3] == pytest.approx(two[1:3], abs=tolerance)
        assert one[3] == pytest.approx(two[3], abs=1e-6) if one[3] is not None else two[3] is None


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sharding", [{}, FSDP], ids=["ddp", "fsdp"])
def test_two_gpus_give_the_same_run_as_one(recipe, tmp_path, sharding):
    folders = [tmp_path / "alone", tmp_path / "shared"]
    for processes, folder in enumerate(folders, 1):
        recipe.output = str(folder)
        if processes == 2:
            recipe.training = {**recipe.training, **sharding}
        devices = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(processes)))}
        run = command(recipe, tmp_path, processes)
        done = subprocess.run(run, env={**environment(), **devices}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    same_losses(*folders, 2e-3)


def test_too_few_packs_are_refused(recipe):
    recipe.batch_size = 100
    with pytest.raises(RecipeError, match="batch_size is 100, but the data makes"):
        train(recipe)
