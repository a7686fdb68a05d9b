"""The report: paired differences, tables, figures."""

import json
import math
import re
import xml.dom.minidom
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_attention.evaluation.report import (
    comparisons,
    difference,
    heat_map,
    short_names,
    summary,
    tables,
    write_report,
)


def row(task, method, value, routers=None, length=4096, sparsity=0.5):
    measured = {"perplexity": value} if task == "plain" else {"accuracy": value}
    facts = dict(task=task, method=method, routers=routers, seq_len=length, n=10, sparsity=sparsity)
    return {**facts, **measured, "low": value - 0.1, "high": value + 0.1, "fa_rate": {"0": 0.25, "3": 1.0}}


def sem(values):
    return values.std(ddof=1) / math.sqrt(len(values))


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_differences_are_those_of_a_paired_test(n, seed):
    random = np.random.default_rng(seed)
    answers = random.integers(0, 2, (2, 2, n))  # method, family, sample
    nats = random.normal(1.0, 0.5, (2, n))
    methods = [
        [{"task": task, "scores": answers[method, place].tolist()} for place, task in enumerate(("copy", "count"))]
        + [{"task": "plain", "scores": nats[method].tolist()}]
        for method in range(2)
    ]
    (points, width), (ratio, spread) = difference(*methods)
    assert points == pytest.approx(100 * (answers[0].mean() - answers[1].mean()))
    # The mean of two families has the variance of their sum over four. Half a sample of each kind, written as whole
    # ones of a test twice as large.
    errors = []
    for change in answers[0] - answers[1]:
        padded = np.concatenate([change, change, [1, -1, 0, 0]])
        errors.append(padded.std() / math.sqrt(n + 2))
    assert width == pytest.approx(196 * np.hypot(*errors) / 2)
    assert ratio == pytest.approx(np.exp(nats[0].mean()) / np.exp(nats[1].mean()))
    assert spread == pytest.approx(ratio * 1.96 * sem(nats[0] - nats[1]))
    assert difference(methods[0], [{"task": "copy", "accuracy": 0.5}]) == (None, None)
    assert difference(methods[0], [{"task": "copy", "scores": [1]}]) == (None, None)
    alike, width = difference([{"task": "copy", "scores": [1] * n}], [{"task": "copy", "scores": [1] * n}])[0]
    assert alike == 0.0 and width == pytest.approx(196 / (n + 2))


def test_what_is_set_beside_what():
    methods = (("dense", None), ("sparse", None), ("routed", "a"), ("static", "a"), ("random", "a"))
    rows = [{**row("copy", method, 0.5, routers), "scores": [0, 1]} for method, routers in methods]
    found = [tuple(line[:2]) for line in comparisons(rows)]
    assert found == [
        ("sparse", "dense"),
        ("routed (a)", "dense"),
        ("routed (a)", "static (a)"),
        ("routed (a)", "random (a)"),
        ("static (a)", "dense"),
        ("random (a)", "dense"),
    ]
    assert comparisons([row("copy", "dense", 0.5), row("copy", "routed", 0.5, "a")]) == []


def test_the_report_shows_every_number(tmp_path):
    rows = [row("copy", "dense", 0.875, sparsity=0.0), row("plain", "dense", 3.125, sparsity=0.0)]
    rows += [row("copy", "routed", 0.75, "a/<x>"), row("plain", "routed", 3.25, "a/<x>")]
    rows += [row("copy", "routed", 0.5, "a/y"), row("copy", "static", 0.25, "a/y")]
    assert short_names(rows) == {"a/<x>": "<x>", "a/y": "y"}
    assert short_names([*rows, row("copy", "routed", 0.5, "b/y")])["b/y"] == "b/y"
    path = tmp_path / "quality.json"
    path.write_text(json.dumps({"meta": {"device": "cpu", "settings": {"samples": 10}}, "rows": rows}))
    page, markdown = write_report(path, tmp_path / "out")
    page, markdown = page.read_text(), markdown.read_text()
    for number in ("0.875", "3.125", "0.750", "3.250", "0.500", "0.250"):
        assert number in page and number in markdown
    assert "routed (&lt;x&gt;)" in page and "<x>" not in page
    outside = r"""(src|href)\s*=\s*["'](?!#|data:)|url\((?!#)|@import|<script|<link"""
    assert re.findall(outside, page) == []
    for figure in re.findall(r"<svg.*?</svg>", page, re.S):
        xml.dom.minidom.parseString(figure)
    assert page.count("<svg") == 3 and "currentColor" in page and "prefers-color-scheme: dark" in page
    dense = next(each for each in summary(rows) if each["method"] == "dense")
    assert (dense["accuracy"], dense["perplexity"], dense["sparsity"]) == (0.875, 3.125, 0.0)
    path.write_text(json.dumps({"meta": {}, "rows": []}))
    with pytest.raises(ValueError, match="no quality rows"):
        write_report(path, tmp_path)


def test_plain_text_alone_has_no_figure_of_accuracy(tmp_path, recwarn):
    path = tmp_path / "quality.json"
    rows = [row("plain", "dense", 3.125, sparsity=0.0), row("plain", "routed", 3.25, "a/x")]
    path.write_text(json.dumps({"meta": {"device": "cpu", "settings": {"samples": 10}}, "rows": rows}))
    page, _ = write_report(path, tmp_path / "out")
    assert page.read_text().count("<svg") == 1  # the routers' heat map
    assert not [str(each.message) for each in recwarn if "legend" in str(each.message)]


def test_the_heat_map_of_heads_has_their_layers():
    rows = [
        {**row(task, "head", 0.5, "x"), "fa_rate": rates}
        for task, rates in (
            ("copy", {"2.0": 1.0, "2.1": 0.0, "5.0": 0.25, "5.1": 0.25}),
            ("plain", {"2.0": 0.0, "2.1": 0.0, "5.0": 1.0, "5.1": 0.5}),
        )
    ]
    axes = heat_map(rows, 4096, "x").axes[0]
    assert axes.images[0].get_array().tolist() == [[0.5, 0.25], [0.0, 0.75]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "5"]


class Page(HTMLParser):
    """The cells of each table, by row, and every open tag that was not closed by its own name."""

    def __init__(self):
        super().__init__()
        self.tables, self.open, self.text, self.unbalanced = [], [], "", []

    def handle_starttag(self, tag, attributes):
        if tag in ("meta", "html", "!doctype"):
            return
        self.open.append(tag)
        self.text = ""
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])

    def handle_data(self, data):
        self.text += data

    def handle_endtag(self, tag):
        if tag == "html":
            return
        if self.open.pop() != tag:
            self.unbalanced.append(tag)
        if tag in ("th", "td"):
            self.tables[-1][-1].append(self.text)


def test_page_and_markdown_hold_the_same_tables(tmp_path):
    rows = [row("copy", "dense", 0.875, sparsity=0.0), row("plain", "dense", 3.125, sparsity=0.0)]
    rows += [row("two_hop", "routed", 0.75, "a/<x> & 'y'"), row("plain", "routed", 3.25, "a/<x> & 'y'", length=512)]
    meta = {"device": "<GPU>", "commit": None, "settings": {"samples": 10, "families": ["é", "<b>"]}}
    (tmp_path / "quality.json").write_text(json.dumps({"meta": meta, "rows": rows}))
    html, markdown = write_report(tmp_path / "quality.json", tmp_path)
    page = Page()
    page.feed(html.read_text(encoding="utf-8"))
    page.close()
    assert page.open == [] and page.unbalanced == []
    expected = [[heading, *lines] for _, heading, lines in tables(rows)]
    facts = [["device", "<GPU>"], ["commit", "None"], ["samples", "10"], ["families", '["é", "<b>"]']]
    assert len(expected) > 4 and page.tables == [*expected, facts]
    text = markdown.read_text(encoding="utf-8")
    written = ["| " + " | ".join(cells) + " |" for table in [*expected, facts] for cells in table]
    assert [
        line for line in text.splitlines() if line.startswith("| ") and "---" not in line and line != "| | |"
    ] == written
    assert text.endswith("""
## Environment

| | |
| --- | --- |
| device | <GPU> |
| commit | None |
| samples | 10 |
| families | ["é", "<b>"] |
""")
