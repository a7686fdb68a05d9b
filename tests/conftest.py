"""What all tests share: one thread a process, Triton's interpreter where there is no GPU, models by family."""

import atexit
import gc
import os
import shutil
import tempfile
import warnings
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton, as some versions of transformers do
    os.environ["TRITON_INTERPRET"] = "1"

from helpers.models import FAMILIES, tiny_model

# What `datasets` keeps of earlier test runs would hide what this code does; before it is imported.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="flux-datasets-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

# One test process a core: more threads than cores slow each other down many times over.
torch.set_num_threads(1)

#: Files for packages that a GPU host of one's own may lack.
collect_ignore = [
    path
    for package, path in (("lm_eval", "evaluation/test_lm_harness.py"), ("peft", "hf/test_modules.py"))
    if find_spec(package) is None
]
#: Those of the server, which `make test-serving` runs where there is one.
collect_ignore_glob = [] if find_spec("vllm") else ["serving/test_vllm_*.py"]
#: Where fixtures that several folders share are.
pytest_plugins = [
    "helpers.compiling",
    "helpers.decoding",
    "helpers.hub",
    "helpers.kernels",
    "helpers.lm_tasks",
    "helpers.shipped",
    "helpers.training",
]


def pytest_collection_finish():
    """What is imported stays: each compilation looked through its million objects for garbage, a third of its time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 10, 10)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return tiny_model(family)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torchvision.*")
        yield
