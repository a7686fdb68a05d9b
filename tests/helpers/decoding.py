"""Generations by captured decode steps beside stock ones: by Triton's interpreter on a CPU, by CUDA graph on a GPU."""

import pytest
import torch
from helpers.devices import DEVICES
from helpers.models import CONFIG, VOCAB, tiny_model

from flux_attention import attach, kernels
from flux_attention.hf.generation.step import DecodeStep

ROUTES = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1]])


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu":
        monkeypatch.setattr(kernels, "has_triton", lambda device: True)
    return request.param


def routed(family, device, vocabulary=VOCAB, kv_heads=1, **options):
    """Most tests need one KV head only; the interpreter takes as long for each."""
    heads = dict(num_attention_heads=2 * kv_heads, num_key_value_heads=kv_heads)
    sizes = dict(hidden_size=32 * kv_heads, head_dim=16, vocab_size=vocabulary)
    model = tiny_model(family, **heads, **sizes).to(device, torch.float16)
    return model, attach(model, CONFIG, **options)


def both(model, routing, routes=ROUTES, seed=0, **arguments):
    """What the stock loop and the captured one generate, and how many steps the latter ran."""
    outputs, steps = [], []
    run = DecodeStep.run

    def counted(step):
        steps.append(step)
        return run(step)

    for graphs in (False, True):
        torch.manual_seed(seed)
        routing.cuda_graphs = graphs
        with routing.force(routes), pytest.MonkeyPatch.context() as patch:
            patch.setattr(DecodeStep, "run", counted)
            outputs.append(model.generate(**arguments))
        assert bool(steps) == graphs
    return *outputs, len(steps)


def assert_agree(stock, ours):
    """The same tokens; where two were as good as equal, those up to the first that differs."""
    assert stock.sequences.shape == ours.sequences.shape
    prompt = stock.sequences.shape[1] - len(stock.logits)
    for row, (a, b) in enumerate(zip(stock.sequences.tolist(), ours.sequences.tolist(), strict=True)):
        for place, (left, right) in enumerate(zip(a, b, strict=True)):
            if place >= prompt:
                left_logits, right_logits = (output.logits[place - prompt][row] for output in (stock, ours))
                torch.testing.assert_close(left_logits, right_logits, atol=2e-2, rtol=0)
            if left != right:
                assert abs(left_logits[left] - left_logits[right]) < 2e-2
                break


FULL_OUTPUT = dict(return_dict_in_generate=True, output_logits=True, do_sample=False)
