"""Prompts inspected and continued."""

import json
import shutil

import pytest
import torch
from helpers.command import flux, write_prompt
from transformers import AutoModelForCausalLM, AutoTokenizer

from flux_attention import FluxConfig, attach
from flux_attention.hf import precision
from flux_attention.names import BACKBONE


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    return write_prompt(tmp_path_factory.mktemp("cli") / "prompt.txt")


@pytest.mark.parametrize("fast, itemsize", [(True, 2), (False, 4)])
def test_inspect(prompt, monkeypatch, fast, itemsize):
    monkeypatch.setattr(precision, "fast_bfloat16", lambda: fast)
    arguments = ["inspect", "shipped", prompt, "--device", "cpu"]
    result = flux(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    sequence = facts["sequences"][0]
    assert len(sequence["routes"]) == 10 and 0 <= sequence["msr"] <= 1
    # layers, KV heads, dim, K and V
    assert facts["baseline_kv_bytes"] == sequence["tokens"] * 10 * 2 * 64 * 2 * itemsize
    if fast:
        return
    with open(prompt, "rb") as file:
        piped = flux("inspect", "shipped", "-", "--device", "cpu", "--json", stdin=file.read())
    assert json.loads(piped.stdout) == facts
    shown = flux(*arguments, "--force", "sparse")
    assert "░░░░░░░░░░  0/10 layers full" in shown.stdout and "10 of 10 layers sparse (Ω_MSR 1.00), KV " in shown.stdout
    share = round(100 * 768 / sequence["tokens"])  # the adapter's sink + window
    assert f"KV {share} % of dense" in shown.stdout and "docs/glossary.md" in shown.stdout
    assert "nothing is saved" not in shown.stdout


def test_inspect_says_where_nothing_is_saved(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("x = 1\n" * 20)
    shown = flux("inspect", "shipped", path, "--device", "cpu", "--force", "sparse").stdout
    assert (
        "KV 100 % of dense" in shown
        and "nothing is saved in the prompt: sparse layers see sink + window = 768" in shown
    )
    assert "nothing is saved" not in flux("inspect", "shipped", path, "--device", "cpu", "--force", "full").stdout


def test_prompts_go_through_the_chat_template_where_there_is_one(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end> {% endfor %}>"
    )
    folder, text, file = tmp_path / "model", "def area(width, height):", tmp_path / "prompt.txt"
    shutil.copytree(base, folder)
    tokenizer.save_pretrained(folder)
    file.write_text(text)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], return_dict=True)["input_ids"]
    for options, expected in (((), chat), (("--no-chat",), tokenizer(text)["input_ids"])):
        arguments = [folder, file, "--device", "cpu", "--dtype", "float32", "--json", *options]
        facts = json.loads(flux("inspect", *arguments).stdout)
        assert facts["sequences"][0]["tokens"] == len(expected)
        answer = json.loads(flux("generate", *arguments, "--max-new-tokens", "3").stdout)
        model = AutoModelForCausalLM.from_pretrained(folder)
        new = model.generate(torch.tensor([expected]), do_sample=False, max_new_tokens=3)[0, len(expected) :]
        assert answer["text"] == tokenizer.decode(new, skip_special_tokens=True)


def test_generate_answers_a_question_about_its_prompt(prompt):
    arguments = ["generate", "shipped", prompt, "--max-new-tokens", "7", "--dtype", "float32"]
    result = flux(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[0] == "48213" and " a token" in result.stderr and " % of dense" in result.stderr
    facts = json.loads(flux(*arguments, "--json").stdout)
    assert facts["text"].split()[0] == "48213" and facts["tokens"] == facts["new_tokens"] == 7
    assert 0 < facts["kv_bytes"] < facts["baseline_kv_bytes"] and facts["prefill_s"] > facts["token_s"] > 0
    assert "48213" not in flux(*arguments, "--force", "sparse").stdout


def test_oversized_prompt(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("word " * 20000)
    result = flux("inspect", "shipped", path)
    assert result.returncode == 1 and "the model reads at most 8192; shorten it" in result.stderr


def test_not_text(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(b"\xff\xfe\x00")
    result = flux("inspect", "shipped", path)
    assert result.returncode == 1 and "is not UTF-8 text (byte 0)" in result.stderr


def test_budgets_and_ends_are_asked_for_by_options(prompt, tmp_path):
    routing = attach(AutoModelForCausalLM.from_pretrained(BACKBONE), FluxConfig(ranking=tuple(range(10)), budget=0.5))
    routing.save_pretrained(tmp_path)
    arguments = ["inspect", "shipped", prompt, "--device", "cpu", "--json"]
    for budget, routes in ((None, "FFFFFSSSSS"), ("0.8", "FFSSSSSSSS")):
        result = flux(*arguments, "--routers", tmp_path, *([] if budget is None else ["--budget", budget]))
        assert json.loads(result.stdout)["sequences"][0]["routes"] == routes, result.stderr
    logits = [
        json.loads(flux(*arguments, *more).stdout)["sequences"][0]["logits"] for more in ([], ["--decide", "ends"])
    ]
    assert logits[0] != logits[1]
    result = flux(*arguments, "--routers", tmp_path, "--decide", "ends")
    assert result.returncode == 1 and "a ranking is of layers and has no routers" in result.stderr
