"""Layers fused by torch.compile against the same layers as they are."""

import re
import shutil

import pytest
import torch
from helpers.models import CONFIG, FAMILIES, ids, randomize, tiny_model
from torch._inductor.utils import run_and_get_code

from flux_attention import UnsupportedModelError, attach
from flux_attention.hf import compiled, mlp


def again(routing, model):
    """The same routers, with compiled layers."""
    compiled = attach(model, CONFIG, compile=True)
    compiled.routers.load_state_dict(routing.routers.state_dict())
    return compiled


@torch.no_grad()
def run(model, routing=None):
    """Logits of prompts of many lengths, padded batches, further turns and single tokens; and what was decided."""
    outputs, routes = [], []
    for batch, length in ((1, 20), (1, 33), (3, 24), (1, 1)):
        prompt = ids(batch, length, length)
        mask = torch.ones_like(prompt)
        if batch > 1:
            mask[-1, : length // 2] = 0
        first = model(prompt, attention_mask=mask, use_cache=True)
        outputs.append(first.logits[mask.bool()])
        routes.append(None if routing is None else routing.routes.routes_BL)
        cache = first.past_key_values
        for new in (5, 1, 1):
            mask = torch.cat([mask, mask.new_ones(batch, new)], dim=1)
            outputs.append(model(ids(batch, new), attention_mask=mask, past_key_values=cache).logits)
        outputs.append(model(prompt, use_cache=False).logits)
    return outputs, routes


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_compute_the_same(family, backend):
    model = tiny_model(family, **({} if family == "gemma3" else {"num_hidden_layers": 4}))
    routing = randomize(attach(model, CONFIG))
    expected, expected_routes = run(model, routing)
    routing.detach()
    stock_layer = vars(model.get_decoder().layers[0]).get("forward")
    routing = again(routing, model)
    actual, routes = run(model, routing)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=2e-5, rtol=1e-4)
    for a, e in zip(routes, expected_routes, strict=True):
        assert torch.equal(a, e)
    assert 0 < sum(route.float().mean() for route in routes) < len(routes)  # layers of both kinds ran
    assert 1 <= backend.frame_count <= 4, "layers and lengths do not share a graph"
    routing.detach()
    assert vars(model.get_decoder().layers[0]).get("forward") is stock_layer
    assert not any(hasattr(module, "flux_layer") for module in model.modules())


@torch.no_grad()
def test_long_prompts_are_cut_into_as_many_pieces_whatever_their_length(backend, monkeypatch):
    """A graph for short and one for long ones, of one sequence and of more."""
    monkeypatch.setattr(mlp, "CHUNK_TOKENS", 8)
    monkeypatch.setattr(mlp, "ALIGNMENT", 4)
    model = tiny_model("qwen3", num_hidden_layers=1)
    sizes = [(1, 20), (1, 33), (1, 75), (1, 160), (2, 10), (2, 17), (3, 50)]
    routing = attach(model, CONFIG)
    pieces = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: pieces.append(1))
    with routing.force("sparse"):
        expected = [model(ids(*size)).logits for size in sizes]
    assert len(pieces) > 2 * len(sizes)  # those that are not compiled are cut, too
    handle.remove()
    routing.detach()
    with attach(model, CONFIG, compile=True).force("sparse"):
        for size, logits in zip(sizes, expected, strict=True):
            torch.testing.assert_close(model(ids(*size)).logits, logits, atol=2e-5, rtol=1e-4)
    assert backend.frame_count == 4


def test_training_is_not_compiled(backend):
    model = tiny_model("qwen3").requires_grad_(False)
    routing = attach(model, CONFIG, compile=True)
    with routing.soft(1.0):
        model(ids(2, 20), labels=ids(2, 20)).loss.backward()
    assert backend.frame_count == 0
    assert all(parameter.grad is not None for parameter in routing.routers.parameters())


class DataDependent(torch.nn.Module):
    def forward(self, states):
        return states if states.sum().item() > 0 else -states


def test_what_cannot_be_compiled_is_named(backend):
    model = tiny_model("qwen3")
    for layer in model.model.layers:
        layer.mlp.act_fn = DataDependent()
    attach(model, CONFIG, compile=True)
    with pytest.raises(UnsupportedModelError, match="attach without compile=True"), torch.no_grad():
        model(ids(1, 20))


@torch.no_grad()
def test_many_models_are_compiled_in_one_process(backend):
    """All of them share the function that is compiled, and PyTorch's limit of its graphs is not theirs."""
    models = [tiny_model(family, num_hidden_layers=1) for family in ("llama", "qwen3", "phi3")]
    with torch._dynamo.config.patch(recompile_limit=1):
        for model in models:
            with attach(model, CONFIG, compile=True).force("sparse"):
                model(ids(1, 30))
    assert backend.frame_count == len(models)


def test_too_many_graphs_are_named(backend, monkeypatch):
    monkeypatch.setattr(compiled, "MAX_GRAPHS", 1)
    attach(other := tiny_model("llama", num_hidden_layers=1), CONFIG, compile=True)
    with torch.no_grad():
        other(ids(1, 30))
        with pytest.raises(UnsupportedModelError, match="attach without compile=True"):
            other(ids(3, 30))


@torch.no_grad()
def test_generated_code():
    """The real compiler, once: for the CPU here, for the GPU in `make gpu-test`."""
    torch._dynamo.reset()
    model = tiny_model("qwen3", num_hidden_layers=2)
    prompt = ids(2, 50)
    routing = randomize(attach(model, CONFIG))
    expected = model(prompt).logits
    routing.detach()
    again(routing, model)
    torch.testing.assert_close(model(prompt).logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@torch.no_grad()
def test_a_users_own_compile_still_works(family):
    torch._dynamo.reset()
    kinds = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3" else {}
    model = tiny_model(family, num_hidden_layers=2, **kinds)
    with attach(model, CONFIG).force("sparse"):
        expected = model(ids(2, 30)).logits
        actual = torch.compile(model, backend="eager")(ids(2, 30)).logits
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is not installed, and torch.compile builds code for a CPU with it"
)
def test_the_device_has_work_while_the_host_waits_for_the_router():
    """A router is asked as soon as the query is there, before keys and values are computed."""
    torch._dynamo.reset()
    model = tiny_model("qwen3", num_hidden_layers=1)
    attach(model, CONFIG, compile=True)
    with torch.no_grad():
        _, (code,) = run_and_get_code(model, ids(1, 40))
    calls = re.findall(r"extern_kernels\.(mm)\(|ops\.flux_attention\.(\w+)\.default\(", code.partition("def call(")[2])
    assert ["".join(names) for names in calls][:5] == ["mm", "observe", "mm", "mm", "attend"]
    torch._dynamo.reset()


@torch.no_grad()
def test_products_of_a_decode_step_read_what_is_in_memory():
    """Those of query, gate and down; the others of a layer read the same, or what attention gave."""
    torch._dynamo.reset()
    materialized = []

    def backend(graph, inputs):
        materialized.append([node.args[0] for node in graph.graph.nodes if "materialize" in str(node.target)])
        return graph

    model = tiny_model("qwen3", num_hidden_layers=2)
    with attach(model, CONFIG, compile=True).force("sparse"):
        again = torch.compile(model.model.layers[0].mlp, backend=backend)
        again(torch.randn(1, 1, model.config.hidden_size))
        again(torch.randn(1, 7, model.config.hidden_size))
    assert [len(nodes) for nodes in materialized] == [2, 0]
    torch._dynamo.reset()


def test_hidden_states_of_compiled_layers_are_refused():
    model = tiny_model("qwen3")
    attach(model, CONFIG, compile=True)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="compiled layers give no hidden states"):
        model(ids(1, 8), output_hidden_states=True)
