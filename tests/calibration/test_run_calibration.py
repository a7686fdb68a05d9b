"""A whole calibration: its adapter, its files, the command line, and what is refused."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.command import flux
from helpers.models import ids, tiny_model
from transformers import AutoModelForCausalLM

from flux_attention import AdapterError, CalibrationError, FluxConfig, attach, calibrate
from flux_attention.calibration import calibrator, run
from flux_attention.calibration.calibrator import Calibrator
from flux_attention.calibration.samples import generated_samples, given_samples, text_samples
from flux_attention.patterns import BlockSparse
from flux_attention.tasks.questions import Question

SIZES = dict(sink=8, window=24)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def f{i}(x):\n    return x * {i * i}\n\n" for i in range(200)))
    return path


@pytest.fixture(scope="module")
def calibrated(base, text, tmp_path_factory):
    """A folder that the command filled, and what it printed."""
    folder = tmp_path_factory.mktemp("calibrated") / "adapter"
    options = ["--length", "256", "--samples", "2", "--judged", "2", "--sink", "8", "--window", "24"]
    result = flux("calibrate", base, "--output", folder, "--text", text, *options)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout, options


def test_the_command_writes_an_adapter_and_says_what_it_found(calibrated, base, text):
    folder, said, options = calibrated
    config = FluxConfig.from_json(folder / "flux_config.json")
    assert sorted(config.ranking) == list(config.base_model.routed_layers) and 0 <= config.budget <= 1
    assert not (folder / "routers.safetensors").exists()
    full = len(config.full_layers)
    assert f"default budget {config.budget:.3g}: {full} of {len(config.ranking)} layers full" in said
    assert "<svg" in (folder / "calibration.svg").read_text()
    card = (folder / "README.md").read_text()
    assert "## What calibration measured" in card and "| task class | layers sparse |" in card
    assert "same" in card and "budget" in card
    again = flux("calibrate", base, "--output", folder, "--text", text, *options, "--json")
    found = json.loads(again.stdout)
    assert tuple(found["ranking"]) == config.ranking and found["budget"] == config.budget
    assert {point["sparsity"] for point in found["budgets"]} >= {0.0, 1.0}


def test_a_threshold_is_chosen_for_block_sparse_full_layers(calibrated, base, text, tmp_path, monkeypatch):
    """After a calibration without it, whose figures are there."""
    before, _, options = calibrated
    folder, judge = tmp_path / "adapter", Calibrator._judged
    shutil.copytree(before, folder)

    def judged(self, family, full, layers, asks, watched=None):
        assert watched or self._find(phase="judge", task=family, full_layers=full), "measured again"
        row = judge(self, family, full, layers, asks, watched)
        # A tiny model's prompts have one block: let few blocks cost something.
        return row if watched is None else {**row, "nats": row["nats"] + 10 * (watched.threshold > 0.05)}

    monkeypatch.setattr(Calibrator, "_judged", judged)
    command = ["calibrate", base, "--output", folder, "--text", text, *options, "--full", "block_sparse"]
    result = flux(*command)
    assert result.returncode == 0, result.stderr
    config, exact = (FluxConfig.from_json(each / "flux_config.json") for each in (folder, before))
    assert config == replace(exact, full={"pattern": "block_sparse", "threshold": 0.05})
    assert (
        "full layers are block-sparse, threshold 0.05: 100% of the blocks at 256 tokens; GPUs select in prompts of"
        " 16,384 tokens and more: judge it at such a --length" in result.stdout
    )
    assert "| full attention, in the prompt | block_sparse, threshold 0.05 |" in (folder / "README.md").read_text()
    found = json.loads(flux(*command, "--json").stdout)
    assert [point["threshold"] for point in found["thresholds"]] == [0.2, 0.1, 0.05, 0.025, 0.015, 0.01]
    assert found["full"] == config.full
    routing = attach(AutoModelForCausalLM.from_pretrained(base), folder)
    assert routing.full == BlockSparse(0.05)
    refused = flux(*command[:-1], "blocks")
    assert refused.returncode == 1 and "pattern is 'blocks', expected one of ['full', 'block_sparse']" in refused.stderr


def test_full_layers_stay_exact_where_every_threshold_loses(base, tokenizer, text, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(base)
    options = dict(texts=[text.read_text()], length=256, samples=1, judged=1, rounds=1)
    blocks = FluxConfig(**SIZES, full={"pattern": "block_sparse", "select": "mass", "stride": 8})
    chosen = calibrate(model, tokenizer, config=blocks, **options, tolerance=9)
    assert chosen.full == {"pattern": "block_sparse", "select": "mass", "stride": 8, "threshold": 0.8}
    monkeypatch.setattr(run, "choose_threshold", lambda *arguments: None)
    assert calibrate(model, tokenizer, config=blocks, **options).full == {"pattern": "full"}
    given = replace(blocks, full={"pattern": "block_sparse", "threshold": 0.5})
    assert calibrate(model, tokenizer, config=given, **options).full == given.full


def test_the_adapter_runs_the_same_layers_for_every_input(calibrated, base):
    folder, _, _ = calibrated
    model = AutoModelForCausalLM.from_pretrained(base)
    prompt = ids(2, 80)
    routing = attach(model, folder, budget=0.34)
    ranking = routing.config.ranking
    with torch.no_grad():
        logits = model(prompt).logits
        assert routing.routes.to_dict()["sequences"][0]["full_layers"] == sorted(ranking[:2])
        with routing.force(sorted(ranking[:2])):
            assert torch.equal(model(prompt).logits, logits)
        routing.budget = 1.0
        sparse = model(prompt).logits
        assert not routing.routes.routes_BL.any() and not torch.allclose(sparse, logits)
        routing.min_tokens = 81
        model(prompt)
        assert routing.routes.routes_BL.all()
    with pytest.raises(ValueError, match=r"budget is 1\.5, expected a share of sparse layers"):
        routing.budget = 1.5
    assert routing.budget == 1.0


def test_chunks_are_allowed_and_training_is_not(calibrated, base):
    model = AutoModelForCausalLM.from_pretrained(base)
    routing = attach(model, calibrated[0], budget=0.67)
    arguments = dict(attention_mask=torch.ones(1, 80, dtype=torch.long), max_new_tokens=4, do_sample=False)
    whole = model.generate(ids(1, 80), **arguments)
    assert torch.equal(model.generate(ids(1, 80), prefill_chunk_size=32, **arguments), whole)
    with pytest.raises(ValueError, match="fixed set of layers and has no routers to train"), routing.soft(1.0):
        pass


def test_a_budget_is_kept_by_saving(calibrated, base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    attach(model, calibrated[0], budget=0.67).save_pretrained(tmp_path)
    config = FluxConfig.from_json(tmp_path / "flux_config.json")
    assert config.budget == 0.67 and config.ranking == FluxConfig.from_json(calibrated[0] / "flux_config.json").ranking


def test_saving_a_ranking_over_routers_leaves_no_routers(calibrated, base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    routing = attach(model)
    routing.save_pretrained(tmp_path)
    routing.detach()
    attach(model, calibrated[0]).save_pretrained(tmp_path)
    assert not (tmp_path / "routers.safetensors").exists()


def test_other_models_and_damaged_rankings_are_refused(calibrated, base, tmp_path):
    other = tiny_model("llama")
    with pytest.raises(AdapterError, match=r"the ranking of layers in .* was made for .*model_type is 'llama'"):
        attach(other, calibrated[0])
    config = FluxConfig.from_json(calibrated[0] / "flux_config.json")
    with pytest.raises(AdapterError, match="ranking of layers in here was made for"):
        attach(other, config)
    values = config.to_dict()
    model = AutoModelForCausalLM.from_pretrained(base)
    for change, message in (
        ({"ranking": [0, 1]}, r"the ranking in .* is \[0, 1\], expected each routed layer"),
        ({"ranking": [0, 0, 1]}, "expected each routed layer once"),
        ({"budget": None}, "a ranking needs a budget"),
        ({"budget": 2}, "budget is 2, expected a share"),
        ({"decide": "ends"}, "a ranking is of layers and has no routers"),
    ):
        (tmp_path / "flux_config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(AdapterError, match=message):
            attach(model, tmp_path)
    assert not hasattr(model.get_decoder(), "flux_routing")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--length", "256"], "samples of 256 tokens are too short: sparse layers keep 1152"),
        (["--length", "64K"], "do not fit into the model's 512 positions"),
        (["--families", "poems", "--length", "256"], "unknown families ['poems']"),
        (["--families", "prose", "--text", "{text}", "--length", "4K"], "give one of them"),
        (["--records", "x", "--length", "4K"], "of --records all are used"),
        (["--text", "{text}", "--tolerance", "-1"], "tolerance"),
        (["--length", "2K,4K"], "length is '2K,4K', expected one number"),
        (["--sink", "8", "--window", "24", "--length", "256", "--families", "place"], "answers none of the families"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(base, text, tmp_path, options, message):
    options = [option.format(text=text) for option in options]
    result = flux("calibrate", base, "--output", tmp_path / "out", *options, "--judged", "1", "--samples", "1")
    assert result.returncode in (1, 2) and message in " ".join(result.stderr.split())


def test_the_command_reads_records(base, tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(json.dumps(dict(context="words " * 90, question="Which?", answer="a b")) for _ in "ab"))
    options = ["--length", "256", "--sink", "8", "--window", "24"]
    result = flux("calibrate", base, "--output", tmp_path / "out", "--records", path, *options)
    assert result.returncode == 1 and "answers none of the families well enough" in result.stderr  # by chance alone
    assert "records 0.00" in result.stderr


def test_the_model_is_left_as_it_was_when_calibration_fails(base, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(CalibrationError, match="answers none"):
        calibrate(model, tokenizer, config=FluxConfig(**SIZES), families=["place"], length=256, samples=1, judged=1)
    assert not hasattr(model.get_decoder(), "flux_routing")


def question(index, family="mine", context="some words " * 20):
    return Question(context + str(index), "What number?", str(index), (str(index),), family, "match", family)


def test_layers_are_ranked_by_what_the_model_itself_answers(base, tokenizer, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(base)
    config = FluxConfig(sink=2, window=8)
    made = given_samples(tokenizer, [question(index) for index in range(4)], config, 256)
    prose = text_samples(tokenizer, ["some words " * 200], 64, 1, 1)
    made = replace(made, ranked=[*prose.ranked, *made.ranked])
    ranked = Calibrator(attach(model, config), tokenizer, made, batch_size=2, folder=tmp_path).ranked
    assert ranked[0] is prose.ranked[0]  # of text there is nothing but itself
    stock = AutoModelForCausalLM.from_pretrained(base)
    for sample, asked in zip(ranked[1:], made.ranked[1:], strict=True):
        assert sample.prompt_ids.tolist() == asked.prompt_ids.tolist()
        (start, end), tokens = sample.answers[0], torch.from_numpy(sample.input_ids.astype(np.int64))[None]
        assert end == len(sample.input_ids) > start
        with torch.no_grad():
            logits = stock(tokens).logits[0, start - 1 : end - 1]
        chosen = logits.gather(1, tokens[0, start:end, None])[:, 0]
        torch.testing.assert_close(chosen, logits.max(1).values, atol=1e-4, rtol=0)  # greedily, but for ties

    def never(*arguments, **options):
        raise AssertionError("answers are kept with the other figures")

    monkeypatch.setattr(calibrator, "generate_answers", never)
    model = AutoModelForCausalLM.from_pretrained(base)
    again = Calibrator(attach(model, config), tokenizer, made, batch_size=1, folder=tmp_path).ranked
    assert [sample.input_ids.tolist() for sample in again] == [sample.input_ids.tolist() for sample in ranked]


def test_records_are_halved_between_ranking_and_judging(tokenizer):
    config = FluxConfig(sink=2, window=8)
    made = given_samples(tokenizer, [question(index, "ab"[index % 2]) for index in range(10)], config, 256)
    assert [sample.question.answer for sample in made.ranked] == ["0", "4", "8", "1", "5", "9"]
    assert {family: [s.question.answer for s in some] for family, some in made.judged.items()} == {
        "a": ["2", "6"],
        "b": ["3", "7"],
    }
    with pytest.raises(CalibrationError, match=r"\['b'\] have fewer than two records"):
        given_samples(tokenizer, [question(0), question(1), question(2, "b")], config, 256)
    with pytest.raises(CalibrationError, match=r"record 2 has .* tokens, expected at most 256"):
        given_samples(tokenizer, [question(0), question(1, context="word " * 400)], config, 256)
    with pytest.raises(CalibrationError, match="there is no record"):
        given_samples(tokenizer, [], config, 256)


def test_records_that_sparse_layers_see_whole_do_not_count(tokenizer):
    """By them nothing would be lost at any budget."""
    short = [question(index, context="a few words ") for index in range(4)]
    long = [question(index) for index in range(4)]
    config = FluxConfig(sink=2, window=16)
    made = given_samples(tokenizer, short + long, config, 256)
    assert made.settings["left_out"] == 4 and len(made.ranked) == 2 and len(made.judged["mine"]) == 2
    with pytest.raises(CalibrationError, match=r"fewer than two records with prompts of more than 36 tokens"):
        given_samples(tokenizer, short, config, 256)


def test_texts_are_halved_between_ranking_and_judging(tokenizer):
    lines = [f"line {index} of the text\n" for index in range(400)]
    made = text_samples(tokenizer, ["".join(lines)], 256, 8, 8)
    first = tokenizer.decode(np.concatenate([sample.input_ids for sample in made.ranked]))
    second = tokenizer.decode(np.concatenate([sample.input_ids for sample in made.judged["text"]]))
    numbers = [{int(number) for number in re.findall(r"line (\d+) of", text)} for text in (first, second)]
    assert numbers[0] and numbers[1] and max(numbers[0]) < min(numbers[1])


def test_a_text_of_one_line_will_do(tokenizer):
    made = text_samples(tokenizer, ["word " * 2000], 256, 2, 2)
    assert [len(sample.input_ids) for sample in (*made.ranked, *made.judged["text"])] == [256] * 4
    with pytest.raises(CalibrationError, match=r"half of the text has \d+ tokens, fewer than a sample's 4000"):
        text_samples(tokenizer, ["word " * 2000], 4000, 2, 2)


def test_numbers_that_cannot_be_are_refused(base, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(base)
    for change in ({"samples": 0}, {"judged": 0}, {"batch_size": 0}, {"tolerance": float("nan")}, {"tolerance": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(change))} is "):
            calibrate(model, tokenizer, texts=["x"], config=FluxConfig(**SIZES), length=256, **change)


def test_no_tolerance_at_all_is_possible(base, tokenizer, text, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    options = dict(texts=[text.read_text()], config=FluxConfig(**SIZES), length=256, samples=1, judged=1)
    config = calibrate(model, tokenizer, tmp_path, **options, tolerance=0)
    assert (tmp_path / "calibration.svg").exists()
    for name, content in (("routers.safetensors", "x"), ("recipe.yaml", "x")):
        (tmp_path / name).write_text(content)
        with pytest.raises(CalibrationError, match=f"holds {name}, which calibration did not write"):
            calibrate(model, tokenizer, tmp_path, **options, tolerance=0)
        (tmp_path / name).unlink()
    (tmp_path / "calibration.json").write_text("[]")
    with pytest.raises(ValueError, match=r"is damaged \(it has no meta and rows\)"):
        calibrate(model, tokenizer, tmp_path, **options)
    assert calibrate(model, tokenizer, tmp_path, **options, restart=True, tolerance=0) == config


def test_records_that_are_left_out_are_told(base, tmp_path):
    lines = [dict(context=f"some words {index} " * (40 if index % 2 else 1), question="What?", answer="the whole of a "
                  "long answer in which there are many words") for index in range(8)]  # fmt: skip
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--records", path, "--sink", "2", "--window", "16", "--length", "512"]
    result = flux("calibrate", base, "--output", tmp_path / "out", *options)
    assert result.returncode == 1 and "answers none of the families" in result.stderr
    lines = [{"text": f"some words and {index} " * (60 if index % 2 else 1)} for index in range(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = flux("calibrate", base, "--output", tmp_path / "other", *options)
    assert result.returncode == 0, result.stderr
    assert "4 records left out" in result.stdout and "score of generated answers" not in result.stdout


def test_every_family_ranks(tokenizer):
    with pytest.raises(CalibrationError, match="2 samples in all cannot rank layers by 3 families"):
        generated_samples(tokenizer, ["look_up", "place", "prose"], 512, 2, 1)
    made = generated_samples(tokenizer, ["look_up", "prose"], 512, 4, 1)
    assert [sample.family for sample in made.ranked] == ["look_up", "prose"] * 2
    assert made.digest() == generated_samples(tokenizer, ["look_up", "prose"], 512, 4, 1).digest()
    assert made.digest() != generated_samples(tokenizer, ["look_up", "prose"], 511, 4, 1).digest()


def test_another_adapter_is_not_written_over(base, tokenizer, text, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    routing = attach(model)
    routing.save_pretrained(tmp_path)
    routing.detach()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CalibrationError, match=r"holds flux_config\.json and routers\.safetensors, which"):
        calibrate(model, tokenizer, tmp_path, texts=[text.read_text()], config=FluxConfig(**SIZES), length=256)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_card_is_that_of_the_last_run(base, tokenizer, text, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(base)
    options = dict(texts=[text.read_text()], config=FluxConfig(**SIZES, decide="ends"), length=256, samples=1, judged=1)
    for budget in (0.34, 0.67):
        monkeypatch.setattr(run, "choose_budget", lambda *arguments, budget=budget: budget)
        config = calibrate(model, tokenizer, tmp_path, **options)
        assert config.budget == budget and config.decide == "prefill"
        assert f"{budget} of the layers sparse" in (tmp_path / "README.md").read_text()
    with pytest.raises(CalibrationError, match="granularity is 'head'"):
        calibrate(model, tokenizer, **{**options, "config": FluxConfig(**SIZES, granularity="head")})
