"""Captured decode steps: what is captured, kept, refused and tried again."""

import functools
import threading
import time

import pytest
import torch
from helpers.decoding import FULL_OUTPUT, assert_agree, both, routed
from helpers.models import ids, tiny_model

from flux_attention import attach
from flux_attention.hf.generation.step import DecodeStep, decode_step, unsupported

pytest.importorskip("triton", reason="Triton has no package for this platform")


def test_threads_share_a_capture(device, monkeypatch):
    model, routing = routed("qwen3", device)
    made = []
    prepare = DecodeStep._prepare

    def slow(step):
        made.append(step)
        time.sleep(0.3)
        return prepare(step)

    monkeypatch.setattr(DecodeStep, "_prepare", slow)
    found = []
    make = functools.partial(threading.Thread, target=lambda: found.append(decode_step(routing, 1)), daemon=True)
    threads = [make() for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)  # if one waits for ever, fail
    assert len(made) == 1 and len(found) == 3 and len(set(map(id, found))) == 1


def test_weights_that_move_are_captured_again(device):
    model, routing = routed("qwen3", device)
    prompt = ids(3, 20).to(device)
    both(model, routing, input_ids=prompt, max_new_tokens=5, do_sample=False)
    (before,) = routing.steps.made.values()
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5
    stock, ours, _ = both(model, routing, input_ids=prompt, max_new_tokens=5, **FULL_OUTPUT)
    assert_agree(stock, ours)
    (after,) = routing.steps.made.values()
    assert after is not before


def test_what_cannot_be_captured_is_named(device, monkeypatch):
    model, routing = routed("gemma3", device)
    assert "no router" in unsupported(routing)
    with pytest.raises(ValueError, match="no router"):
        decode_step(routing, 1)
    assert model.generate(ids(1, 5).to(device), max_new_tokens=3, do_sample=False).shape == (1, 8)
    model, routing = routed("qwen3", device)
    model.float()
    assert "float32" in unsupported(routing)


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_compiled_layers_decode_the_same(family, device, request):
    torch._dynamo.reset()
    if device == "cpu":  # what is compiled is tested elsewhere; here, that it is captured
        request.getfixturevalue("backend")
    model, routing = routed(family, device, compile=True)
    for length in (20, 31):
        stock, ours, _ = both(model, routing, input_ids=ids(3, length).to(device), max_new_tokens=5, **FULL_OUTPUT)
        assert_agree(stock, ours)
    assert len(routing.steps) == 1


def test_what_a_step_would_leave_out_decodes_as_stock(device):
    """Positions of the caller's own, hooks of the caller's own, training mode."""
    model, routing = routed("qwen3", device)
    prompt = ids(1, 20).to(device)
    outputs = []
    for graphs in (False, True):
        routing.cuda_graphs = graphs
        positions = torch.arange(100, 120, device=device)[None]
        outputs.append(model.generate(prompt, position_ids=positions, max_new_tokens=5, do_sample=False))
    assert torch.equal(*outputs)
    handle = model.lm_head.register_forward_hook(lambda module, args, output: -output)
    assert "hooks" in unsupported(routing)
    handle.remove()
    assert unsupported(routing) is None
    assert "training" in unsupported(attach(tiny_model("llama").train()))
    assert model.generate(prompt, max_new_tokens=3, do_sample=False).shape == (1, 23)
    assert [type(step) for _, step in routing.steps.made.values()] == [DecodeStep]


def test_a_step_that_cannot_be_captured_is_tried_once(device, monkeypatch):
    model, routing = routed("qwen3", device)
    tries = []

    def fail(step):
        tries.append(step)
        raise RuntimeError("no room for it")

    monkeypatch.setattr(DecodeStep, "_prepare", fail)
    for _ in range(2):
        assert model.generate(ids(1, 5).to(device), max_new_tokens=3, do_sample=False).shape == (1, 8)
    assert len(tries) == 1
    with pytest.raises(ValueError, match="no room for it"):
        decode_step(routing, 1)


@pytest.mark.gpu
def test_random_numbers_are_drawn_after_a_capture_that_failed(monkeypatch):
    model, routing = routed("qwen3", "cuda")
    step = DecodeStep._step

    def waits(self):
        logits = step(self)
        if torch.cuda.is_current_stream_capturing():
            logits.sum().item()  # ends the capture
        return logits

    monkeypatch.setattr(DecodeStep, "_step", waits)
    prompt = ids(1, 5).to("cuda")
    assert model.generate(prompt, max_new_tokens=3, do_sample=False).shape == (1, 8)
    assert [type(step) for _, step in routing.steps.made.values()] == [str]  # it did fail
    torch.manual_seed(3)
    drawn = torch.rand(5, device="cuda")
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(5, device="cuda")) and len(set(drawn.tolist())) == 5
    assert model.generate(prompt, max_new_tokens=3, do_sample=True).shape == (1, 8)


def test_threads_route_while_a_step_is_captured(device, monkeypatch):
    model, routing = routed("qwen3", device)
    prompt = ids(1, 30).to(device)
    with torch.no_grad(), routing.force("sparse"):
        expected = model(prompt).logits
    found = []

    def forward():
        with torch.no_grad(), routing.force("sparse"):  # which is each thread's own
            found.append(model(prompt).logits)

    run = DecodeStep._step

    def slow(step):
        if not found and device == "cpu":
            thread = threading.Thread(target=forward)
            thread.start()
            thread.join()
        return run(step)

    monkeypatch.setattr(DecodeStep, "_step", slow)
    with routing.force("sparse"):
        decode_step(routing, 1)
        if not found:
            forward()
    assert torch.equal(found[0], expected)
