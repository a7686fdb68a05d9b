"""The shipped tokenizer, and held-out text in its tokens: read once for all tests."""

import pytest
from transformers import AutoTokenizer

from flux_attention.named import BACKBONE
from flux_attention.tasks.samples import Haystack
from flux_attention.tasks.text import local_texts


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(BACKBONE)


@pytest.fixture(scope="session")
def haystack(tokenizer):
    return Haystack(local_texts(True, max_chars=200_000), tokenizer)
