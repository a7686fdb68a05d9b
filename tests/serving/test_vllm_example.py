"""The example of docs/ecosystem.md for vLLM runs, with the shipped model in place of the reader's."""

import os
from unittest import mock

import pytest
from helpers.examples import as_a_reader, sections
from vllm.platforms import current_platform

from flux_attention.names import ROUTERS

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="of float32, which no attention on GPUs takes")


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    swap = as_a_reader(tmp_path, ROUTERS)
    (code,) = sections("docs/ecosystem.md")["vLLM"]
    options = 'dtype="float32", enforce_eager=True, max_model_len=2048)'  # of a machine without a GPU
    code = swap(code.replace('LLM("Qwen/Qwen3-8B")', f'LLM("Qwen/Qwen3-8B", {options}'))
    assert options in code
    with mock.patch.dict(os.environ, HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1"):
        exec(compile(code, "docs/ecosystem.md, vLLM", "exec"), names := {})
    assert names["answer"].kv_transfer_params == {"flux_attention": {"omega_msr": pytest.approx(0.8)}}
    assert names["answer"].outputs[0].text
