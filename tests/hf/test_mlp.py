"""MLPs in pieces."""

import torch
from helpers.models import CONFIG, ids

from flux_attention import attach
from flux_attention.hf import mlp


def test_activations_in_pieces_change_nothing(model, monkeypatch):
    prompt = ids(2, 40)
    layer = model.get_decoder().layers[0]
    calls, forward = [], layer.mlp.forward
    monkeypatch.setattr(layer.mlp, "forward", lambda states: calls.append(states.shape[1]) or forward(states))
    attach(model, CONFIG)
    with torch.no_grad():
        whole = model(prompt).logits
        monkeypatch.setattr(mlp, "CHUNK_TOKENS", 15)
        torch.testing.assert_close(model(prompt).logits, whole, atol=2e-5, rtol=1e-4)
    assert calls == [40, 7, 7, 7, 7, 7, 5]  # of two rows each
