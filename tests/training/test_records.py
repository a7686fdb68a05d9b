"""Records become prompts and labelled answers, or are reported."""

import json

import numpy as np
import pytest
from helpers.training import record

from flux_attention.errors import DataError
from flux_attention.training import load_data
from flux_attention.training.encoding import Encoder
from flux_attention.training.records import PLAIN


def encode(record, tokenizer, max_length, chat_template=False, chat_template_kwargs=None):
    (example,) = Encoder(tokenizer, max_length, chat_template, chat_template_kwargs or {})([record])
    return example, example.shortened


def test_records_become_prompt_and_labelled_answer(tokenizer):
    example, cut = encode(record(index=2), tokenizer, 512, chat_template=False)
    prompt, answer = example.input_ids[: example.labels_from], example.input_ids[example.labels_from :]
    assert not cut and example.prompt_length == example.labels_from
    assert tokenizer.decode(prompt, skip_special_tokens=True).strip().endswith("What does f2 add?")
    assert tokenizer.decode(answer, skip_special_tokens=True) == "It adds 2."
    assert answer[-1] == tokenizer.eos_token_id or tokenizer.eos_token_id is None
    prefix, _ = encode(record(index=3), tokenizer, 512, chat_template=False)
    assert tokenizer.decode(prefix.input_ids, skip_special_tokens=True).strip().startswith("What does f3 add?")
    text, _ = encode({"text": "import os\n"}, tokenizer, 512, chat_template=False)
    assert (text.labels_from, text.prompt_length, text.task) == (1, len(text.input_ids), PLAIN)


def test_chat_templates_frame_the_prompt(tokenizer):
    import copy

    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant{{ mood }}]"
    example, _ = encode(record(index=2), chat, 512, chat_template=True)
    prompt = chat.decode(example.input_ids[: example.labels_from])
    assert prompt.startswith("[user] def f2(x)") and prompt.endswith("What does f2 add?\n[assistant]")
    example, _ = encode(record(index=2), chat, 512, True, {"mood": ", calm"})
    assert chat.decode(example.input_ids[: example.labels_from]).endswith("[assistant, calm]")


def test_long_prompts_are_cut_in_the_middle(tokenizer):
    whole, _ = encode(record(index=2), tokenizer, 10_000, chat_template=False)
    short, cut = encode(record(index=2), tokenizer, 60, chat_template=False)
    answer = len(whole.input_ids) - whole.labels_from
    assert cut and len(short.input_ids) == 60 and short.labels_from == 60 - answer
    half = short.labels_from // 2
    assert np.array_equal(short.input_ids[:half], whole.input_ids[:half])
    assert np.array_equal(short.input_ids[-answer - half :], whole.input_ids[-answer - half :])


def test_long_answers_and_texts_are_reported(tokenizer):
    long = record(answer="It adds 1. " * 200)
    example, cut = encode(long, tokenizer, 100, chat_template=False)
    assert cut and len(example.input_ids) == 100 and example.labels_from == 50
    text, cut = encode({"text": "import os\n" * 200}, tokenizer, 100, chat_template=False)
    assert cut and len(text.input_ids) == 100


def test_an_end_that_a_tokenizer_adds_does_not_stand_before_the_answer(tokenizer):
    class Ending:
        eos_token_id, bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id

        def __call__(self, texts, add_special_tokens=True, **settings):
            ids = tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
            return {"input_ids": [some + [self.eos_token_id] * add_special_tokens for some in ids]}

    plain, _ = encode(record(), tokenizer, 512, chat_template=False)
    ended, _ = encode(record(), Ending(), 512, chat_template=False)
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
