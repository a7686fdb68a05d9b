"""Pages for people: links that exist, lengths that were promised, numbers that are as the result files have them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from flux_attention import FluxConfig, attach
from flux_attention.names import BACKBONE

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for folder in ("", "docs", "recipes", "benchmarks", "examples")
    for page in (ROOT / folder).glob("**/*.md" if folder else "*.md")
)


@pytest.fixture(scope="module")
def show():
    """The modules benchmarks/show_*.py, which write the generated pages."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import show_idea
        import show_pages
        import show_tables

        yield {"idea": show_idea, "pages": show_pages, "tables": show_tables}
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def without_code(text):
    """What is rendered as text: neither blocks of code nor code in a line."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def anchors(text):
    """The anchors that GitHub gives to a page's headings."""
    found = {}
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if number == 0 else f"{slug}-{number}" for slug, last in found.items() for number in range(last + 1)}


def links(text):
    """Targets of links and images: in brackets, in reference lists and in HTML."""
    text = without_code(text)
    inline = re.findall(r"\]\(([^()\s]+)\)", text)
    listed = re.findall(r"^\[[^\]]+\]: (\S+)", text, re.M)
    return inline + listed + re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)


def broken(page, text):
    """Those links of a page that lead nowhere in the repository."""
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            continue  # on the web
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            yield link


def test_there_are_pages():
    assert {"README.md", "CONTRIBUTING.md", "docs/guide.md", "recipes/shipped/README.md"} <= {
        str(page.relative_to(ROOT)) for page in PAGES
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    assert not list(broken(page, text))
    used = set(re.findall(r"\]\[([^\]]+)\]", without_code(text)))
    assert used <= set(re.findall(r"^\[([^\]]+)\]: ", text, re.M))  # links by name have an address


def test_broken_links_are_found():
    page = ROOT / "docs/guide.md"
    text = (
        "[a](nowhere.md) [b](training.md#no-such-heading) [c](#on-a-gpu)\n`[d](code.md)`\n```\n[e](code.md)\n```\n"
        '[f][g] <img src="images/none.svg">\n\n[g]: ../LOST.md\n'
    )
    assert set(broken(page, text)) == {"nowhere.md", "training.md#no-such-heading", "images/none.svg", "../LOST.md"}


@pytest.mark.parametrize("name, most", [("README.md", 100), ("docs/performance.md", 120)])
def test_pages_are_short(name, most):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= most


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_glossary_is_linked(page):
    glossary = ROOT / "docs/glossary.md"
    targets = {(page.parent / link.partition("#")[0]).resolve() for link in links(page.read_text(encoding="utf-8"))}
    assert page == glossary or glossary in targets


def test_generated_pages_are_what_the_scripts_write(show):
    pages = show["pages"].pages()
    assert len(pages) >= 14
    for name, text in pages.items():
        assert (ROOT / name).read_text(encoding="utf-8") == text, f"run python benchmarks/show_pages.py: {name}"


def test_every_result_file_is_listed(show):
    assert {path.stem for path in (ROOT / "benchmarks/results").glob("*.json")} == set(show["pages"].FILES)


def test_the_picture_is_what_the_script_draws(show):
    for theme in show["idea"].THEMES:
        drawn = (ROOT / f"docs/images/idea_{theme}.svg").read_text(encoding="utf-8")
        assert drawn == show["idea"].draw(theme)


def test_a_page_without_the_place_for_a_table_is_an_error(show):
    filled = show["tables"].filled
    assert (
        filled("a\n<!-- t -->\nold\n<!-- end -->\nb", {"t": "| new |\n"}) == "a\n<!-- t -->\n| new |\n<!-- end -->\nb"
    )
    with pytest.raises(ValueError, match="0 places for 't', expected one"):
        filled("a\n", {"t": "| new |\n"})


def test_every_image_is_shown():
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page.read_text(encoding="utf-8"))}
    assert not [path.name for path in (ROOT / "docs/images").iterdir() if path not in shown]


def test_the_code_in_readme_runs(tmp_path):
    """With the shipped model, and an adapter as calibration leaves it, in place of those that are named."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    assert len(code) == 1
    model, adapter = re.findall(r"^flux-attention calibrate (\S+) --output (\S+) .*$", text, re.M)[0]
    loaded = AutoModelForCausalLM.from_pretrained(BACKBONE)
    attach(loaded, FluxConfig(ranking=tuple(range(10)), budget=0.5)).save_pretrained(tmp_path)
    assert code[0].count(f'"{model}"') == 2 and code[0].count(f'"{adapter}"') == 1
    code = code[0].replace(f'"{model}"', repr(str(BACKBONE))).replace(f'"{adapter}"', repr(str(tmp_path)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    arguments = [sys.executable, "-c", code]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, encoding="utf-8", env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    strip, report, *_ = result.stdout.splitlines()
    assert strip.startswith("█████░░░░░  5/10 layers full  Ω_MSR 0.50")
    assert report.startswith("5 of 10 layers sparse (Ω_MSR 0.50), KV ")
