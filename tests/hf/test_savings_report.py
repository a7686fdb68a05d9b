"""What ``routing.report()`` says of generations, against masks, tensors and clocks."""

import json
import re
import threading
import time
from xml.etree import ElementTree

import pytest
import torch
from helpers.decoding import routed
from helpers.models import CONFIG, PATTERNS, VOCAB, ids, randomize, tiny_model

from flux_attention import attach
from flux_attention.notebook import DARK, LIGHT
from flux_attention.patterns import full_pattern, sparse_pattern

ROUTES = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 0]])
PROMPT = ids(3, 40)
MASK = torch.ones_like(PROMPT)
MASK[1, :13] = MASK[2, :30] = 0  # the last one is shorter than sink + window
LENGTHS = [40, 27, 10]


@pytest.fixture(params=PATTERNS)
def attached(request):
    model = tiny_model("qwen3")
    model.get_input_embeddings().weight.data[0] = 1  # else a pad token's keys are zeros, as of a place not written
    return model, attach(model, PATTERNS[request.param])


def stored(cache):
    """Bytes of the keys that are left when each row's places that were never written are taken away, twice."""
    total = 0
    for layer in cache.layers:
        for buffer in layer.buffers.values():
            written = buffer.key_RKCD.ne(0).any(-1).any(1)  # (R, C); room for more is zeros
            total += 2 * int(written.sum()) * buffer.key_RKCD[0, :, 0].numel() * buffer.key_RKCD.element_size()
    return total


def counted(routing, routes, lengths, past):
    """Pairs in the patterns' masks, of the tokens behind ``past`` ones, among which all of an earlier prompt is."""
    sparse, full = sparse_pattern(routing.config), full_pattern(routing.config)
    computed = dense = 0
    for row, length, before in zip(routes.tolist(), lengths, past, strict=True):
        for is_full in row:
            mask = (full if is_full else sparse).mask(length, before or length)
            computed += int(mask[before:].sum())
            dense += int(full.mask(length)[before:].sum())
    return computed, dense


def test_bytes_and_pairs_of_a_padded_batch_and_of_its_next_turn(attached):
    model, routing = attached
    arguments = dict(max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    output = model.generate(PROMPT, attention_mask=MASK, routes=ROUTES, **arguments)
    report = routing.report()
    cache = output.past_key_values
    assert torch.equal(report.routes.routes_BL, ROUTES.bool()) and report.routes.lengths == tuple(LENGTHS)
    assert report.new_tokens == 9
    assert report.kv_bytes == stored(cache)
    assert report.baseline_kv_bytes == sum(length + 8 for length in LENGTHS) * 3 * 2 * 16 * 2 * 4
    assert (report.pairs, report.baseline_pairs) == counted(routing, ROUTES, LENGTHS, [0, 0, 0])
    assert report.esr == 1 - report.pairs / report.baseline_pairs

    # Another prompt's routes do not get into the report of the next turn.
    model.generate(ids(1, 20), max_new_tokens=1, routes="full")
    assert routing.report().routes.msr == [0]
    turn = torch.cat([output.sequences, ids(3, 5, 1)], dim=1)
    mask = torch.cat([MASK, MASK.new_ones(3, 14)], dim=1)
    model.generate(turn, attention_mask=mask, past_key_values=cache, max_new_tokens=4, do_sample=False)
    report, past = routing.report(), [length + 8 for length in LENGTHS]
    assert torch.equal(report.routes.routes_BL, ROUTES.bool())
    assert report.routes.lengths == tuple(length + 14 for length in LENGTHS) and report.new_tokens == 4
    assert (report.pairs, report.baseline_pairs) == counted(routing, ROUTES, report.routes.lengths, past)
    assert report.kv_bytes == stored(cache)


@pytest.mark.parametrize(
    "how, rows",
    [
        (dict(do_sample=True), 3),
        (dict(num_beams=2, do_sample=False), 6),
        (dict(num_return_sequences=2, do_sample=True), 6),
        (dict(prefill_chunk_size=11, do_sample=False), 3),
    ],
)
def test_every_way_to_generate_is_reported(how, rows):
    model = tiny_model("qwen3")
    routing = attach(model, CONFIG)
    mask = MASK.flip(1) if "prefill_chunk_size" in how else MASK  # no row's first chunk may be padding alone
    output = model.generate(
        PROMPT, attention_mask=mask, routes=ROUTES, max_new_tokens=5, return_dict_in_generate=True, **how
    )
    report, repeats = routing.report(), rows // 3
    assert report.routes.lengths == tuple(length for length in LENGTHS for _ in range(repeats))
    assert report.new_tokens == 5 and report.prefill_s > 0 and report.token_s > 0
    assert report.pairs == repeats * counted(routing, ROUTES, LENGTHS, [0, 0, 0])[0]
    assert report.kv_bytes == stored(output.past_key_values)


def test_drafted_tokens_are_no_part_of_the_prompt():
    model = tiny_model("qwen3")
    model.generation_config.eos_token_id = VOCAB - 1  # transformers 5.5 needs one here
    routing = attach(model, CONFIG, keep_full_kv=True)
    prompt = ids(1, 12).repeat(1, 3)  # of which drafts come
    model.generate(prompt, routes="sparse", max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=4)
    report = routing.report()
    assert report.routes.lengths == (36,) and report.new_tokens == 8
    assert report.kv_bytes == report.baseline_kv_bytes == (36 + 7) * 3 * 2 * 16 * 2 * 4  # all is kept


def test_without_a_cache_no_bytes_are_reported():
    model = tiny_model("qwen3")
    routing = attach(model, CONFIG)
    model.generate(ids(1, 30), routes="sparse", max_new_tokens=3, use_cache=False)
    report = routing.report()
    assert report.kv_bytes is report.baseline_kv_bytes is None and report.routes.lengths == (30,)
    assert "no KV cache kept" in str(report)


def test_a_cache_that_was_filled_before_says_its_routes_itself():
    """This handle has seen no prompt."""
    model = tiny_model("qwen3")
    prompt = PROMPT[:1]
    routing = attach(model, CONFIG)
    with torch.no_grad(), routing.force([1]):
        cache = model(prompt[:, :-1], use_cache=True).past_key_values
    routing.detach()
    routing = attach(model, CONFIG)
    model.generate(prompt, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert routing.report().routes.routes_BL.tolist() == [[False, True, False]]


def test_times_are_those_of_prompt_and_steps():
    """Each forward call is made to last; the clock around ``generate`` bounds the sum."""
    model = tiny_model("qwen3")
    routing = attach(model, CONFIG)
    model.register_forward_pre_hook(lambda module, args, kwargs: time.sleep(0.3 if kwargs["input_ids"].shape[1] > 1
                                                                            else 0.1), with_kwargs=True)  # fmt: skip
    began = time.perf_counter()
    model.generate(ids(1, 30), routes="sparse", max_new_tokens=4, prefill_chunk_size=15)
    whole, report = time.perf_counter() - began, routing.report()
    # The first chunk's call has begun when the decoder is called: behind the sleep.
    assert report.prefill_s >= 0.3 and report.token_s >= 0.06
    assert report.prefill_s + 3 * report.token_s <= whole - 0.3
    model.generate(ids(1, 30), routes="sparse", max_new_tokens=1)
    assert routing.report().token_s is None and routing.report().prefill_s > 0


def test_captured_steps_are_reported_alike(device):
    pytest.importorskip("triton", reason="Triton has no package for this platform")
    model, routing = routed("qwen3", device)
    reports = []
    for routing.cuda_graphs in (False, True):
        model.generate(PROMPT.to(device), attention_mask=MASK.to(device), routes=ROUTES, max_new_tokens=4)
        reports.append(routing.report().to_dict())
    assert len(routing.steps) == 1
    for report in reports:
        assert report.pop("prefill_s") > 0 and report.pop("token_s") > 0
    assert reports[0] == reports[1]


def test_reports_belong_to_threads():
    model = tiny_model("qwen3")
    routing = randomize(attach(model, CONFIG))
    with pytest.raises(RuntimeError, match=r"nothing was generated yet.*model\.generate"):
        routing.report()
    with torch.no_grad():
        model(ids(1, 30))
    with pytest.raises(RuntimeError, match="nothing was generated yet"):
        routing.report()
    found = []

    def work(length):
        model.generate(ids(1, length), max_new_tokens=2)
        found.append((length, routing.report().routes.lengths))

    threads = [threading.Thread(target=work, args=(length,)) for length in (20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [(20, (20,)), (30, (30,))]
    assert routing.report().routes.lengths in ((20,), (30,))  # this thread generated nothing
    routing.detach()
    assert routing.report().new_tokens == 2
    latest = routing.report()
    model.generate(ids(1, 10), max_new_tokens=1)  # the stock model
    assert routing.report() is latest


def drawn(html):
    """The routes that a notebook shows, by colour, as strings of F and S."""
    strips = re.findall(r'<span role="img"[^>]*>(.*?)</span> ', html)
    return ["".join(name[0].upper() for name in re.findall(r"background:var\(--flux-(\w+)", strip)) for strip in strips]


def test_a_handle_in_a_notebook_shows_routes_and_what_was_saved():
    model = tiny_model("qwen3")
    routing = attach(model, CONFIG)
    assert "no prompt was routed yet" in routing._repr_html_() and drawn(routing._repr_html_()) == []
    model(ids(2, 40))
    html = routing._repr_html_()
    assert drawn(html) == ["FFF", "FFF"] and "nothing was generated yet" in html
    assert html.count('title="layer 1: full, margin +4.50"') == 2  # as a fresh router decides
    model.generate(ids(1, 40), routes=[1], max_new_tokens=2)
    html = routing._repr_html_()
    assert drawn(html) == ["SFS"] and routing.report().lines()[0] in html and ", margin" not in html
    assert 'title="layer 1: full"' in html and html.count("<style>") == 1
    routing.detach()
    assert "detached" in routing._repr_html_() and drawn(routing._repr_html_()) == ["SFS"]


def test_what_a_notebook_draws_is_well_formed():
    model = tiny_model("qwen3")
    model.config.name_or_path = "<b>&"
    routing = attach(model, CONFIG)
    model.generate(ids(1, 40), routes=[1], max_new_tokens=2)
    for shown in (routing, routing.routes, routing.report()):
        html = shown._repr_html_()
        ElementTree.fromstring(f"<p>{html.replace('&emsp;', ' ')}</p>")
        assert all(colour in html for colours in (LIGHT, DARK) for colour in colours)


def test_a_report_for_people_notebooks_and_programs():
    model = tiny_model("qwen3")
    routing = attach(model, CONFIG)
    model.generate(ids(1, 40), routes=[1], max_new_tokens=1, min_new_tokens=1)
    report = routing.report()
    first, second, words = str(report).splitlines()
    assert first.startswith("2 of 3 layers sparse (Ω_MSR 0.67), KV 55 % of dense (")  # (40 + 2 * 13) of 120
    computed = round(100 * report.pairs / report.baseline_pairs)
    assert f"), {computed} % of the prompt's query-key pairs computed (Ω_ESR " in first
    assert re.fullmatch(r"40 tokens in [\d.]+ m?s", second) and words == "words: docs/glossary.md"
    html = report._repr_html_()
    assert drawn(html) == ["SFS"] and first in html
    assert not re.search(r"https?:|<script|<link|url\(", html)
    assert f"width:{100 * report.kv_bytes / report.baseline_kv_bytes:.1f}%" in html
    assert f"width:{100 * report.pairs / report.baseline_pairs:.1f}%" in html
    facts = json.loads(json.dumps(report.to_dict()))
    assert facts["sequences"][0]["routes"] == "SFS" and facts["kv_bytes"] == report.kv_bytes

    model.generate(ids(1, 12), routes="sparse", max_new_tokens=1)
    assert "nothing is saved in the prompt" in str(routing.report()) and "KV 100 % of dense" in str(routing.report())


def test_dense_bytes_are_those_of_the_stock_models_generation(family):
    model, prompt = tiny_model(family), ids(2, 30)
    arguments = dict(max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    stock = model.generate(prompt, **arguments).past_key_values
    held = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in stock.layers)
    routing = attach(model, CONFIG)
    for spec in ("full", "sparse"):
        model.generate(prompt, routes=spec, **arguments)
        assert routing.report().baseline_kv_bytes == held
        assert (routing.report().kv_bytes < held) == (spec == "sparse")
