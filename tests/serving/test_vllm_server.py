"""The real server on loopback: what a client sees of routing."""

import concurrent.futures
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from flux_attention.names import BACKBONE

TEXT = "def area(width, height):\n    return width * height\n\n\n" * 60


LOGS = {}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path_factory.mktemp("server") / "log"
    log, LOGS[f"http://127.0.0.1:{port}"] = path.open("w+"), path
    environment = {
        **os.environ, "FLUX_ATTENTION_ROUTERS": "shipped", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    command = [Path(sys.executable).parent / "vllm", "serve", BACKBONE, "--served-model-name", "shipped"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "4096"]
    process = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=subprocess.STDOUT)
    address, limit = f"http://127.0.0.1:{port}", time.monotonic() + 240
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > limit:
                    log.seek(0)
                    pytest.fail("the server does not start:\n" + log.read()[-4000:])
                time.sleep(0.5)
        yield address
        log.seek(0)
        assert "flux-attention routes requests by shipped" in log.read()
    finally:
        process.terminate()
        process.wait(60)


def post(url, timeout=120, **body):
    """Ask for a completion: the status and the answer, or the error's message."""
    body = json.dumps({"model": "shipped", "max_tokens": 8, "temperature": 0, **body}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            text = response.read().decode()
            return response.status, text if b'"stream": true' in body else json.loads(text)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]["message"]


def text(url):
    return urllib.request.urlopen(f"{url}/metrics").read().decode()


def log_of(url):
    return LOGS[url].read_text()


def omega(answer):
    return answer["kv_transfer_params"]["flux_attention"]["omega_msr"]


def test_an_answer_tells_its_omega(url):
    status, answer = post(url, prompt=TEXT)
    assert status == 200 and 0 < omega(answer) <= 1
    for routes, expected in (("full", 0), ("sparse", 1), (0.5, 0.5), ("0.3", 0.3), ([3, 7], 0.8)):
        status, answer = post(url, prompt=TEXT, vllm_xargs={"flux_routes": routes})
        assert status == 200 and omega(answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    "wish, message",
    [
        ({"flux_routes": "most"}, "cannot force 'most'"),
        ({"flux_routes": 2.5}, "2.5"),
        ({"flux_budget": 0.5}, "take no budget"),
        ({"flux_ruotes": "full"}, "unknown arguments"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_wish_that_means_nothing_is_the_clients_error(url, wish, message, stream):
    status, told = post(url, prompt=TEXT, vllm_xargs=wish, stream=stream)
    assert status == 400 and message in told
    assert post(url, prompt=TEXT)[0] == 200


def test_many_clients_at_once_get_what_each_gets_alone(url):
    prompts = [TEXT[cut:] + f"\n# {cut}\ndef " for cut in range(0, 2600, 200)]
    wishes = [{}, {"vllm_xargs": {"flux_routes": "sparse"}}, {"vllm_xargs": {"flux_routes": "full"}}] * 5
    asked = [{"prompt": prompt, **wish} for prompt, wish in zip(prompts, wishes, strict=False)]

    def answer(body):
        status, found = post(url, **body)
        return status, found["choices"][0]["text"], omega(found)

    alone = [answer(body) for body in asked]
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        # One that leaves in the middle of its answer.
        left = pool.submit(post, url, 0.3, prompt=TEXT, max_tokens=900)
        together = list(pool.map(answer, asked))
        assert isinstance(left.exception(), OSError)
    assert together == alone and len(set(alone)) > 5


def test_answers_stream(url):
    status, whole = post(url, prompt=TEXT)
    status, events = post(url, prompt=TEXT, stream=True)
    pieces = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    assert status == 200 and len(pieces) > 3
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole["choices"][0]["text"]


def test_metrics_count_what_was_routed(url):
    def read():
        text = urllib.request.urlopen(f"{url}/metrics").read().decode()
        return {
            name: float(re.search(rf"^flux_attention_omega_msr_{name} (\S+)", text, re.M)[1])
            for name in ("count", "sum")
        }

    before = read()
    post(url, prompt=TEXT, vllm_xargs={"flux_routes": 0.5})
    after = read()
    assert after["count"] - before["count"] == 1 and after["sum"] - before["sum"] == pytest.approx(0.5)
    dense = [
        float(fit) for fit in re.findall(r"flux-attention: ([\d.]+) requests of 4096 tokens fit dense", log_of(url))
    ]
    fit = float(re.search(r"^flux_attention_requests_that_fit (\S+)", text(url), re.M)[1])
    assert dense and fit > dense[0]
