"""Stock vLLM with routes, on the shipped model, against the transformers engine: log-probabilities in float32."""

import os

os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"

import pytest
import torch
from helpers.serving import (
    CHUNK,
    NEW,
    ask,
    block_sparse_adapter,
    make_prompts,
    metric,
    ranked_adapter,
    transformers_engine,
    wide_model,
)
from vllm import LLM
from vllm.platforms import current_platform

from flux_attention.names import BACKBONE

PAGE = 32

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="of float32, which no attention on GPUs takes")


@pytest.fixture(scope="module")
def prompts():
    return make_prompts(PAGE)


@pytest.fixture(scope="module")
def reference():
    return transformers_engine("ends")


def engine(max_model_len=4096, decide="ends", routers="shipped", model=BACKBONE, budget=None, **options):
    return LLM(
        str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=max_model_len,
        block_size=PAGE,
        disable_log_stats=False,
        additional_config={"flux_attention": {"routers": routers, "decide": decide, "debug": True, "budget": budget}},
        **options,
    )


def check(llm, prompts, reference, wishes=None, new=NEW):
    """Compare with the other engine; return how far dense answers are from these, in nats."""
    apart = []
    wishes = wishes or [None] * len(prompts)
    for prompt, wish, (answer, losses, msr) in zip(prompts, wishes, ask(llm, prompts, new, wishes), strict=True):
        expected, routes = reference(prompt, answer, (wish or {}).get("flux_routes"))
        assert msr == pytest.approx(routes), len(prompt)
        torch.testing.assert_close(torch.tensor(losses), expected, atol=1e-4, rtol=0, msg=f"{len(prompt)} tokens")
        dense, _ = reference(prompt, answer, "full")
        apart.append((dense - expected).abs().max().item())
    return apart


@pytest.fixture(scope="module")
def llm():
    return engine(max_num_batched_tokens=CHUNK, max_num_seqs=8)


def test_prompts_in_chunks_beside_decoding_rows_are_routed_and_answered_as_by_transformers(llm, prompts, reference):
    apart = check(llm, prompts, reference)
    assert sum(nats > 1e-2 for nats in apart) >= 5  # equal tokens prove little where dense answers alike


def test_each_request_may_force_its_routes(llm, prompts, reference):
    wishes = ["full", "sparse", 0.5, [3, 7], "0.2", None]
    wishes = [wish if wish is None else {"flux_routes": wish} for wish in wishes]
    mixed = [prompt for prompt in prompts if len(prompt) > 1000][:3]
    # parse_routes reads text as the command line does; forcing by hand takes numbers.
    written = [{"flux_routes": 0.2} if wish == {"flux_routes": "0.2"} else wish for wish in wishes]
    found = ask(llm, (mixed * 2)[: len(wishes)], wishes=wishes)
    again = ask(llm, (mixed * 2)[: len(wishes)], wishes=written)
    assert found == again
    check(llm, (mixed * 2)[: len(wishes)], reference, written)


def test_a_wish_that_means_nothing_is_refused_and_disturbs_nobody(llm, prompts, reference):
    with pytest.raises(Exception, match="cannot force 'most'"):
        ask(llm, prompts[:2], wishes=[None, {"flux_routes": "most"}])
    check(llm, prompts[:2], reference)


def test_all_pages_are_there_in_the_end(llm):
    assert metric(llm, "vllm:kv_cache_usage_perc") == 0


def test_requests_that_make_way_come_back_with_their_routes(prompts, reference):
    # Three that run full take 1,230 pages for their prompts, and 150 more for their answers.
    llm = engine(2048, max_num_batched_tokens=CHUNK, max_num_seqs=8, num_gpu_blocks_override=1300)
    long = [(prompt * 2)[-1300:] for prompt in prompts if len(prompt) >= 750][:6]
    wishes = [{"flux_routes": "full"}] * 3 + [None] * (len(long) - 3)
    apart = check(llm, long, reference, wishes, new=150)
    assert metric(llm, "vllm:num_preemptions") > 0
    assert sum(nats > 1e-2 for nats in apart) >= 2
    assert metric(llm, "vllm:kv_cache_usage_perc") == 0


def test_routers_may_decide_in_the_prefill_of_whole_prompts(prompts):
    llm = engine(2048, "prefill", max_num_seqs=8)
    # Without one of a single token, which needs no decision: it runs as a decode step.
    some = [prompt[-1900:] for prompt in prompts if len(prompt) > 1]
    apart = check(llm, some, transformers_engine("prefill"))
    assert sum(nats > 1e-2 for nats in apart) >= 5


def test_full_layers_may_read_prompts_block_sparse(prompts, tmp_path):
    adapter = block_sparse_adapter(tmp_path)
    llm = engine(2048, routers=adapter, max_num_batched_tokens=2048, max_num_seqs=8)
    score = transformers_engine("ends", routers=adapter)
    exact = transformers_engine("ends")
    apart = []
    for prompt in [prompt[-1900:] for prompt in prompts if len(prompt) > 1000][:4]:
        wishes = [None, {"flux_routes": "full"}]
        # One at a time: a chunk's last queries select otherwise than those of a whole prompt.
        for wish in wishes:
            check(llm, [prompt], score, [wish])
        ((answer, losses, _),) = ask(llm, [prompt], wishes=wishes[1:])
        expected, _ = exact(prompt, answer, "full")
        apart.append((torch.tensor(losses) - expected).abs().max().item())
    assert sum(nats > 1e-2 for nats in apart) >= 2


def test_a_ranking_is_cut_by_the_servers_budget_or_the_requests_own(prompts, tmp_path):
    adapter = ranked_adapter(tmp_path, budget=0.5)
    llm = engine(2048, routers=adapter, budget=0.3, max_num_batched_tokens=CHUNK, max_num_seqs=8)
    reference = transformers_engine(None, routers=adapter)
    some = [prompt[-1000:] for prompt in prompts if len(prompt) > 1000][:3]
    # Of the ranking 0, 3, 6, 9, 2, 5, 8, 1, 4, 7.
    full = {None: [0, 3, 6, 9, 2, 5, 8], 0.2: [0, 3, 6, 9, 2, 5, 8, 1], 0.8: [0, 3]}
    found = ask(llm, some, wishes=[None if budget is None else {"flux_budget": budget} for budget in full])
    apart = []
    for prompt, (budget, layers), (answer, losses, msr) in zip(some, full.items(), found, strict=True):
        expected, routes = reference(prompt, answer, layers)
        assert msr == pytest.approx(routes) == pytest.approx(budget or 0.3)
        torch.testing.assert_close(torch.tensor(losses), expected, atol=1e-4, rtol=0)
        other, _ = reference(prompt, answer)  # by the adapter's own budget
        apart.append((other - expected).abs().max().item())
    assert min(apart) > 1e-3


FOUR = pytest.mark.skipif((os.cpu_count() or 1) < 4, reason="needs four cores: fewer take minutes for four processes")


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=FOUR)])
def test_processes_that_share_the_heads_decide_alike(prompts, reference, processes, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    more = {}
    if processes == 4:  # of the shipped model's six heads four cannot have as many each
        model, routers = wide_model(tmp_path, 128, 16, 32)
        reference = transformers_engine("ends", routers=routers, model=model)
        more = dict(model=model, routers=routers, skip_tokenizer_init=True)
    llm = engine(max_num_batched_tokens=CHUNK, max_num_seqs=8, tensor_parallel_size=processes, **more)
    some = [prompt for prompt in prompts if len(prompt) > 800][:5]
    apart = check(llm, some, reference)  # ranks that decide otherwise would give other answers
    assert sum(nats > 1e-2 for nats in apart) >= 2
