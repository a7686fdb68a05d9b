"""The samples that methods are judged on."""

import pytest

from flux_attention.evaluation.material import CALIBRATION_SEED, UNSEEN, Material, Records
from flux_attention.tasks.corpus import local_corpus
from flux_attention.tasks.questions import Question, make_question


def question(index, family="mine", context="some words " * 20):
    return Question(context + str(index), "What number?", str(index), (str(index),), family, "match", family)


def test_questions_in_words_are_of_the_test_split_and_those_that_choose_layers_are_not(tokenizer):
    material = Material(tokenizer, ["place"])
    (judged,), (chosen,) = material.make("place", 400, 1), material.make("place", 400, 1, CALIBRATION_SEED)
    assert judged.question == make_question("place", local_corpus("test"), tokenizer, 400, UNSEEN)
    assert chosen.question == make_question("place", local_corpus("calibration"), tokenizer, 400, CALIBRATION_SEED)


def test_both_kinds_of_families_may_be_asked_together(tokenizer, haystack):
    material = Material(tokenizer, ["copy", "place"], haystack)
    token, words = (material.make(family, 400, 2) for family in material.families)
    assert [sample.question for sample in token] == [None, None] and len(token[0].input_ids) == 400
    assert len({sample.question for sample in words}) == 2
    alone = Material(tokenizer, ["copy"], haystack).settings
    assert set(alone) == {"families", "text"}  # as results of earlier versions have it
    assert material.settings["text"].startswith(alone["text"]) and material.settings["chat"] is False
    with pytest.raises(ValueError, match=r"families \['copy'\] are hidden in text, but there is none"):
        Material(tokenizer, ["copy", "place"])


def test_records_are_judged_by_task_and_told_apart(tokenizer):
    questions = [question(index, "ab"[index % 2]) for index in range(6)]
    records = Records(tokenizer, questions)
    assert records.families == ["a", "b"]
    assert [sample.question.answer for sample in records.make("b", records.length, 2)] == ["1", "3"]
    assert records.length == max(len(s.input_ids) for s in records.make("a", 0, 9) + records.make("b", 0, 9))
    assert records.make("place", 800, 1, CALIBRATION_SEED)[0].question.family == "place"
    assert Records(tokenizer, questions).settings == records.settings
    assert Records(tokenizer, [*questions[:5], question(7, "b")]).settings != records.settings
    with pytest.raises(ValueError, match=r"record 2 has .* tokens, expected at most 256: shorten it"):
        Records(tokenizer, [question(0), question(1, context="word " * 400)], 256)
