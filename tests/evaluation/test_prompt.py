"""One prompt as a page: what is counted, and a page that needs nothing else."""

import re

import pytest
import torch

from flux_attention.evaluation.prompt import costs_of, layers_of, write_prompt_page
from flux_attention.hf.cache.size import kv_bytes
from flux_attention.hf.report import make_report
from flux_attention.shipped import load_shipped

TOKENS = 1000


@pytest.fixture(scope="module")
def shipped():
    return load_shipped()


def read(shipped, tokens=TOKENS, routes=None):
    """Read a prompt; returns the handle, its cache and its report."""
    model, tokenizer, routing = shipped
    ids = torch.arange(300, 300 + tokens)[None] % tokenizer.vocab_size
    with torch.no_grad(), routing.force(routes):
        cache = model.get_decoder()(ids, use_cache=True).past_key_values
    return routing, cache, make_report(routing, cache, [0], routing.routes.lengths)


def test_layers_are_those_of_the_cache_and_of_the_routers(shipped):
    routing, cache, _ = read(shipped)
    layers = layers_of(routing.routes, cache)
    assert [layer.full for layer in layers] == routing.routes.routes_BL[0].tolist()
    assert all((layer.margin > 0) == layer.full for layer in layers)
    assert sum(layer.kv_bytes for layer in layers) == kv_bytes(cache)
    assert {layer.tokens for layer in layers} == {768, TOKENS}
    pairs = routing.routes.sparse.mask(TOKENS).sum().item() / (TOKENS * (TOKENS + 1) / 2)
    assert all(layer.reads == pytest.approx(1 if layer.full else pairs) for layer in layers)
    routing, cache, _ = read(shipped, routes=[3])
    assert [layer.name for layer in layers_of(routing.routes, cache) if layer.full] == ["3"]
    assert {layer.margin for layer in layers_of(routing.routes, cache)} == {None}


def test_costs_are_counted_as_by_hand(shipped):
    routing, _, report = read(shipped, routes="sparse")
    model, config = shipped[0], shipped[0].config
    costs = costs_of(routing, report)
    layers = sum(weight.numel() for weight in model.model.layers.parameters())
    layers += sum(weight.numel() for weight in model.model.norm.parameters())
    assert costs.weight_flops == 2 * TOKENS * layers
    pairs, width = TOKENS * (TOKENS + 1) // 2, 4 * config.num_attention_heads * config.head_dim
    assert costs.dense_attention_flops == len(routing.layers) * pairs * width
    mask = routing.routes.sparse.mask(TOKENS).sum().item()
    assert costs.attention_flops == len(routing.layers) * mask * width
    itemsize = model.dtype.itemsize
    assert costs.weight_bytes == itemsize * (layers + config.vocab_size * config.hidden_size)
    assert costs.step > 1 < costs.prefill
    _, _, dense = read(shipped, routes="full")
    assert (costs_of(routing, dense).step, costs_of(routing, dense).prefill) == (1, 1)


@pytest.mark.parametrize("tokens, routes", [(TOKENS, None), (300, "sparse")])
def test_the_page_needs_nothing_else_and_is_small(shipped, tmp_path, tokens, routes):
    routing, cache, report = read(shipped, tokens, routes)
    path = tmp_path / "page.html"
    more = dict(model="owner/<m>", adapter="a&b", text="<first>" * 100 + "<last>", command="flux-attention inspect <m>")
    write_prompt_page(path, routing, cache, report, **more)
    page = path.read_text(encoding="utf-8")
    assert len(page) < 60_000 and "<m>" not in page and "owner/&lt;m&gt;" in page and "&lt;last&gt;" in page
    assert re.findall(r"""(src|href)\s*=\s*["'](?!#|data:)|url\((?!#)|@import|<script|<link""", page) == []
    assert "prefers-color-scheme: dark" in page and "no time is measured" in page
    assert page.count("<li>") == len(routing.layers) == page.count("</td></tr>") - 4
    assert ("Nothing is saved in the prompt" in page) == (tokens < 768)
    assert ("no router ran" in page) == (routes is not None)


def test_heads_are_refused(shipped, tmp_path, monkeypatch):
    routing, cache, report = read(shipped)
    monkeypatch.setattr(routing, "by_head", True)
    with pytest.raises(ValueError, match="heads are routed; expected routers by layer"):
        write_prompt_page(tmp_path / "page.html", routing, cache, report, model="m")
    assert not list(tmp_path.iterdir())
