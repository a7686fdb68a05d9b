"""Exit codes, errors of one line, signals and pipes."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from helpers.command import COMMAND, ENVIRONMENT, flux, flux_process, write_prompt

import flux_attention

#: name: arguments, exit code, what is said
ERRORS = {
    "no such model": (["inspect", "no/such-model", "{prompt}"], 1, "cannot load 'no/such-model' as a causal LM"),
    "no such folder": (["inspect", "./nowhere", "{prompt}"], 1, "no such folder ./nowhere; check the path"),
    "no such routers": (
        ["inspect", "shipped", "{prompt}", "--routers", "no/where"],
        1,
        "neither a directory nor a Hub repository",
    ),
    "no such folder of routers": (["eval", "shipped", "--routers", "/nowhere"], 1, "no such folder /nowhere"),
    "no such file": (["inspect", "shipped", "/nowhere.txt"], 1, "/nowhere.txt is not a file"),
    "empty prompt": (["inspect", "shipped", "-"], 1, "the prompt in standard input is empty"),
    "bad force": (["inspect", "shipped", "{prompt}", "--force", "dense"], 1, "cannot force 'dense'"),
    "bad layer": (["inspect", "shipped", "{prompt}", "--force", "3,99"], 1, r"cannot force layers [99]"),
    "bad ratio": (["inspect", "shipped", "{prompt}", "--force", "1.5"], 1, "cannot force the ratio 1.5"),
    "no budget": (["inspect", "shipped", "{prompt}", "--budget", "0.5"], 1, "were not trained with one"),
    "bad budget": (["generate", "shipped", "{prompt}", "--budget", "1.5"], 2, "--budget"),
    "bad decide": (["inspect", "shipped", "{prompt}", "--decide", "middle"], 1, "decide is 'middle', expected one of"),
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
    "unknown method": (["eval", "shipped", "--methods", "dense,guess"], 1, "unknown methods ['guess']"),
    "unknown family": (["eval", "shipped", "--families", "poems"], 1, "unknown families ['poems']"),
    "too long a sample": (["eval", "shipped", "--lengths", "16K"], 1, "do not fit into the model's 8192 positions"),
    "no adapter": (["eval", "{model}", "--methods", "routed"], 1, "needs an adapter with routers: name one"),
    "no budgets": (["eval", "{model}", "--methods", "static"], 1, "or --budgets"),
    "no use for budgets": (["eval", "shipped", "--budgets", "0.5"], 1, "budgets are for adapters with a ranking"),
    "two patterns": (["eval", "shipped", "--sink", "8"], 1, "--sink and --window are for judging without adapters"),
    "two sources": (["eval", "shipped", "--records", "x", "--families", "copy"], 1, "take a run each"),
    "no records": (["eval", "shipped", "--records", "/nowhere.jsonl"], 1, "cannot read /nowhere.jsonl"),
    "no template": (["eval", "shipped", "--chat"], 1, "has no chat template"),
    "no template to generate": (["generate", "shipped", "{prompt}", "--chat"], 1, "has no chat template"),
    "a page that is a folder": (
        ["inspect", "shipped", "{prompt}", "--html", "."],
        1,
        "--html is ., a folder; expected",
    ),
    "no such baseline": (["eval", "shipped", "--baseline", "head"], 1, "--baseline is 'head', which is not judged"),
    "json of a run": (["train", "{prompt}", "--json"], 1, "--json is for --dry-run"),
    "no such route": (["eval", "shipped", "--force", "99"], 1, "cannot force layers [99]"),
    "no folder to write": (["eval", "shipped", "--output", "{prompt}/o"], 1, "cannot write into"),
    "no folder for speed": (["bench", "memory", "--output", "{prompt}"], 1, "cannot write into"),
    "no checkpoint": (["import", "./nowhere", "--output", "out"], 1, "no such folder ./nowhere"),
    "no checkpoint of theirs": (["import", "{model}", "--output", "out"], 1, "stock models need no import"),
    "no recipe": (["train", "nowhere.yaml"], 1, "nowhere.yaml is not a file"),
}


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    return write_prompt(tmp_path_factory.mktemp("cli") / "prompt.txt")


@pytest.fixture
def unloaded(monkeypatch, tmp_path):
    """Whatever loads a model fails; outputs that a command would make go to a folder of the test's."""
    from transformers import AutoModelForCausalLM

    def load(*arguments, **options):
        raise AssertionError("a model was loaded before the arguments were checked")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line_with_a_conventional_exit_code_before_anything_is_loaded(name, prompt, unloaded):
    if name == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    from flux_attention.shipped import BACKBONE

    arguments, code, message = ERRORS[name]
    result = flux(*[argument.format(prompt=prompt, model=BACKBONE) for argument in arguments])
    assert result.returncode == code
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr and result.stdout == ""
    if code == 1:
        assert len(result.stderr.strip().splitlines()) == 1


def test_debug_shows_the_traceback_and_only_of_its_own_call():
    result = flux("--debug", "inspect", "shipped", "/nowhere.txt")
    assert result.returncode == 1 and "Traceback" in result.stderr
    result = flux("inspect", "shipped", "/nowhere.txt")
    assert result.returncode == 1 and "Traceback" not in result.stderr


def test_a_process_of_its_own():
    result = flux_process("inspect", "shipped", "/nowhere.txt")
    assert result.returncode == 1 and result.stderr.startswith("error: /nowhere.txt is not a file")
    assert flux_process("inspect", "--nope").returncode == 2


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


def test_closed_pipe_is_quiet():
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
        "import sys, time\n"
        "import flux_attention.cli\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"  # help and wrong arguments are there at once
        "import transformers\n"
        "began = time.perf_counter()\n"
        "import flux_attention\n"
        "print(time.perf_counter() - began)\n"
        "from flux_attention import attach\n"
        "assert callable(attach) and callable(flux_attention.attach) and 'attach' in dir(flux_attention)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 0.3


def test_info():
    facts = json.loads(flux("info", "--json").stdout)
    assert facts["torch"] and facts["transformers"] and facts["device"]
    shown = flux("info")
    assert shown.returncode == 0 and facts["torch"] in shown.stdout


def test_the_version():
    assert flux("--version").stdout == f"flux-attention {flux_attention.__version__}\n"
