"""The loop of captured decode steps against the stock one: by Triton's interpreter on a CPU, by CUDA graph on a GPU."""

import functools

import pytest
import torch
from conftest import FAMILIES, VOCAB, tiny_model
from test_attach import CONFIG, ids
from transformers import AutoTokenizer, StoppingCriteria, TextStreamer

from flux_attention import attach, generation, kernels
from flux_attention.shipped import BACKBONE

pytest.importorskip("triton")
ROUTES = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter beside a GPU")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
#: Of the families of conftest, those whose layers are all routed and whose rotary embedding needs positions only. The
#: interpreter is slow, so on a CPU only two of them run.
GRAPHED = [
    pytest.param(family, marks=[] if family in ("qwen3", "phi3") or torch.cuda.is_available() else pytest.mark.gpu)
    for family in FAMILIES
    if family not in ("gemma3", "qwen2_vl")
]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu":
        monkeypatch.setattr(kernels, "has_triton", lambda device: True)
    return request.param


def routed(family, device, vocabulary=VOCAB, **options):
    model = tiny_model(family, hidden_size=64, vocab_size=vocabulary).to(device, torch.float16)
    return model, attach(model, CONFIG, **options)


def both(model, routing, routes=ROUTES, seed=0, **arguments):
    """What the stock loop and the captured one generate, and how many steps the latter ran."""
    outputs, steps = [], []
    run = generation.DecodeStep.run

    def counted(step):
        steps.append(step)
        return run(step)

    for graphs in (False, True):
        torch.manual_seed(seed)
        routing.cuda_graphs = graphs
        with routing.force(routes), pytest.MonkeyPatch.context() as patch:
            patch.setattr(generation.DecodeStep, "run", counted)
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


@pytest.mark.parametrize("family", GRAPHED)
def test_padded_batch_of_every_family(family, device):
    model, routing = routed(family, device)
    mask = torch.ones(3, 40, dtype=torch.long, device=device)
    mask[1, :13] = mask[2, :30] = 0
    stock, ours, steps = both(
        model, routing, input_ids=ids(3, 40).to(device), attention_mask=mask, max_new_tokens=6, output_scores=True,
        **FULL_OUTPUT,
    )  # fmt: skip
    assert steps == 5
    assert_agree(stock, ours)
    assert len(ours.logits) == len(ours.scores) == 6
    # The cache goes on where the stock loop's would.
    for a, b in zip(stock.past_key_values.layers, ours.past_key_values.layers, strict=True):
        assert (a.lengths, a.seen, a.tail) == (b.lengths, b.seen, b.tail)
    more = torch.cat([mask, mask.new_ones(3, 5 + 5)], dim=1)
    turn = torch.cat([ours.sequences[:, -1:], ids(3, 4, 9).to(device)], dim=1)
    with torch.no_grad():
        a, b = (
            model(turn, attention_mask=more, past_key_values=output.past_key_values).logits for output in (stock, ours)
        )
    torch.testing.assert_close(a, b, atol=2e-2, rtol=0)


@pytest.mark.parametrize("keep_full", [False, True])
def test_long_generation_wraps_the_ring(device, keep_full, monkeypatch):
    monkeypatch.setattr(generation, "ROOM", 8)  # and buffers grow on the way
    model, routing = routed("qwen3", device, keep_full_kv=keep_full)
    for length in (3, 30):  # below and above sink + window
        stock, ours, _ = both(model, routing, input_ids=ids(3, length).to(device), max_new_tokens=14, **FULL_OUTPUT)
        assert_agree(stock, ours)
    assert len(routing.steps) == 1  # one capture serves all


def test_sampling_draws_the_same(device):
    model, routing = routed("llama", device)
    arguments = dict(input_ids=ids(3, 20).to(device), max_new_tokens=6, do_sample=True, temperature=0.7, top_k=20)
    stock, ours, _ = both(model, routing, repetition_penalty=1.3, **arguments)
    assert torch.equal(stock, ours)
    _, other, _ = both(model, routing, repetition_penalty=1.3, seed=1, **arguments)
    assert not torch.equal(ours, other)


def test_end_of_sequence_and_padding(device):
    """Rows end at different steps; what follows is padding; the loop stops with the last one."""
    model, routing = routed("qwen3", device)
    prompt = ids(3, 20).to(device)
    routing.cuda_graphs = False
    with routing.force(ROUTES):
        free = model.generate(prompt, max_new_tokens=12, do_sample=False)
    ends = sorted({int(free[0, 25]), int(free[1, 27]), int(free[2, 23])})
    stock, ours, steps = both(
        model, routing, input_ids=prompt, max_new_tokens=20, do_sample=False, eos_token_id=ends, pad_token_id=0
    )
    assert torch.equal(stock, ours)
    assert stock.shape[1] < 40
    assert steps == stock.shape[1] - 20  # one step was on its way when the last row ended
    stock, ours, steps = both(
        model, routing, input_ids=prompt[:1], routes=ROUTES[0], max_new_tokens=20, do_sample=False,
        eos_token_id=int(free[0, 20]), pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(stock, ours) and ours.shape[1] == 21


class Recorder(TextStreamer):
    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.got = []

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.got.append("end")


class StopAfter(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 26, device=input_ids.device)


def test_streamers_and_stopping_criteria(device):
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    model, routing = routed("qwen3", device, vocabulary=len(tokenizer))
    prompt = ids(1, 20).to(device)
    arguments = dict(inputs=prompt, max_new_tokens=20, do_sample=False)
    got = []
    for graphs in (False, True):
        streamer = Recorder(tokenizer)
        routing.cuda_graphs = graphs
        with routing.force(ROUTES[0]):
            model.generate(**arguments, streamer=streamer, stopping_criteria=[StopAfter()])
        got.append(streamer.got)
    assert got[0] == got[1]
    assert len(got[0]) == 1 + 6 + 1
    words = tokenizer.decode(got[0][4])
    stock, ours, _ = both(
        model, routing, routes=ROUTES[0], stop_strings=[words], tokenizer=tokenizer, pad_token_id=0, **arguments
    )
    assert torch.equal(stock, ours) and ours.shape[1] < 40


def test_other_ways_of_generating_are_the_stock_ones(device):
    model, routing = routed("qwen3", device)
    prompt = ids(3, 20).to(device)
    for arguments in (dict(num_beams=2), dict(use_cache=False), dict(output_hidden_states=True)):
        options = dict(max_new_tokens=5, do_sample=False, return_dict_in_generate=True, **arguments)
        outputs = []
        for graphs in (False, True):
            routing.cuda_graphs = graphs
            with routing.force(ROUTES):
                outputs.append(model.generate(prompt, **options).sequences)
        assert torch.equal(*outputs)
    assert not routing.steps


def test_weights_that_move_are_captured_again(device):
    model, routing = routed("qwen3", device)
    prompt = ids(3, 20).to(device)
    both(model, routing, input_ids=prompt, max_new_tokens=5, do_sample=False)
    (before,) = routing.steps.values()
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5
    stock, ours, _ = both(model, routing, input_ids=prompt, max_new_tokens=5, **FULL_OUTPUT)
    assert_agree(stock, ours)
    (after,) = routing.steps.values()
    assert after is not before


def test_detach_restores_the_class(device):
    model = tiny_model("qwen3").to(device)
    stock = type(model)
    routing = attach(model)
    assert type(model) is not stock and isinstance(model, stock) and type(model).__name__ == stock.__name__
    routing.detach()
    assert type(model) is stock
    assert model.generate(ids(1, 5).to(device), max_new_tokens=3).shape == (1, 8)


def test_what_cannot_be_captured_is_named(device, monkeypatch):
    model, routing = routed("gemma3", device)
    assert "no router" in generation.unsupported(routing)
    with pytest.raises(ValueError, match="no router"):
        generation.decode_step(routing, 1)
    assert model.generate(ids(1, 5).to(device), max_new_tokens=3, do_sample=False).shape == (1, 8)
    model, routing = routed("qwen3", device)
    model.float()
    assert "float32" in generation.unsupported(routing)


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_compiled_layers_decode_the_same(family, device, monkeypatch):
    torch._dynamo.reset()
    if device == "cpu":  # what is compiled is tested elsewhere; here, that it is captured
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model, routing = routed(family, device, compile=True)
    for length in (20, 31):
        stock, ours, _ = both(model, routing, input_ids=ids(3, length).to(device), max_new_tokens=5, **FULL_OUTPUT)
        assert_agree(stock, ours)
    assert len(routing.steps) == 1
