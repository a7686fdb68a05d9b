"""What commands print: help, tables, progress, and something within two seconds."""

import io
import json
import os
import select
import subprocess
import time
from pathlib import Path

import pytest
from helpers.command import COMMAND, ENVIRONMENT, flux, write_prompt
from rich.console import Console

from flux_attention.cli import console
from flux_attention.cli.app import COMMANDS
from flux_attention.evaluation.methods import METHODS
from flux_attention.tasks.families import EVERY_FAMILY
from flux_attention.tasks.questions import NATURAL


@pytest.mark.parametrize("name", COMMANDS)
def test_help_groups_options_and_shows_examples(name):
    shown = flux(name, "--help").stdout
    assert f"$ flux-attention {name}" in shown
    assert name == "info" or "─ Result ─" in shown
    assert "Traceback" not in shown and flux(name, "--help").returncode == 0


def test_help_of_eval_lists_methods_and_families():
    words = flux("eval", "--help").stdout.replace(",", " ").split()
    assert {*METHODS, *EVERY_FAMILY, *NATURAL} <= set(words)


@pytest.mark.parametrize("name", ["inspect", "generate", "eval", "calibrate", "train", "demo"])
def test_something_is_said_within_two_seconds(name, tmp_path):
    arguments = {
        "train": ["recipes/none.yaml"],
        "demo": [],
        "calibrate": ["shipped", "--output", str(tmp_path)],
        "eval": ["shipped", "--output", str(tmp_path)],
    }.get(name, ["shipped", write_prompt(tmp_path / "prompt.txt")])
    began = time.monotonic()
    with subprocess.Popen(
        [*COMMAND, name, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"},
    ) as process:
        try:
            assert select.select([process.stdout], [], [], 60)[0] and os.read(process.stdout.fileno(), 100)
            # CPU time of the process alone, as the machine may be busy with other tests; it waits for nothing else.
            used = time.monotonic() - began
            if used >= 2 and (stat := Path(f"/proc/{process.pid}/stat")).exists():
                used = sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
            assert used < 2
        finally:
            process.kill()


@pytest.fixture
def written(monkeypatch):
    """What is printed, on 80 columns."""
    text = io.StringIO()
    for name in ("out", "err"):
        monkeypatch.setattr(console, name, Console(file=text, width=80, color_system=None))
    return text


def test_wide_tables_are_printed_in_parts_that_hold_every_number(written):
    heading = ["method", *(f"static-nll (calibrated) at 0.{place}25" for place in range(8))]
    lines = [["in-context learning"], ["prose, perplexity"]]
    lines = [[*line, *(f"{number + 100 * place}.125" for number in range(8))] for place, line in enumerate(lines)]
    console.print_table(heading, lines, title="a title")
    shown = written.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    assert all(cell in shown.split() for line in lines for cell in line[1:])
    assert shown.count("a title") == 1 and shown.count("method") == shown.count("──\n") > 1
    assert all(f"0.{place}25" in shown for place in range(8))


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(written, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(now)))
    with console.Bars() as bars:
        for done in range(100):
            bars("choosing", done, 100, "[red] 4,096 tokens")
    lines = written.getvalue().strip().splitlines()
    assert len(lines) == 100 // console.LINE_SECONDS - (0 if len(lines) * console.LINE_SECONDS >= 100 else 1)
    assert all(line.startswith("choosing: ") and line.endswith(", [red] 4,096 tokens") for line in lines)


def test_the_time_left_is_as_it_went_so_far():
    assert console.time_left(30.0, 0.5) == "30 s left" and console.time_left(60.0, 0.1) == "9 min left"
    assert console.time_left(3600.0, 0.25) == "3 h 0 min left"
    assert not any([console.time_left(None, 0.5), console.time_left(5.0, 0.0), console.time_left(5.0, 1.0)])


def test_json_of_what_a_program_would_read(tmp_path):
    sizes = ["--families", "plain,copy", "--lengths", "1K", "--samples", "2", "--methods", "dense,routed"]
    (tmp_path / "text.py").write_text("def f(x):\n    return x\n" * 400)
    sizes += ["--text", tmp_path / "text.py"]
    result = flux("eval", "shipped", *sizes, "--output", tmp_path, "--json", "--baseline", "routed")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["results"] == str(tmp_path / "quality.json") and facts["note"] is None
    dense, routed = facts["methods"]
    assert (dense["name"], dense["sparsity"], dense["kv"], routed["points"]) == ("dense", 0.0, 1.0, None)
    assert routed["kv"] < 1 and len(dense["points"]) == 2 and dense["seconds"] > 0
    command = json.loads((tmp_path / "quality.json").read_text())["meta"]["command"]
    assert command.startswith("flux-attention eval shipped --families plain,copy")
    rows = flux("bench", "memory", "--lengths", "1K", "--sparsities", "0,0.5", "--json").stdout.splitlines()
    assert [json.loads(line)["sparsity"] for line in rows if line][:2] == [0.0, 0.5]


def test_inspect_writes_a_page(tmp_path):
    page = tmp_path / "new" / "page.html"
    result = flux("inspect", "shipped", write_prompt(tmp_path / "prompt.txt"), "--html", page)
    assert result.returncode == 0 and f"the page is {page}" in result.stdout, result.stderr
    text = page.read_text(encoding="utf-8")
    assert "<h1>shipped</h1>" in text and "flux-attention inspect shipped" in text and "silver whale" in text
