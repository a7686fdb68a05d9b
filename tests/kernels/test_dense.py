"""Dense attention by several calls of cuDNN's, against a float64 oracle, and the order of SDPA's backends."""

import math
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from helpers.devices import INTERPRETED
from helpers.kernels import HOPPER, TOLERANCE, states
from helpers.oracles import error, oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux_attention import kernels
from flux_attention.kernels import dense, triton_merge, triton_prefill
from flux_attention.patterns import Full

pytestmark = pytest.mark.usefixtures("poisoned")

BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@pytest.mark.gpu
@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([(8, 8), (8, 2), (5, 1)]),
    st.integers(64, 2000),
    st.one_of(st.just(0), st.integers(64, 1500)),
    st.sampled_from([64, 80, 128]),
    st.tuples(*[st.sampled_from(["BHSD", "BSHD"])] * 3),
    st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_dense_prefill_in_blocks(heads, length, past, dim, layouts, dtype):
    check_blocks("cuda", heads, length, past, dim, layouts, dtype)


@pytest.fixture
def formula(monkeypatch):
    """cuDNN's part played by formulas, as it needs a GPU."""

    def attend(query, key, value, causal, scale):
        assert not causal or query.shape[2] == key.shape[2]
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
        scores = query @ key.transpose(-1, -2) * scale
        if causal:
            scores = scores.masked_fill(~Full().mask(scores.shape[-1]), -math.inf)
        return scores.softmax(-1) @ value, scores.float().logsumexp(-1)

    monkeypatch.setattr(dense, "_attend", attend)


@INTERPRETED
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("length, past", [(3, 0), (8, 0), (15, 0), (17, 0), (24, 5), (5, 9)])
def test_blocks_are_joined(heads, length, past, formula):
    check_blocks("cpu", heads, length, past, 20, ("BSHD", "BSHD", "BHSD"), torch.float32, block=8)


@INTERPRETED
@pytest.mark.parametrize("length, past, count", [(1, 40, 2), (5, 16, 4), (13, 59, 3)])
def test_splits_are_joined(length, past, count, formula, monkeypatch):
    monkeypatch.setattr(dense, "TILE", 8)
    monkeypatch.setattr(dense, "STEP", 4)
    check_splits("cpu", (6, 2), length, past, 16, torch.float16, count)


@pytest.mark.gpu
@HOPPER
@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([(8, 8), (8, 2), (5, 1)]),
    st.one_of(st.integers(1, 10), st.integers(1, 400)),
    st.integers(4096, 20000),
    st.sampled_from([64, 128]),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.integers(2, 4),
)
def test_few_queries_by_splits(heads, length, past, dim, dtype, count):
    check_splits("cuda", heads, length, past, dim, dtype, count)


def check_splits(device, heads, length, past, dim, dtype, count):
    generator = torch.Generator(device).manual_seed(length)
    query = states(generator, heads[0], length, dim, dtype, "BSHD")[:1]
    # In a cache that has room for more, as the routed one's blocks have.
    key, value = (states(generator, heads[1], past + length + 9, dim, dtype, "BHSD")[:1, :, :-9] for _ in range(2))
    output = dense.full_by_splits(query, key, value, dim**-0.5, count, triton_prefill.attention)
    mask = Full().mask(past + length)[past:].to(device)
    assert error(output, oracle(query, key, value, mask, dim**-0.5)) < TOLERANCE[dtype]


def check_blocks(device, heads, length, past, dim, layouts, dtype, block=512):
    generator = torch.Generator(device).manual_seed(length)
    query = states(generator, heads[0], length, dim, dtype, layouts[0])
    key, value = (states(generator, heads[1], past + length, dim, dtype, layout) for layout in layouts[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "BLOCK", block)
        output = dense.full_by_blocks(query, key, value, dim**-0.5, triton_merge.merge_attention_states)
    mask = Full().mask(past + length)[past:].to(device)
    assert error(output, oracle(query, key, value, mask, dim**-0.5)) < TOLERANCE.get(dtype, 1e-5)


@pytest.mark.gpu
@HOPPER
def test_long_dense_prompts_are_read_in_blocks(monkeypatch):
    torch.use_deterministic_algorithms(False)
    seen = []
    full = dense.full_by_blocks
    monkeypatch.setattr(dense, "full_by_blocks", lambda *args: seen.append(args[0].shape[2]) or full(*args))
    monkeypatch.setattr(dense, "num_splits", lambda *args: 1)
    monkeypatch.setattr(dense, "MIN_PROMPT", 2000)
    monkeypatch.setattr(dense, "MIN_CONTEXT", 2500)
    query, key = (torch.randn(1, heads, 3000, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2))
    kernels.full(query, key, key, 0.1)
    kernels.full(query[:, :, -300:], key, key, 0.1)
    for other in (query[:, :, :1999], query.clone().requires_grad_()):
        kernels.full(other, key[:, :, : other.shape[2]], key[:, :, : other.shape[2]], 0.1)
    kernels.full(query[:, :, -63:], key, key, 0.1)  # few queries
    kernels.full(query[:, :, -300:], key[:, :, 501:], key[:, :, 501:], 0.1)  # few keys
    kernels.full(query[:, :, -2999:], key, key, 0.1)  # one earlier key
    with torch.no_grad():  # in training what is computed without gradients, too
        kernels.full(query.clone().requires_grad_(), key, key, 0.1)
    torch.use_deterministic_algorithms(True)  # which SDPA says cuDNN's is not
    kernels.full(query, key, key, 0.1)
    assert seen == [3000, 300]


@pytest.mark.parametrize(
    "batch, heads, length, keys, expected",
    [
        (1, 32, 128, 2**17, 4),
        (1, 32, 129, 2**17, 2),
        (1, 32, 257, 2**17, 1),  # 96 tiles of 132 at once
        (1, 8, 1, 2**17, 11),  # of 11 K keys, which leave over as much at most
        (1, 1, 2**17, 2**17, 1),  # a whole prompt
        (1, 1, 2**17 - 5, 2**17, 1),
        (1, 32, 128, 2**17 - 1, 1),
        (2, 32, 128, 2**17, 1),
    ],
)
def test_splits_keep_all_sms_busy(batch, heads, length, keys, expected, monkeypatch):
    monkeypatch.setattr(dense, "_runs", lambda *states: True)
    query, key = (torch.empty(batch, heads, n, 0) for n in (length, keys))
    count = dense.num_splits(query, key, key)
    assert count == expected and (count == 1 or count * dense.STEP <= (keys - length) // count)


@pytest.mark.gpu
@HOPPER
def test_few_queries_behind_many_keys_are_read_by_splits(monkeypatch):
    torch.use_deterministic_algorithms(False)
    seen = []
    full_by_splits = dense.full_by_splits
    monkeypatch.setattr(
        dense, "full_by_splits", lambda *args: seen.append((args[0].shape[2], args[4])) or full_by_splits(*args)
    )
    monkeypatch.setattr(dense, "MIN_PROMPT", 20_000)
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count  # 132 of an H100
    query, key = (torch.randn(1, heads, 20_000, 64, device="cuda", dtype=torch.bfloat16) for heads in (32, 8))
    for length in (1, 128, 129, 300, 20_000):  # 300 are too many for two splits
        kernels.full(query[:, :, -length:], key, key, 0.1)
    kernels.full(query[:, :2, -5:], key[:, :2], key[:, :2], 0.1)  # of so few heads, as many as keys make worth it
    few = query[:, :, -128:]
    kernels.full(few, key[:, :, 1:], key[:, :, 1:], 0.1)  # few keys
    kernels.full(few.expand(2, -1, -1, -1), *[key.expand(2, -1, -1, -1)] * 2, 0.1)
    kernels.full(few.clone().requires_grad_(), key, key, 0.1)
    counts = [(1, min(4, processors // 32)), (128, min(4, processors // 32)), (129, processors // 64), (5, 4)]
    assert seen == [(length, count) for length, count in counts if count > 1]


@pytest.fixture
def on_hopper(monkeypatch):
    """States for which dense prefill orders SDPA's backends; no GPU is needed to look at the order."""
    monkeypatch.setattr(dense, "_backends", lambda *args: BACKENDS)
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 1, 1, 128))


def test_backends_that_the_user_switched_off_stay_off(on_hopper):
    """SDPA's switches are the process's own: dense prefill orders what is on, and leaves them as they were."""
    cuda = torch.backends.cuda

    def on():
        return [is_on() for is_on in dense._SWITCHES]

    before, order = on(), torch._C._get_sdp_priority_order()
    with dense.fastest_backend(on_hopper):
        assert on() == [True] * 4
        assert torch._C._get_sdp_priority_order()[0] == SDPBackend.CUDNN_ATTENTION.value
    try:
        cuda.enable_cudnn_sdp(False)
        with dense.fastest_backend(on_hopper):
            assert on() == [False, True, True, True] and torch._C._get_sdp_priority_order() == order
        with sdpa_kernel(SDPBackend.MATH), dense.fastest_backend(on_hopper):
            assert on() == [False, False, False, True]
    finally:
        cuda.enable_cudnn_sdp(True)
    assert on() == before and torch._C._get_sdp_priority_order() == order


def test_threads_do_not_mix_up_the_order_of_backends(on_hopper):
    order, seen = torch._C._get_sdp_priority_order(), []

    def work():
        for _ in range(200):
            with dense.fastest_backend(on_hopper):
                seen.append(torch._C._get_sdp_priority_order()[0])
                time.sleep(0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {SDPBackend.CUDNN_ATTENTION.value} and len(seen) == 800
    assert torch._C._get_sdp_priority_order() == order
