"""The command that opens the page: what is refused before, and how it ends."""

import os
import signal
import socket
import subprocess
import urllib.request

import pytest
import transformers
from helpers.command import COMMAND, ENVIRONMENT, flux
from helpers.models import SMALL

from flux_attention.cli import playground as command


@pytest.fixture
def gradio():
    return pytest.importorskip("gradio", reason="the page needs gradio; `make test-playground` installs it")


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    result = flux("playground")
    assert result.returncode == 1 and "pip install 'flux-attention[playground]'" in result.stderr


def test_a_model_that_cannot_be_routed_is_refused_before_a_page_opens(gradio, tokenizer, tmp_path, monkeypatch):
    import flux_attention.playground.page as page

    monkeypatch.setattr(page, "launch", lambda *_: pytest.fail("a page was opened"))
    config = transformers.Gemma2Config(**SMALL | {"vocab_size": len(tokenizer)}, head_dim=16)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    result = flux("playground", tmp_path, "--device", "cpu")
    assert result.returncode == 1 and "caps attention logits, which routed layers" in result.stderr
    result = flux("playground", "no/such/folder")
    assert result.returncode == 1 and "no such folder no/such/folder" in result.stderr


def test_a_port_that_is_taken_is_named(gradio):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = flux("playground", "--device", "cpu", "--port", port)
    assert result.returncode == 1 and f"port {port} is taken" in result.stderr and "another port" in result.stderr


def test_ctrl_c_ends_it(gradio):
    options = dict(
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"}
    )
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen([*COMMAND, "playground", "--device", "cpu"], **options) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("The playground of shipped is at http://127.0.0.1:"), process.stderr.read()
            address = line.split(" is at ")[1].split(" ")[0]
            with urllib.request.urlopen(address, timeout=20) as page:
                assert "flux-attention playground" in page.read().decode()
            os.kill(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=30)
            assert process.returncode == 130 and err.split("\n")[1:] == ["interrupted", ""] and not out
        finally:
            process.kill()
