"""The shipped model for tests: its tokenizer and held-out text, read once, and its routers with a shorter window."""

import pytest
from transformers import AutoTokenizer

from flux_attention import FluxConfig, attach
from flux_attention.names import BACKBONE
from flux_attention.shipped import load_shipped
from flux_attention.tasks.samples import Haystack
from flux_attention.tasks.text import local_texts

#: Of ``short_adapter``: some hundred tokens are more than sparse layers see.
SPARSE = dict(sink=16, window=64, pool_size=16)


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(BACKBONE)


@pytest.fixture(scope="session")
def haystack(tokenizer):
    return Haystack(local_texts(True, max_chars=200_000), tokenizer)


@pytest.fixture(scope="session")
def short_adapter(tmp_path_factory):
    """A folder with the shipped routers, whose sparse layers see less, so that short prompts will do."""
    model, _, shipped = load_shipped()
    shipped.detach()
    routing = attach(model, FluxConfig(**SPARSE))
    routing.routers.load_state_dict(shipped.routers.state_dict())
    folder = tmp_path_factory.mktemp("short") / "routers"
    routing.save_pretrained(folder)
    return str(folder)
