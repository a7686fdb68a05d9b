"""The loop of captured decode steps against the stock one."""

import pytest
import torch
from helpers.decoding import FULL_OUTPUT, ROUTES, assert_agree, both, routed
from helpers.models import FAMILIES, ids, tiny_model
from transformers import AutoTokenizer, DynamicCache, LogitsProcessor, StoppingCriteria, TextStreamer

from flux_attention import attach
from flux_attention.hf.generation import loop
from flux_attention.shipped import BACKBONE

pytest.importorskip("triton", reason="Triton has no package for this platform")


#: Of the families of conftest, those whose layers are all routed and whose rotary embedding needs positions only. The
#: interpreter is slow, so on a CPU only two of them run.
GRAPHED = [
    pytest.param(family, marks=[] if family in ("qwen3", "phi3") or torch.cuda.is_available() else pytest.mark.gpu)
    for family in FAMILIES
    if family not in ("gemma3", "qwen2_vl")
]


@pytest.mark.parametrize("family", GRAPHED)
def test_padded_batch_of_every_family(family, device):
    model, routing = routed(family, device, kv_heads=2)
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
        assert (a.lengths, a.seen) == (b.lengths, b.seen) and torch.equal(a.real_columns(), b.real_columns())
    more = torch.cat([mask, mask.new_ones(3, 5 + 5)], dim=1)
    turn = torch.cat([ours.sequences[:, -1:], ids(3, 4, 9).to(device)], dim=1)
    with torch.no_grad():
        a, b = (
            model(turn, attention_mask=more, past_key_values=output.past_key_values).logits for output in (stock, ours)
        )
    torch.testing.assert_close(a, b, atol=2e-2, rtol=0)


@pytest.mark.parametrize("keep_full", [False, True])
def test_long_generation_wraps_the_ring(device, keep_full, monkeypatch):
    monkeypatch.setattr(loop, "ROOM", 8)  # and buffers grow on the way
    model, routing = routed("qwen3", device, keep_full_kv=keep_full)
    for length in (3, 30):  # below and above sink + window
        stock, ours, _ = both(model, routing, input_ids=ids(3, length).to(device), max_new_tokens=12, **FULL_OUTPUT)
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


def test_tokens_come_in_one_piece(device):
    """Processors and criteria that view them as one row work as in the stock loop; so does what is returned."""
    model, routing = routed("qwen3", device)
    seen = []

    class Views(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.view(-1).shape)
            return scores

    class Stops(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(input_ids.view(-1).shape)
            return torch.full((len(input_ids),), input_ids.shape[1] == 12, device=input_ids.device)

    arguments = dict(inputs=ids(3, 8).to(device), max_new_tokens=9, do_sample=False)
    more = dict(logits_processor=[Views()], stopping_criteria=[Stops()])
    stock, ours, _ = both(model, routing, **arguments, **more)
    assert torch.equal(stock, ours) and ours.shape == (3, 12) and ours.is_contiguous()
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]


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


def test_a_single_token_needs_no_capture(device):
    model, routing = routed("qwen3", device)
    model.generate(ids(1, 20).to(device), max_new_tokens=1, do_sample=False)
    assert not routing.steps


def test_detach_restores_the_class(device):
    model = tiny_model("qwen3").to(device)
    stock = type(model)
    routing = attach(model)
    assert type(model) is not stock and isinstance(model, stock) and type(model).__name__ == stock.__name__
    routing.detach()
    assert type(model) is stock
    assert model.generate(ids(1, 5).to(device), max_new_tokens=3).shape == (1, 8)


def test_a_generation_within_a_generation(device):
    """A streamer that generates with the same model: the steps' places in memory are taken, so it decodes as stock."""
    model, routing = routed("qwen3", device)
    prompt, other = ids(3, 20).to(device), ids(3, 9, 5).to(device)
    inner = []

    class Nested(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.got) == 4:
                inner.append(model.generate(other, max_new_tokens=4, do_sample=False))

    arguments = dict(inputs=prompt[:1], max_new_tokens=9, do_sample=False)
    model.config.pad_token_id = 0
    outputs = []
    for graphs in (False, True):
        routing.cuda_graphs = graphs
        with routing.force(ROUTES[0]):
            outputs.append(model.generate(**arguments, streamer=Nested(AutoTokenizer.from_pretrained(BACKBONE))))
    assert torch.equal(*outputs) and torch.equal(*inner)


def test_an_interrupted_generation_leaves_the_cache_right(device):
    model, routing = routed("qwen3", device)
    prompt = ids(1, 20).to(device)

    class Interrupting(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.got) == 8:
                raise KeyboardInterrupt

    caches = []
    for graphs in (False, True):
        routing.cuda_graphs = graphs
        cache = DynamicCache(config=model.config)
        with routing.force(ROUTES[0]), pytest.raises(KeyboardInterrupt):
            model.generate(
                prompt, past_key_values=cache, max_new_tokens=20, do_sample=False,
                streamer=Interrupting(AutoTokenizer.from_pretrained(BACKBONE)),
            )  # fmt: skip
        caches.append(cache)
    kept = [cache.get_seq_length() for cache in caches]
    assert kept[1] in (kept[0], kept[0] - 1)  # the step on the way is not counted
    with torch.no_grad():
        if kept[1] < kept[0]:
            token = model.generate(prompt, max_new_tokens=8, do_sample=False)[:, kept[1] : kept[0]]
            model(token, past_key_values=caches[1])
        a, b = (model(ids(1, 4, 3).to(device), past_key_values=cache).logits for cache in caches)
    torch.testing.assert_close(a, b, atol=2e-2, rtol=0)


def test_cropping_after_a_step_too_many(device):
    """A step that was on its way when the sequence ended has overwritten the oldest token of the window."""
    model, routing = routed("qwen3", device, kv_heads=2)  # whose first tokens differ
    prompt = ids(1, 10).to(device)
    kept = routing.sparse.kept(100)
    with routing.force("sparse"):
        free = model.generate(prompt, max_new_tokens=5, do_sample=False)
        cache = DynamicCache(config=model.config)
        model.generate(
            prompt, past_key_values=cache, max_new_tokens=20, do_sample=False, eos_token_id=int(free[0, kept]),
            pad_token_id=0,
        )  # fmt: skip
    assert cache.get_seq_length() == kept
    with pytest.raises(ValueError, match="cannot crop"):
        cache.crop(-3)


def test_inference_mode_and_out_of_it(device):
    model, routing = routed("qwen3", device)
    prompt = ids(3, 12).to(device)
    with torch.inference_mode(), routing.force(ROUTES):
        inside = model.generate(prompt, max_new_tokens=5, do_sample=False)
    _, outside, _ = both(model, routing, input_ids=prompt, max_new_tokens=5, do_sample=False)
    assert torch.equal(inside, outside)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(max_new_tokens=1),
        dict(max_new_tokens=4, num_return_sequences=2, do_sample=True),
        dict(max_new_tokens=4, prefill_chunk_size=7),
        dict(max_new_tokens=4, guidance_scale=1.5),
    ],
    ids=lambda arguments: list(arguments)[-1],
)
def test_ways_of_calling(device, arguments):
    model, routing = routed("qwen3", device)
    outputs = []
    for graphs in (False, True):
        routing.cuda_graphs = graphs
        torch.manual_seed(0)
        with routing.force(0.67):
            outputs.append(model.generate(ids(2, 20).to(device), **{"do_sample": False, **arguments}))
    assert torch.equal(*outputs)


def test_embeddings_as_input(device):
    model, routing = routed("qwen3", device)
    embeds = model.get_input_embeddings()(ids(3, 20).to(device)).detach()
    stock, ours, _ = both(model, routing, inputs_embeds=embeds, max_new_tokens=5, do_sample=False)
    assert torch.equal(stock, ours)
