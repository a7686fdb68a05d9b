"""Routed vLLM on a GPU, in bfloat16, on the shipped model: no farther from float32 than stock vLLM is.

Each test starts an engine of its own, so that processes of pytest-xdist can share them out.
"""

from statistics import fmean

import pytest
import torch
from helpers.serving import CHUNK, ask, block_sparse_adapter, make_prompts, metric, transformers_engine, wide_model
from vllm import LLM

from flux_attention.names import BACKBONE
from flux_attention.serving import plugin

PAGE, MEMORY = 64, 1 << 30
#: A server's defaults are compiled layers and CUDA graphs of whole decode steps, planned a step ahead.
EAGER, PLAIN = dict(enforce_eager=True), dict(async_scheduling=False)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]


@pytest.fixture(scope="module")
def prompts():
    return make_prompts(PAGE)


def engine(decide="ends", routers="shipped", model=BACKBONE, **options):
    plugin.register()  # also in a checkout that is not installed
    settings = {"flux_attention": {"routers": routers, "decide": decide, "debug": True}} if routers else {}
    options = (
        dict(
            max_model_len=4096,
            max_num_seqs=8,
            kv_cache_memory_bytes=MEMORY,
            gpu_memory_utilization=0.1,
            disable_log_stats=False,
        )
        | options
    )
    return LLM(str(model), dtype="bfloat16", additional_config=settings, **options)


def distances(answers, prompts, score, wishes=None):
    """Return how far log-probabilities are from float32's, in nats, as means by prompt; and from dense ones."""
    near, far, agreed = [], [], 0
    for prompt, wish, (answer, losses, omega) in zip(prompts, wishes or [None] * len(prompts), answers, strict=True):
        routes = (wish or {}).get("flux_routes") if omega is not None else "full"
        expected, msr = score(prompt, answer, routes)
        dense, _ = score(prompt, answer, "full")
        if omega is not None and abs(omega - msr) > 1e-6:
            assert wish is None, "a wish was not followed"
            continue  # rounding moved a router's decision
        agreed += 1
        near.append((torch.tensor(losses) - expected).abs().mean().item())
        far.append((dense - expected).abs().mean().item())
    return near, far, agreed / len(prompts)


@pytest.fixture(scope="module")
def stock(prompts):
    """How far stock vLLM is from float32: bfloat16's own error."""
    llm = engine(routers=None, **EAGER)
    near, _, _ = distances(ask(llm, prompts), prompts, transformers_engine("ends", "cuda"))
    stop(llm)
    return near


def stop(llm):
    llm.llm_engine.engine_core.shutdown()


def check(llm, prompts, stock, decide="ends", wishes=None, new=16):
    answers = ask(llm, prompts, new, wishes)
    near, far, agreed = distances(answers, prompts, transformers_engine(decide, "cuda"), wishes)
    print(f"float32 {fmean(near):.4f} (most {max(near):.4f}), stock {fmean(stock):.4f} (most {max(stock):.4f}), "
          f"dense {fmean(far):.4f}, agreed {agreed:.3f}")  # fmt: skip
    assert agreed >= 0.9
    assert fmean(near) < 1.5 * fmean(stock) and max(near) < 3 * max(stock)
    # Where routes are forced; else what these routers spare is hardly seen, and dense answers would pass, too.
    assert wishes is None or sum(nats > 3 * max(stock) for nats in far) >= 2
    assert metric(llm, "vllm:kv_cache_usage_perc") == 0
    return answers


@pytest.mark.parametrize(
    "runner, options",
    [("1", {}), ("1", EAGER), ("1", PLAIN), ("0", {}), ("0", EAGER)],
    ids=["graphs", "eager", "graphs-sync", "v1-graphs", "v1-eager"],
)
def test_prompts_in_chunks_beside_decoding_rows_are_answered_as_by_transformers(
    prompts, stock, monkeypatch, runner, options
):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    llm = engine(max_num_batched_tokens=CHUNK * 2, **options)
    check(llm, prompts, stock)
    mixed = [prompt for prompt in prompts if len(prompt) > 1000][:3] * 2
    wishes = [{"flux_routes": wish} for wish in ("full", "sparse", 0.5, [3, 7], 0.2, [0, 1, 2, 8])]
    check(llm, mixed, stock, wishes=wishes, new=64)  # routes change between replays of one graph
    stop(llm)


@pytest.mark.parametrize("options", [{}, EAGER], ids=["graphs", "eager"])
def test_requests_that_make_way_come_back_with_their_routes(prompts, stock, options):
    llm = engine(max_model_len=2048, max_num_batched_tokens=CHUNK * 2, num_gpu_blocks_override=660, **options)
    long = [(prompt * 2)[-1300:] for prompt in prompts if len(prompt) >= 750][:6]
    wishes = [{"flux_routes": "full"}] * 3 + [{"flux_routes": [3, 7]}] * (len(long) - 3)
    check(llm, long, stock, wishes=wishes, new=150)
    assert metric(llm, "vllm:num_preemptions") > 0
    stop(llm)


def test_routers_may_decide_in_the_prefill_of_whole_prompts(prompts, stock):
    llm = engine("prefill", max_model_len=2048)
    check(llm, [prompt[-1900:] for prompt in prompts if len(prompt) > 1], stock, "prefill")
    stop(llm)


def test_full_layers_may_read_prompts_block_sparse(prompts, stock, tmp_path):
    adapter = block_sparse_adapter(tmp_path)
    llm = engine(routers=adapter, max_num_batched_tokens=4096)
    score, exact = transformers_engine("ends", "cuda", adapter), transformers_engine("ends", "cuda")
    near, far = [], []
    for prompt in [prompt for prompt in prompts if len(prompt) > 1000]:
        # One at a time: a chunk's last queries select otherwise than those of a whole prompt.
        ((answer, losses, _),) = ask(llm, [prompt], wishes=[{"flux_routes": "full"}])
        expected = score(prompt, answer, "full")[0]
        near.append((torch.tensor(losses) - expected).abs().mean().item())
        far.append((exact(prompt, answer, "full")[0] - expected).abs().mean().item())
    print(f"float32 {fmean(near):.4f} (most {max(near):.4f}), stock {fmean(stock):.4f}, exact {fmean(far):.4f}")
    assert fmean(near) < fmean(far) / 2  # rounding selects some blocks otherwise
    stop(llm)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_cards_that_share_the_heads_decide_alike(prompts, stock):
    llm = engine(max_num_batched_tokens=CHUNK * 2, tensor_parallel_size=2)
    check(llm, prompts, stock)
    stop(llm)


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
def test_four_cards_decide_alike(prompts, tmp_path):
    model, routers = wide_model(tmp_path, 4096, 32, 128, device="cuda")  # Qwen3-8B's sizes
    score = transformers_engine("ends", "cuda", routers, model)
    options = dict(model=model, max_num_batched_tokens=CHUNK * 2, tensor_parallel_size=4, skip_tokenizer_init=True)
    near = []
    for given in (None, routers):
        llm = engine(routers=given, **options)
        found, far, agreed = distances(ask(llm, prompts), prompts, score)
        near.append(fmean(found))
        stop(llm)
    print(f"float32 {near[1]:.4f}, stock {near[0]:.4f}, dense {fmean(far):.4f}, agreed {agreed:.3f}")
    assert agreed >= 0.9 and near[1] < 1.5 * near[0]
    assert fmean(far) > 2 * near[1]  # ranks that decide otherwise would answer otherwise
