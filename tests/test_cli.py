"""The command line in a subprocess: output, JSON, exit codes, one-line errors."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

COMMAND = [sys.executable, "-m", "flux_attention.cli"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


def flux(*arguments, stdin="", timeout=300):
    return subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, text=True, env=ENVIRONMENT, timeout=timeout
    )


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "prompt.txt"
    lines = [f"x{i} = compute({i})" for i in range(400)]
    lines.insert(50, "# The secret code of the silver whale is 48213.")  # behind the sink, before the window
    path.write_text("\n".join(lines) + "\n# Question: What is the secret code of the silver whale?\n# Answer:\n")
    return str(path)


def test_info():
    facts = json.loads(flux("info", "--json").stdout)
    assert facts["torch"] and facts["transformers"] and facts["device"]
    shown = flux("info")
    assert shown.returncode == 0 and facts["torch"] in shown.stdout


def test_bench(tmp_path):
    result = flux("bench", "memory", "--lengths", "1K,128K", "--sparsities", "0,0.75", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert [(row["seq_len"], row["sparsity"]) for row in rows] == [(1024, 0), (131072, 0), (1024, 0.75), (131072, 0.75)]
    token = 2 * 8 * 128 * 2  # K and V, KV heads, head dim, bf16
    assert rows[1]["kv_bytes"] == rows[1]["baseline_kv_bytes"] == 36 * 131072 * token
    assert rows[3]["kv_bytes"] == (9 * 131072 + 27 * 1152) * token
    assert rows[3]["longest_context"] > 3.9 * rows[1]["longest_context"]
    more = ["bench", "memory", "--lengths", "1K", "--sparsities", "0", "--output", str(tmp_path)]
    kept = {"llama-3.1-8b": rows, "qwen3-8b": rows[1:]}  # what was not measured again
    for shape, others in kept.items():
        result = flux(*more, "--shapes", shape)
        assert result.returncode == 0, result.stderr
        now = json.loads((tmp_path / "memory.json").read_text())["rows"]
        assert now[: len(others)] == others and now[-1]["shape"] == shape
    assert len(now) == len(rows) + 1
    results = json.loads((tmp_path / "memory.json").read_text())
    results["meta"]["commit"] = "another"
    for text in (json.dumps(results), json.dumps(results)[:100]):
        (tmp_path / "memory.json").write_text(text)
        assert flux(*more, "--shapes", "llama-3.1-8b").returncode == 0
        assert len(json.loads((tmp_path / "memory.json").read_text())["rows"]) == 1
    for arguments, words in (
        (["nothing"], "cannot measure"),
        (["memory", "--shapes", "gpt-5"], "unknown shapes"),
        (["memory", "--lengths", "long"], "not a list of numbers"),
        (["memory", "--lengths", ""], "not a list of numbers"),
        (["memory", "--sparsities", "2"], "not between 0 and 1"),
        (["memory", "--output", __file__], "exists"),
    ):
        result = flux("bench", *arguments)
        assert result.returncode == 1 and words in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_needs_a_gpu():
    result = flux("bench", "prefill")
    assert result.returncode == 1 and "NVIDIA GPU" in result.stderr


def test_inspect(prompt):
    result = flux("inspect", "shipped", prompt, "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    sequence = facts["sequences"][0]
    assert len(sequence["routes"]) == 10 and 0 <= sequence["msr"] <= 1
    assert (
        facts["baseline_kv_bytes"] == sequence["tokens"] * 10 * 2 * 64 * 2 * 2
    )  # layers, KV heads, dim, K and V, bf16
    with open(prompt) as file:
        piped = flux("inspect", "shipped", "-", "--json", stdin=file.read())
    assert json.loads(piped.stdout) == facts
    shown = flux("inspect", "shipped", prompt, "--force", "sparse")
    assert "░░░░░░░░░░  0/10 layers full" in shown.stdout and "KV cache" in shown.stdout


def test_generate_answers_a_question_about_its_prompt(prompt):
    result = flux("generate", "shipped", prompt, "--max-new-tokens", "7", "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[0] == "48213"
    facts = json.loads(
        flux("generate", "shipped", prompt, "--max-new-tokens", "7", "--dtype", "float32", "--json").stdout
    )
    assert facts["text"].split()[0] == "48213" and facts["kv_bytes"] > 0
    blind = flux("generate", "shipped", prompt, "--max-new-tokens", "7", "--dtype", "float32", "--force", "sparse")
    assert "48213" not in blind.stdout


def test_demo_shows_every_family():
    result = flux("demo", "--samples", "1", "--length", "1024", "--seed", "3")
    assert result.returncode == 0, result.stderr
    for shown in (
        "one fact in the text",
        "two look-ups",
        "how often",
        "perplexity",
        "layers full",
        "Ω_MSR",
        "answered",
    ):
        assert shown in result.stdout, shown
    rows = json.loads(flux("demo", "--samples", "1", "--length", "1024", "--seed", "3", "--json").stdout)
    assert len(rows) == 21 and {row["method"] for row in rows} == {"dense", "routed", "sparse"}


ERRORS = {
    "no such model": (["inspect", "no/such-model", "{prompt}"], 1, "cannot load 'no/such-model' as a causal LM"),
    "no such routers": (
        ["inspect", "shipped", "{prompt}", "--routers", "/nowhere"],
        1,
        "no such folder: /nowhere",
    ),
    "no such file": (["inspect", "shipped", "/nowhere.txt"], 1, "/nowhere.txt is not a file"),
    "empty prompt": (["inspect", "shipped", "-"], 1, "the prompt in standard input is empty"),
    "bad force": (["inspect", "shipped", "{prompt}", "--force", "dense"], 1, "cannot force 'dense'"),
    "bad layer": (["inspect", "shipped", "{prompt}", "--force", "3,99"], 1, r"cannot force layers [99]"),
    "bad ratio": (["inspect", "shipped", "{prompt}", "--force", "1.5"], 1, "cannot force the ratio 1.5"),
    "bad dtype": (["inspect", "shipped", "{prompt}", "--dtype", "int3"], 1, "dtype is 'int3'"),
    "no GPU": (["inspect", "shipped", "{prompt}", "--device", "cuda:7"], 1, "sees no CUDA GPU"),
    "unknown option": (["inspect", "shipped", "--nope"], 2, "No such option"),
    "unknown command": (["inspekt"], 2, "No such command"),
    "markup in a name": (["inspect", "shipped", "[/nope].txt"], 1, "[/nope].txt is not a file"),
    "bad device": (["inspect", "shipped", "{prompt}", "--device", "banana"], 1, "device is 'banana'"),
    "too long to generate": (
        ["generate", "shipped", "{prompt}", "--max-new-tokens", "9000"],
        1,
        "9000 are to be generated",
    ),
    "no tokens": (["generate", "shipped", "{prompt}", "--max-new-tokens", "0"], 2, "max-new-tokens"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line_with_a_conventional_exit_code(name, prompt):
    import torch

    if name == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    arguments, code, message = ERRORS[name]
    result = flux(*[argument.format(prompt=prompt) for argument in arguments])
    assert result.returncode == code
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr and result.stdout == ""
    if code == 1:
        assert len(result.stderr.strip().splitlines()) == 1


def test_debug_shows_the_traceback():
    result = flux("--debug", "inspect", "shipped", "/nowhere.txt")
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_oversized_prompt(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("word " * 20000)
    result = flux("inspect", "shipped", str(path))
    assert result.returncode == 1 and "the model reads at most 8192; shorten it" in result.stderr


def test_not_text(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(b"\xff\xfe\x00")
    result = flux("inspect", "shipped", str(path))
    assert result.returncode == 1 and "is not UTF-8 text (byte 0)" in result.stderr


def test_interrupt():
    def take_interrupts():  # a job started in the background has them ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        [*COMMAND, "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"},
        preexec_fn=take_interrupts,
    ) as process:
        process.stdout.readline()  # it is at work
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in stderr
    assert "Traceback" not in stderr


def test_closed_pipe_is_quiet(prompt):
    result = subprocess.run(
        f"'{sys.executable}' -m flux_attention.cli info | head -n 0",
        shell=True,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert "Traceback" not in result.stderr


def test_import_is_light():
    code = (
        "import time, transformers\n"
        "began = time.perf_counter()\n"
        "import flux_attention\n"
        "print(time.perf_counter() - began)\n"
        "from flux_attention.attach import Routing\n"  # the submodule must not hide the function of its name
        "from flux_attention import attach\n"
        "assert callable(attach) and callable(flux_attention.attach) and 'attach' in dir(flux_attention)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 0.3
