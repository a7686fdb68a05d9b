"""Scores of generated text, against values worked out by hand and the reference implementation of ROUGE."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_attention.tasks.metrics import edit, match, rouge_l, score_answer, similarity
from flux_attention.tasks.questions import Question


def test_match_is_the_share_of_expected_strings_that_occur():
    assert match("The codes are 12345 and 67890.", ("12345", "67890")) == 1
    assert match("The codes are 12345 and 67891.", ("12345", "67890")) == 0.5
    assert match("she lives in OSLO", ("Oslo",)) == 1
    assert match("a word\nby word  copy", ("word by word",)) == 1
    assert match("It rings 13 times.", ("3",)) == 0  # part of a number is not the number
    assert match("version 1:1.1.6-1, of course", ("1:1.1.6-1",)) == 1
    assert match("", ("x",)) == 0


def test_similarity_counts_the_longest_common_subsequence():
    assert similarity("abcd", "abcd") == 1
    assert similarity("abcd", "wxyz") == 0
    assert similarity("this is a test", "this is a test!") == pytest.approx(28 / 29)
    assert similarity("lewenstein", "levenshtein") == pytest.approx(2 * 9 / 21)  # le-en-s-tein
    assert similarity("", "") == 1


@given(st.lists(st.sampled_from("abc"), max_size=8), st.lists(st.sampled_from("abc"), max_size=8))
def test_similarity_agrees_with_all_subsequences(first, second):
    def subsequences(items):
        found = {()}
        for item in items:
            found |= {(*some, item) for some in found}
        return found

    longest = max(map(len, subsequences(first) & subsequences(second)))
    assert similarity(first, second) == (2 * longest / (len(first) + len(second)) if first or second else 1)


WORDS = st.lists(st.sampled_from(["the", "Cat", "sat,", "on", "a", "mat.", "9-lives"]), min_size=1).map(" ".join)


@settings(deadline=None)
@given(WORDS, WORDS)
def test_rouge_is_what_the_reference_implementation_computes(text, reference):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    assert rouge_l(text, (reference,)) == pytest.approx(scorer.score(reference, text)["rougeL"].fmeasure)
    assert rouge_l(text, ("zebra", reference)) == rouge_l(text, (reference,))


def test_edit_reads_the_first_line_of_code():
    line = "return self.value"
    assert edit(line, (line,)) == 1
    assert edit(f"```python\n# as before\n    {line}\n    pass\n```", (line,)) == 1
    assert edit("return self.values", (line,)) == pytest.approx(34 / 35)
    assert edit("a = 1\nb = 2\nc = 3", ("a = 1\nb = 2",)) == 1
    assert edit("", (line,)) == 0


def test_a_question_knows_its_metric():
    asked = Question("", "Where?", "In Oslo.", ("Oslo",), "place", "match", "single-document QA")
    assert score_answer(asked, "She is in Oslo.") == 1
    prose = Question("Text.", "", "", (), "prose", "perplexity", "prose")
    with pytest.raises(ValueError, match=r"perplexity, which tasks\.scoring\.evaluate computes"):
        score_answer(prose, "Text.")
