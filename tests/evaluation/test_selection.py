"""Choosing full layers for the methods that need a set."""

from flux_attention.evaluation.selection import greedy_order


def test_greedy_order_takes_what_lowers_the_loss_most():
    worth = {3: 5.0, 5: 1.0, 8: 2.0, 9: 0.1}
    asked = []

    def loss(chosen):
        asked.append(chosen)
        return -sum(worth[layer] for layer in chosen) - 3.0 * ({5, 9} <= set(chosen))

    assert greedy_order(loss, list(worth), 2) == [3, 8]
    assert len(asked) == 4 + 3
    assert greedy_order(loss, list(worth), 0) == []
    assert greedy_order(loss, list(worth), 4) == [3, 8, 5, 9]
