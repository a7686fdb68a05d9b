"""A user's records become questions, or an error that says where they are not well-formed."""

import json

import pytest

from flux_attention.errors import DataError
from flux_attention.tasks.metrics import score_answer
from flux_attention.tasks.questions import as_sample
from flux_attention.tasks.records import read_questions

SHORT = {"context": "Ada lives in Oslo.", "question": "Where does Ada live?", "answer": "In Oslo."}
LONG = {
    **SHORT,
    "answer": "Ada lives in Oslo, in a flat of two rooms that looks out on the harbour.",
    "metadata": {"task": "Single QA", "is_prefix": True},
}


def written(tmp_path, *records):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return {"path": str(path)}


def test_records_become_questions(tmp_path, tokenizer):
    source = written(tmp_path, SHORT, LONG, {"text": "Oslo is a city."})
    short, long, prose = read_questions(source)
    assert (short.metric, short.family, short.task_class) == ("match", "records", "records")
    assert short.prompt == "Ada lives in Oslo.\n\nWhere does Ada live?"
    assert (long.metric, long.family, long.task_class) == ("rouge-l", "Single QA", "Single QA")
    assert long.prompt.startswith("Where does Ada live?\n\n")
    assert score_answer(short, "She lives in oslo.") == 1 and 0 < score_answer(long, "Ada lives in Oslo.") < 1
    assert prose.is_prose and as_sample(prose, tokenizer).question is prose
    assert read_questions(source, limit=1) == [short]


@pytest.mark.parametrize(
    "record, problem",
    [
        ({**SHORT, "answer": " "}, "line 2: answer is empty"),
        ({"context": "Text."}, "line 2: no question"),
        ("{\n", "line 2: not JSON"),
        ({**SHORT, "metadata": {"is_prefix": "yes"}}, "line 2: metadata.is_prefix is 'yes', expected true or false"),
    ],
)
def test_a_record_that_is_not_well_formed_is_an_error(tmp_path, record, problem):
    with pytest.raises(DataError, match=problem):
        read_questions(written(tmp_path, SHORT, record))


def test_no_records_are_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no records"):
        read_questions(written(tmp_path, "\n"))
    with pytest.raises(DataError, match="cannot read"):
        read_questions({"path": str(tmp_path / "none.jsonl")})
