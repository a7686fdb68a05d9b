"""A record that is too long keeps the passages that its answer stands in, or is left out."""

import pytest
from helpers.training import record
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_attention.training.encoding import SLACK, Encoder
from flux_attention.training.records import Example
from flux_attention.training.shortening import AROUND, GAP, answer_places, shorten

FILLING = [f"x{i} = compute({i})" for i in range(600)]


def found(answer, context):
    return [[context[start:end] for start, end in places] for places in answer_places(answer, context)]


@pytest.mark.parametrize(
    "answer, context, expected",
    [
        ("48213", "a 48213, b 148213, c 482130.", [["48213"]]),
        ("The  Hague.", "in the\nhague; The Hague", [["the\nhague", "The Hague"]]),
        ("cat", "concatenate", []),
        ("1,234", "1,234 and 1 and 234", [["1,234"]]),
        ("Paris, Rome", "Rome, then Paris, then Paris", [["Paris", "Paris"], ["Rome"]]),
        ("Paris, Rome", "see Paris, Rome; Paris", [["Paris, Rome"]]),
        ("- Paris\n- Rome\n2. Oslo", "Oslo Rome Paris", [["Paris"], ["Rome"], ["Oslo"]]),
        ("Paris, Rome and Oslo", "Oslo, Rome", [["Rome"], ["Oslo"]]),
        ("It says much, at length, of cities, and Rome", "Rome", []),  # most of it does not occur: a summary
        ("\n".join(f"x{i}" for i in range(40)), " ".join(f"x{39 - i}" for i in range(40)), []),  # nor is it a list
        ("f(x) + 1", "return f(x) + 1", [["f(x) + 1"]]),
        ("北京", "我在北京市", [["北京"]]),
        ("CPU", "我的CPU很快, CPUs", [["CPU"]]),
        ("???", "what???", [["???"]]),
    ],
)
def test_an_answer_is_found_as_whole_words(answer, context, expected):
    assert found(answer, context) == expected


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_passages_stay_and_the_ends_get_the_rest(data):
    """Of every part one passage at least, whatever the room; as much else as there is room for."""
    context = "".join(chr(0x4E00 + i) for i in range(data.draw(st.integers(1, 3000))))  # every character is unlike
    place = st.integers(0, len(context) - 1).flatmap(
        lambda start: st.tuples(st.just(start), st.integers(start + 1, min(len(context), start + 50)))
    )
    parts = data.draw(st.lists(st.lists(place, min_size=1, max_size=5).map(sorted), max_size=4))
    length = data.draw(st.integers(0, len(context)))
    short = shorten(context, parts, length)
    pieces = short.split(GAP)
    around = [[context[max(0, a - AROUND) : b + AROUND] for a, b in places] for places in parts]
    assert all(any(passage in piece for piece in pieces) for passage in (places[0] for places in around))
    kept = sum(map(len, pieces))
    least = len(set("".join(places[0] for places in around)))
    assert kept == max(length, least)  # to the last character
    if not parts:
        assert "".join(pieces) == context[: (length + 1) // 2] + context[len(context) - length // 2 :]
    if length == len(context):
        assert short == context


def test_the_outermost_places_come_first():
    """Which of many is meant, a question says by "first" or "last" more often than not."""
    context = "".join(f"{'.' * 1000}<{i}>" for i in range(9)) + "." * 1000
    places = [(context.index(f"<{i}>"), context.index(f"<{i}>") + 3) for i in range(9)]
    short = shorten(context, [places], 4 * (2 * AROUND + 3))
    assert [i for i in range(9) if f"<{i}>" in short] == [0, 1, 7, 8]


@pytest.fixture(scope="module")
def chat(tokenizer):
    import copy

    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}[assistant]"
    return chat


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_wherever_the_answer_stands_it_is_there_after_shortening(tokenizer, chat, data):
    """With the question, in as many tokens as there is room for and no more."""
    values = data.draw(st.lists(st.integers(10_000, 99_999).map(str), min_size=1, max_size=3, unique=True))
    lines, code = list(FILLING), "The code of the silver whale is"
    for value in values:
        lines.insert(data.draw(st.integers(0, len(lines))), f"# {code} {value}.")
    changes = dict(context="\n".join(lines), question=f"Which? {code}", answer=", ".join(values))
    one = record(index=data.draw(st.integers(0, 1)), **changes)
    max_length = data.draw(st.integers(900, 3000))
    framed = data.draw(st.booleans())
    (example,) = Encoder(chat if framed else tokenizer, max_length, framed)([one])
    prompt = tokenizer.decode(example.input_ids[: example.labels_from], skip_special_tokens=True)
    assert example.shortened and (1 - 2 * SLACK) * max_length <= len(example.input_ids) <= max_length
    assert all(f"# {code} {value}.\n" in prompt + "\n" for value in values) and changes["question"] in prompt
    assert prompt.startswith("[user] ") == framed and prompt.endswith("[assistant]") == framed
    assert tokenizer.decode(example.input_ids[example.labels_from :], skip_special_tokens=True) == changes["answer"]


def test_what_cannot_be_kept_is_left_out(tokenizer):
    lines = list(FILLING)
    for place in range(1, 7):
        lines.insert(90 * place, f"# city {place} is Town{place}.")
    towns = [f"Town{place}" for place in range(1, 7)]
    long = record(context="\n".join(lines), question="Which cities?", answer=", ".join(towns))
    short, question = Encoder(tokenizer, 400)([long, {**long, "answer": "Town3", "question": "Which? " * 400}])
    assert isinstance(short, str) and isinstance(question, str)
    assert "where the answer stands in the context take" in short and "tokens of 3" in short
    for kept in Encoder(tokenizer, 2000)([long]) + Encoder(tokenizer, 400)([{**long, "answer": "Town3"}]):
        assert isinstance(kept, Example) and kept.shortened
    # An answer that does not occur says nothing about what to keep.
    (summary,) = Encoder(tokenizer, 400)([{**long, "answer": "It lists several places."}])
    assert len(summary.input_ids) == 400
