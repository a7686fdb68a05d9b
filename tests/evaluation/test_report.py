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

from flux_attention.evaluation.compare import difference, find_baseline, frontier, short_names, summary
from flux_attention.evaluation.figures import heat_map, trade_off
from flux_attention.evaluation.report import write_report
from flux_attention.evaluation.tables import at_a_glance, class_differences, class_table, comparisons, tables


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


def natural(task, method, scores, kind, **more):
    return {**row(task, method, float(np.mean(scores)), more.pop("routers", None), **more), "scores": scores} | {
        "task_class": kind,
        "metric": "rouge-l",
        **{fact: more[fact] for fact in ("budget", "force") if fact in more},
    }


@given(st.integers(3, 40), st.integers(0, 2**32 - 1))
def test_scores_in_between_differ_by_their_own_spread(n, seed):
    scores = np.random.default_rng(seed).uniform(0.1, 0.4, (2, n))
    (points, width), _ = difference(*[[{"task": "summary", "scores": each.tolist()}] for each in scores])
    assert points == pytest.approx(100 * (scores[0] - scores[1]).mean())
    assert width == pytest.approx(196 * sem(scores[0] - scores[1]))
    prose = [[{"task": "prose", "perplexity": 1.0, "scores": each.tolist()}] for each in scores]
    points, (ratio, _) = difference(*prose)
    assert points is None and ratio == pytest.approx(np.exp((scores[0] - scores[1]).mean()))


def test_budgets_and_forced_routes_are_methods_of_their_own():
    kinds = [dict(method="dense"), dict(method="forced", force="0.5"), dict(method="forced", force="3,7")]
    kinds += [dict(method="static-nll", routers="a", budget=budget) for budget in (0.25, 0.75)]
    kinds += [dict(method="static", budget=0.75), dict(method="routed", routers="b")]
    sparse = {0.25: 0.25, 0.75: 0.75}
    rows = [
        {**row("copy", kind["method"], 0.5, kind.get("routers"), sparsity=sparse.get(kind.get("budget"), 0.6)), **kind}
        | {"scores": [0, 1]}
        for kind in kinds
    ]
    assert len(summary(rows)) == len(rows)
    found = [tuple(line[:2]) for line in comparisons(rows)]
    assert found == [
        ("forced 0.5", "dense"),
        ("forced 3,7", "dense"),
        ("static-nll (a) at 0.25", "dense"),
        ("static-nll (a) at 0.75", "dense"),
        ("static-nll (a) at 0.75", "static at 0.75"),
        ("static at 0.75", "dense"),
        ("routed (b)", "dense"),
        ("routed (b)", "static-nll (a) at 0.75"),  # the nearest in sparsity
    ]


def test_questions_in_words_have_columns_by_task_class(tmp_path):
    rows = [
        natural("look_up", "dense", [1, 1], "single-document QA"),
        natural("place", "dense", [1, 0], "single-document QA"),
        natural("summary", "dense", [0.3, 0.2], "summarisation"),
        natural("look_up", "sparse", [0, 0], "single-document QA"),
        natural("place", "sparse", [1, 0], "single-document QA"),
        natural("summary", "sparse", [0.1, 0.1], "summarisation"),
    ]
    heading, lines = class_table(rows)
    assert heading == ["method", "single-document QA", "summarisation", "mean accuracy", "mean Ω_MSR"]
    assert lines == [["dense", "0.750", "0.250", "0.583", "0.500"], ["sparse", "0.250", "0.100", "0.200", "0.500"]]
    prose = {**natural("prose", "dense", [1.0, 2.0], "prose"), "perplexity": 4.5}
    heading, lines = class_table([*rows, {key: prose[key] for key in prose if key != "accuracy"}])
    assert heading[-2] == "prose, perplexity" and [line[-2] for line in lines] == ["4.500", ""]
    # Of right and wrong answers half a sample more in each of four ways, of others their own spread.
    wrong, alike = np.std([-1, -1, -1, -1, 1, -1, 0, 0]) / 2, np.std([0, 0, 0, 0, 1, -1, 0, 0]) / 2
    errors = [wrong, alike, np.std([-0.2, -0.1], ddof=1) / math.sqrt(2)]
    assert comparisons(rows)[0][3] == f"{-115 / 3:+.1f} ± {196 * math.hypot(*errors) / 3:.1f}"
    heading, lines = class_differences(rows)
    assert lines == [["sparse", f"-50.0 ± {196 * np.hypot(wrong, alike) / 2:.1f}", f"-15.0 ± {196 * errors[2]:.1f}"]]
    (tmp_path / "quality.json").write_text(json.dumps({"meta": {"device": "cpu"}, "rows": rows}))
    for page in write_report(tmp_path / "quality.json", tmp_path):
        text = page.read_text()
        assert "Accuracy by task class at 4,096 tokens" in text and "as the model generates them" in text
        assert "every token of the answer" not in text  # no such questions were asked


def test_what_dense_hardly_answers_has_a_star(tmp_path):
    """Below a tenth, in tables of families and classes; a class counts as a whole, and other methods do not."""
    rows = [
        natural(task, method, scores, kind)
        for task, kind, dense, sparse in (
            ("spread_maths", "maths", [0, 0.1], [1, 1]),
            ("worked_maths", "maths", [0, 1], [0, 0]),
            ("copying", "synthetic", [0.1, 0], [0, 0]),
            ("look_up", "single-document QA", [0.1, 0.1], [0, 0]),
        )
        for method, scores in (("dense", dense), ("sparse", sparse))
    ]
    assert class_table(rows)[0][1:4] == ["maths", "synthetic *", "single-document QA"]
    assert class_differences(rows)[0][1:] == ["maths", "synthetic *", "single-document QA"]
    (_, _, families) = next(table for table in tables(rows) if table[0].startswith("Accuracy at"))
    assert [line[0] for line in families] == ["spread maths *", "worked maths", "copying *", "look up"]
    path = tmp_path / "quality.json"
    without_dense = [row for row in rows if row["method"] != "dense"]
    for some, explained in ((rows, True), (rows[-2:], False), (without_dense, False)):
        path.write_text(json.dumps({"meta": {}, "rows": some}))
        assert all(("has a star" in page.read_text()) == explained for page in write_report(path, tmp_path))


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


def test_the_frontier_is_what_no_other_method_beats():
    def mean(sparsity, accuracy, perplexity=None):
        return dict(sparsity=sparsity, accuracy=accuracy, perplexity=perplexity)

    assert frontier([mean(0.0, 0.9), mean(0.5, 0.8), mean(0.4, 0.7), mean(1.0, 0.1)]) == [True, True, False, True]
    assert frontier([mean(0.5, 0.8), mean(0.5, 0.8), mean(0.0, 0.8)]) == [True, True, False]
    assert frontier([mean(0.0, None, 3.0), mean(0.5, None, 3.5), mean(0.4, None, 4.0)]) == [True, True, False]


def budgets():
    """Dense, a ranking at two budgets, and routers, which all answered two samples of one family."""
    scores = {"dense": [1, 1], 0.5: [1, 1], 0.75: [1, 0], "routed": [0, 0]}
    rows = []
    for place, (kind, right) in enumerate(scores.items()):
        method, more = ("static-nll", {"budget": kind}) if isinstance(kind, float) else (kind, {})
        one = row("copy", method, float(np.mean(right)), None if kind == "dense" else "a/x", sparsity=place / 4)
        saved = dict(scores=right, kv_bytes=100 - 20 * place, baseline_kv_bytes=100, seconds=2.0 - place / 4)
        rows.append({**one, **saved, **more})
    return rows


def test_methods_stand_beside_the_baseline_that_was_chosen():
    heading, lines = at_a_glance(budgets())
    assert heading == ["method", "Ω_MSR", "accuracy", "points beside dense", "KV ÷ dense", "s a sample", "●"]
    assert [line[0] for line in lines] == ["dense", "static-nll (x) at 0.5", "static-nll (x) at 0.75", "routed (x)"]
    assert [line[4] for line in lines] == ["1.00", "0.80", "0.60", "0.40"] and lines[1][5] == "1.75"
    assert [line[3][:5] for line in lines] == ["", "+0.0 ", "-50.0", "-100."]
    assert [line[-1] for line in lines] == ["", "●", "●", "●"]
    for name in ("static-nll (x) at 0.5", "routed"):
        _, lines = at_a_glance(budgets(), name)
        assert next(line[0] for line in lines if not line[3]).startswith(name)
    for name, message in (
        ("random", r"'random' was not judged; expected one of \['dense', 'static-nll \(x\) at 0.5'"),
        ("static-nll", r"more than once; expected one of \['static-nll \(x\) at 0.5', 'static-nll \(x\) at 0.75'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            find_baseline(budgets(), name)
    assert find_baseline(budgets()[1:], "dense") is None


def test_what_dense_hardly_answers_is_no_matter_of_the_frontier(tmp_path):
    """Of two families, sparse answers only the one that dense does not; at another length dense answers neither."""
    rows = []
    for length, dense in ((4096, [1, 1]), (8192, [0, 0])):
        for task, method, scores in (
            ("copying", "dense", [0, 0]),
            ("look_up", "dense", dense),
            ("copying", "sparse", [1, 1]),
            ("look_up", "sparse", [0, 1]),
        ):
            more = dict(length=length, sparsity=float(method == "sparse"))
            rows.append(natural(task, method, scores, "synthetic", **more))
    heading, lines = at_a_glance(rows[:4])
    assert [dict(zip(heading, line, strict=True))["accuracy"] for line in lines] == ["1.000", "0.500"]
    assert lines[1][3].startswith("-50.0") and [line[-1] for line in lines] == ["●", "●"]
    heading, lines = at_a_glance(rows[4:])  # as before, but without a dot
    assert "●" not in heading and [line[2] for line in lines] == ["0.000", "0.750"]
    path = tmp_path / "quality.json"
    path.write_text(json.dumps({"meta": {}, "rows": rows}))
    html, markdown = (page.read_text() for page in write_report(path, tmp_path))
    assert "Accuracy and sparsity at 4,096" in html and "Accuracy and sparsity at 8,192" not in html
    assert all("on the frontier and in the figure it is left out" in text for text in (html, markdown))


def test_results_of_earlier_versions_have_no_kv_and_no_time():
    rows = [{fact: value for fact, value in one.items() if fact not in ("kv_bytes", "seconds")} for one in budgets()]
    assert at_a_glance([*budgets()[:3], rows[3]])[1][3][-3:-1] == ["", ""]
    assert at_a_glance(rows)[0] == ["method", "Ω_MSR", "accuracy", "points beside dense", "●"]


def test_the_report_names_model_and_command_first(tmp_path):
    meta = {"device": "cpu", "command": "flux-attention eval <m> --x", "settings": {"model": "owner/<model>"}}
    (tmp_path / "quality.json").write_text(json.dumps({"meta": meta, "rows": budgets()}))
    html, markdown = (path.read_text() for path in write_report(tmp_path / "quality.json", tmp_path, "routed"))
    assert html.index("<h1>owner/&lt;model&gt;</h1>") < html.index("eval &lt;m&gt; --x") < html.index("At a glance")
    assert (
        markdown.startswith("# owner/<model>\n")
        and "points beside routed" in html
        and "points beside routed" in markdown
    )
    assert markdown.index("```bash\nflux-attention eval <m> --x\n```") < markdown.index(
        "## At a glance at 4,096 tokens"
    )
    figure = html[html.index("<svg") : html.index("</svg>")]
    assert "frontier" in figure and "as routed" in figure and ">0.75<" in figure


def test_the_figure_has_the_points_of_the_table():
    rows = [*budgets(), *(row("plain", "dense", 3.0, sparsity=0.0), row("plain", "routed", 3.0, "a/x", sparsity=0.25))]
    axes = trade_off(rows, 4096, "dense").axes[0]
    points = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    means = {each["method"]: each for each in summary(rows)}
    assert points["routed"] == [[means["routed"]["sparsity"], 0.0]] == [[0.5, 0.0]]
    assert points["static-nll"] == [[0.25, 1.0], [0.5, 0.5]]
    assert points["frontier"][0] == [0.25, 1.0] and {point[1] for point in points["as dense"]} == {1.0}
