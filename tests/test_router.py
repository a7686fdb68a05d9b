"""The router: what it pools, how it decides, how it starts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_attention.router import LayerRouter, hard_route, pool_query, pooled_slots, soft_route


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(1, 20))
def test_pooling_is_the_mean_of_both_ends(lengths, pool_size):
    query = torch.randn(len(lengths), 50, 3, 8, dtype=torch.float64)
    slots, weights = pooled_slots(torch.tensor(lengths), pool_size)
    pooled = pool_query(query, slots, weights)
    for row, length in enumerate(lengths):
        size = min(pool_size, length)
        tokens = torch.cat([query[row, :size], query[row, length - size : length]])
        torch.testing.assert_close(pooled[row].double(), tokens.mean((0, 1)), atol=1e-5, rtol=1e-5)


def test_fresh_router_picks_full_attention_for_everything():
    logits = LayerRouter(64)(torch.randn(50, 64) * 100)
    assert hard_route(logits).all()
    torch.testing.assert_close(logits.softmax(-1)[:, 1], torch.full((50,), 0.98901), atol=1e-5, rtol=0)


def test_size_is_that_of_the_method():
    assert sum(p.numel() for p in LayerRouter(128).parameters()) == pytest.approx(0.59e6, rel=0.01)


def test_soft_route_is_a_hard_sample_with_the_soft_gradient():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0]]).repeat(20000, 1).requires_grad_()
    gate = soft_route(logits, 1.0)
    assert set(gate.tolist()) == {0.0, 1.0}
    # The Gumbel-max trick: samples follow the softmax, whatever the temperature.
    assert gate.mean().item() == pytest.approx(torch.tensor([0.0, 1.0]).softmax(0)[1].item(), abs=0.01)
    # Straight-through: the gradient is that of softmax((logits + noise) / temperature)[1].
    torch.manual_seed(1)
    gate = soft_route(logits, 1.5)
    gate.sum().backward()
    torch.manual_seed(1)
    noise = -torch.empty_like(logits).exponential_().log()
    again = logits.detach().requires_grad_()
    soft = ((again + noise) / 1.5).softmax(-1)[:, 1]
    assert torch.equal((soft > 0.5).float(), gate.detach())
    soft.sum().backward()
    torch.testing.assert_close(logits.grad, again.grad)


def test_ties_go_to_sparse_attention():
    assert hard_route(torch.tensor([[1.0, 1.0], [1.0, 1.1], [1.1, 1.0]])).tolist() == [False, True, False]
