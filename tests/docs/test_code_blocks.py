"""The code of the pages runs: Python with the shipped model in place of the reader's; commands have those options."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from flux_attention import FluxConfig, attach
from flux_attention.cli.app import app
from flux_attention.names import BACKBONE, ROUTERS

ROOT = Path(__file__).parents[2]
#: Their Python blocks run one after the other, as a reader would run them.
PAGES = [
    "docs/guide.md",
    "docs/calibration.md",
    "docs/performance.md",
    "docs/how-it-works.md",
    "docs/playground.md",
    "docs/start/serve.md",
    "docs/start/train.md",
    "docs/start/understand.md",
]
#: What readers put their own name in for, and what adapters of the pages' commands are called.
TRAINED, CALIBRATED = ("path-or-hub-id", "runs/mine"), ("runs/qwen", "runs/model")


def blocks(name):
    """The page's blocks of code: (language, code)."""
    return re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.S | re.M)


@pytest.fixture
def readers(tmp_path, monkeypatch):
    """What readers of a page have: a model, its inputs, routes of their own, a folder with a README."""
    model = AutoModelForCausalLM.from_pretrained(BACKBONE).eval()
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    handle = attach(model, FluxConfig(ranking=tuple(range(10)), budget=0.5))
    for name in CALIBRATED:
        handle.save_pretrained(tmp_path / name)
    handle.detach()
    for name in TRAINED:
        shutil.copytree(ROUTERS, tmp_path / name)
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text(encoding="utf-8")[:3000], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    inputs = tokenizer("def area(width, height):\n" * 100, return_tensors="pt", return_token_type_ids=False)
    bits = torch.tensor([1, 0] * 5)
    return {"model": model, "tokenizer": tokenizer, "inputs": inputs, "bits": bits, "routers": "path-or-hub-id"}


@pytest.mark.parametrize("name", PAGES)
def test_python_runs(name, readers, capsys):
    codes = [code for language, code in blocks(name) if language == "python"]
    assert codes
    for number, code in enumerate(codes):
        exec(compile(code, f"{name}, block {number}", "exec"), readers)
    if "print(" in "".join(codes):
        assert re.search(r"[█░]{10}|layers sparse", capsys.readouterr().out)


def test_every_block_of_the_guide_is_tested():
    kinds = [language for language, _ in blocks("docs/guide.md")]
    assert kinds.count("python") >= 3 and kinds.count("text") == 1 and set(kinds) == {"python", "text"}


def test_the_guide_shows_the_report_as_it_prints(readers):
    shown = next(code for language, code in blocks("docs/guide.md") if language == "text")
    routing = attach(readers["model"], "path-or-hub-id")
    readers["model"].generate(**readers["inputs"], max_new_tokens=4, pad_token_id=0)
    pattern = re.sub(r"\d[\d.]*", r"[\\d.]+", re.escape(shown.strip())).replace("…", ".+")
    pattern = re.sub(r"\\ m?s(?=,|\\ a)", r"\\ m?s", pattern)  # seconds, or thousandths
    assert re.fullmatch(pattern, str(routing.report()))


def commands(text):
    """The calls of ``flux-attention`` in blocks for a shell: lists of words."""
    for code in re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "flux-attention":
                yield words[1:]


def unknown(words):
    """What of a call the command line does not know."""
    command = typer.main.get_command(app).commands.get(words[0])
    if command is None:
        return words[:1]
    if command.ignore_unknown_options:  # it hands them on
        return []
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return [word for word in words[1:] if word.startswith("--") and word.partition("=")[0] not in options]


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.stem
)
def test_commands_have_these_options(page):
    calls = list(commands(page.read_text(encoding="utf-8")))
    assert not [(words, unknown(words)) for words in calls if unknown(words)]


def test_unknown_commands_and_options_are_found():
    text = "```bash\nflux-attention nope x  # --a\nflux-attention eval MODEL \\\n  --samples 3 --wrong\n```\n"
    assert [unknown(words) for words in commands(text)] == [["nope"], ["--wrong"]]
