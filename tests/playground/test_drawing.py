"""What the playground draws, and the pages it leads to."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from flux_attention.hf.report import Report
from flux_attention.patterns import Full, Streaming
from flux_attention.playground import documents as documents_room
from flux_attention.playground import drawing
from flux_attention.playground.documents import ELSEWHERE, IN_MENU, documents
from flux_attention.playground.player import LayerDecided
from flux_attention.routes import Routes

ROOT = Path(__file__).parents[2]
STYLE = ROOT / "src/flux_attention/playground/style.css"
PACKAGE = re.compile(r"^([\w-]+)([=<>]=?.*)$", re.M)


def report(full, tokens=4000, new=9):
    routes = torch.zeros(1, 10, dtype=torch.bool)
    routes[0, :full] = True
    routes = Routes(routes, None, tuple(range(10)), (tokens,), Streaming(64, 704), Full())
    return Report(routes, new, 2**20 * (full + 1), 2**20 * 11, 1, 2, 1.25, 0.02)


def test_a_strip_has_a_button_for_each_layer():
    decided = {3: LayerDecided(3, True, 41.3, False), 5: LayerDecided(5, False, -2.46, False)}
    html = drawing.strip((3, 5, 7), decided, {7: True}, is_reading=True)
    buttons = re.findall(r'<button type="button" class="([^"]+)" data-layer="(\d+)" aria-label="([^"]+)"', html)
    assert buttons == [
        ("layer full", "3", "layer 3: full, margin +41; click to force it sparse"),
        ("layer sparse latest", "5", "layer 5: sparse, margin −2.5; click to force it full"),
        ("layer full pinned", "7", "layer 7: full, forced by you; click to let it go"),
    ]
    assert re.findall(r'style="(top|bottom):50%;height:(\d+)%', html) == [("bottom", "50"), ("top", "4")]


@pytest.mark.parametrize("count, wide, narrow", [(10, 10, 5), (24, 12, 6), (28, 14, 6), (36, 12, 6), (1, 1, 1)])
def test_rows_are_about_equally_long(count, wide, narrow):
    assert f'style="--wide:{wide};--narrow:{narrow}"' in drawing.strip(tuple(range(count)), {}, {})


def test_cards_show_what_was_answered_and_took():
    shown = {way: drawing.Card(way) for way in drawing.TITLES}
    assert drawing.cards(shown, "prompt").count("<dd>–") == 9
    assert drawing.summary(shown["routed"], shown["dense"], {}, "") == '<p class="summary"></p>'
    shown["dense"] = drawing.Card("dense", text=" <b>Durban\n", report=report(10))
    shown["routed"] = drawing.Card("routed", text="<b>Durban", report=report(4, new=5))
    shown["sparse"] = drawing.Card("sparse", "writing", text="Ox")
    html = drawing.cards(shown, "prompt")
    assert html.count("&lt;b&gt;Durban</pre>") == 2 and "<b>Durban" not in html
    assert (
        "5.0 MiB <small>45 % of dense" in html
        and "1.25 s" in html
        and html.count("50 tokens/s") == html.count("too few tokens to time") == 1
    )
    assert html.count("same answer") == 1 and "another answer" not in html and ">writing<" in html
    said = drawing.summary(shown["routed"], shown["dense"], {2: True}, "Durban")
    assert "<b>4 of 10 layers ran full</b> for this prompt of 4,000 tokens (1 forced by you)" in said
    assert "the answer is the same as dense. The text says: <b>Durban</b>." in said
    short = drawing.Card("routed", report=report(0, tokens=100))
    assert "But nothing is saved in the prompt" in drawing.summary(short, shown["dense"], {}, "")


@pytest.mark.parametrize(
    "places, said",
    [((64, 295), "All lie outside"), ((63, 296), "None lies outside"), ((63, 295), "1 of them lie outside")],
)
def test_facts_are_said_to_be_where_sparse_layers_see_them_or_not(places, said):
    html = drawing.planted(dict(zip(("<a>", "b"), places, strict=True)), ("<a>",), 1000, Streaming(64, 704))
    assert f"{said} the first 64 and latest 704 tokens" in html and f"&lt;a&gt;</q> (token {places[0]})" in html
    assert "of 1,000 tokens" in html and "and 1 more" in html


def test_colours_are_those_of_the_figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import show_idea

    light, dark = (dict(re.findall(r"--([\w-]+): (#\w+);", rule)) for rule in STYLE.read_text().split("}")[:2])
    for theme, found in (("light", light), ("dark", dark)):
        expected = show_idea.THEMES[theme]
        assert found["sparse"] == show_idea.SPARSE[theme]
        assert all(found[name] == expected[name] for name in ("full", "box", "edge", "ink", "faint"))
    del sys.modules["show_idea"]


def test_pages_link_to_each_other_and_to_nothing_that_is_not_there():
    pages = documents()
    assert list(pages) == [
        *("serve", "calibrate", "train", "glossary"),
        *("guide", "performance", "evaluation"),
        *("training", "serving"),
    ]
    assert set(IN_MENU) < set(pages)
    for _, text in pages.values():
        targets = set(re.findall(r"\]\(([^)]+)\)", text))
        assert all(target.startswith("http") or target[1:] in pages for target in targets)
        assert not re.search(r"^\[[^\]]+\]: |\]\[|!\[|\[[^\]]*\.md\]", text, re.M)  # links read as words
    assert "](/glossary)" in pages["serve"][1] and "](/train)" in pages["serve"][1]
    assert "the [guide](/guide)" in pages["serve"][1] and "See [how to calibrate](/calibrate)." in pages["glossary"][1]
    assert "(table (`benchmarks/results/cpu_prefill.md`))" in pages["performance"][1]


def test_built_packages_hold_every_page():
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packed = re.findall(r'^"docs/(.+)" = "flux_attention/playground/docs/(.+)"', settings, re.M)
    assert sorted(packed) == sorted((file, file) for _, file in documents_room.PAGES.values())


def test_pages_name_the_files_that_they_would_link_to_where_there_is_no_page():
    """Where they are in the repository, and that it is there."""
    pages = documents()
    for name, (_, text) in pages.items():
        assert all((ROOT / file).is_file() for file in named_files(text)), name
        assert text.rstrip().endswith(ELSEWHERE) is bool(named_files(text)), name
    assert "Recipes (`recipes/models/README.md`)" in pages["train"][1]
    assert "[what a recipe says](/training)" in pages["glossary"][1]


def named_files(text):
    return set(re.findall(r"`((?:docs|recipes|src|benchmarks)/[\w./-]+\.(?:md|py|svg))`", text))


def test_the_space_has_what_the_package_needs_in_the_versions_that_are_tested():
    folder = ROOT / "examples/space"
    front = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
    pinned = dict(PACKAGE.findall(re.sub(r"\s*[;#].*", "", (ROOT / "constraints.txt").read_text())))
    assert f"=={front['sdk_version']}" == pinned["gradio"] and (folder / front["app_file"]).is_file()
    needed = dict(PACKAGE.findall((folder / "requirements.txt").read_text()))
    listed = (ROOT / "pyproject.toml").read_text().split("\ndependencies = [")[1].split("]")[0]
    assert set(needed) == set(re.findall(r'"([\w-]+)', listed))
    assert all(version == pinned.get(name, version) for name, version in needed.items())
