"""The local machine's texts: three splits that share nothing, and what is read into them."""

from dataclasses import replace

import pytest

from flux_attention.tasks import corpus, documents, text
from flux_attention.tasks.corpus import local_corpus, prose_of
from flux_attention.tasks.documents import debian_packages, functions
from flux_attention.tasks.questions import make_question


def test_splits_share_no_text():
    corpora = [local_corpus(split) for split in text.SPLITS]
    for parts in (
        [{paragraph for some in one.prose for paragraph in some} for one in corpora],
        [{document.origin for document in one.documents} for one in corpora],
        [{path for path, _ in one.code} for one in corpora],
    ):
        assert all(parts)
        assert sum(map(len, parts)) == len(set.union(*parts))
    assert [one.split for one in corpora] == list(text.SPLITS)


@pytest.mark.parametrize("fraction", [0.04, 0.25])
def test_the_test_split_is_the_held_out_one(fraction):
    names = [str(number) for number in range(20_000)]
    splits = [text.split_of(name, fraction) for name in names]
    assert [split == "test" for split in splits] == [text.is_held_out(name, fraction) for name in names]
    assert splits.count("calibration") / len(names) == pytest.approx(fraction, abs=0.01)


def test_prose_is_sentences():
    paragraph = "This module reads and writes files, which it takes to be text unless told that they are not."
    code = "    for line in lines:\n        total += int(line)\n        print(total, line, sep='|', end='')"
    wrapped = paragraph.replace("files, ", "files,\n    ")
    assert prose_of(f"{wrapped}\n\n{code}\n\nToo short.\n\n{'=' * 80}") == [paragraph]


def test_packages_are_read_from_the_list_of_dpkg(tmp_path):
    entry = """Package: {}
Section: editors
Source: quill (2.1)
Maintainer: Ada Alba <ada@example.org>
Version: 2.1-3
Description: text editor for long letters
 Quill opens letters of any length, and saves them as they were written, with all their line ends.
 .
 It has no menus.
"""
    status = tmp_path / "status"
    status.write_text(entry.format("quill") + "\n" + entry.format("quill-doc"))
    (only,) = debian_packages(status)
    assert (only.name, only.summary, only.label) == ("quill", "text editor for long letters", "editors")
    assert only.facts == (("version", "2.1-3"), ("maintainer", "Ada Alba"))
    assert only.text.endswith("all their line ends.\n\nIt has no menus.")
    assert only.text in only.block and only.summary not in only.block
    assert list(debian_packages(tmp_path / "none")) == []


def test_functions_are_read_from_source():
    source = '''
class Quill:
    """Write long letters by hand.

    A quill takes up ink, and gives it to the paper as long as there is some left in it, line by line.

    Parameters
    ----------
    ink : Ink
    """

    def short(self):
        """Do too little to be asked about."""
'''
    (only,) = functions("office/quill.py", source)
    assert (only.name, only.label) == ("office.quill.Quill", "office")
    assert only.summary == "Write long letters by hand" and "Parameters" not in only.text


@pytest.mark.parametrize("family", ["document_fact", "find_document", "joined_fact", "summary", "classification"])
def test_machines_without_dpkg_have_questions_about_documents_too(monkeypatch, tokenizer, family):
    monkeypatch.setattr(documents, "DPKG", documents.DPKG / "none")
    corpus._read.cache_clear()
    for split in text.SPLITS:
        assert not any(document.label == "libs" for document in local_corpus(split).documents)
        asked = {make_question(family, local_corpus(split), tokenizer, 1200, seed).question for seed in range(8)}
        assert len(asked) > 2
    corpus._read.cache_clear()


def test_an_unknown_split_and_no_text_are_errors(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="unknown splits"):
        local_corpus("validation")
    monkeypatch.setattr(text, "python_roots", lambda site_packages=False: [tmp_path])
    corpus._read.cache_clear()
    with pytest.raises(RuntimeError, match="no source files found"):
        local_corpus("test")
    corpus._read.cache_clear()


def test_a_digest_tells_what_is_in_a_corpus():
    corpus = local_corpus("test")
    assert corpus.digest() == local_corpus("test").digest() != local_corpus("train").digest()
    fewer = replace(corpus, code=corpus.code[1:])
    assert repr(fewer) == repr(corpus) and fewer.digest() != corpus.digest()
