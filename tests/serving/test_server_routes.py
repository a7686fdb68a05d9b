"""What a server's routers read of prompts' ends: without vLLM, against the transformers engine's parts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_attention.errors import ServingError
from flux_attention.hf.ends import take_ends as take_ends_of_tensor
from flux_attention.hf.inputs import Prompt
from flux_attention.hf.layout import BatchLayout
from flux_attention.kernels import reference
from flux_attention.router import LayerRouter, Pooling, hard_route
from flux_attention.serving.routes import Routers, Unrotation, lay_out, take_ends


class Rotary(torch.nn.Module):
    """A rotary embedding with the facts of vLLM's."""

    def __init__(self, rotary_dim, neox, scale=1.0):
        super().__init__()
        angles = torch.arange(400)[:, None] / 10 ** (torch.arange(0, rotary_dim, 2) / rotary_dim * 4)
        self.cos_sin_cache = torch.cat([angles.cos(), angles.sin()], dim=-1) * scale
        self.rotary_dim, self.is_neox_style = rotary_dim, neox

    def forward(self, states, positions):
        cos, sin = self.cos_sin_cache[positions][:, None].chunk(2, dim=-1)
        turned, rest = states[..., : self.rotary_dim], states[..., self.rotary_dim :]
        one, two = turned.chunk(2, -1) if self.is_neox_style else (turned[..., ::2], turned[..., 1::2])
        one, two = one * cos - two * sin, two * cos + one * sin
        turned = torch.cat([one, two], -1) if self.is_neox_style else torch.stack([one, two], -1).flatten(-2)
        return torch.cat([turned, rest], -1)


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("rotary_dim, scale", [(16, 1.0), (8, 1.0), (16, 1.3)])
def test_rotation_is_undone(neox, rotary_dim, scale):
    rotary, positions = Rotary(rotary_dim, neox, scale), torch.randint(400, (30,))
    states = torch.randn(30, 2, 16)
    back = Unrotation(rotary)(rotary(states, positions).transpose(0, 1), positions).transpose(0, 1)
    torch.testing.assert_close(back, states, atol=1e-5, rtol=1e-4)
    assert (rotary(states, positions) - states).abs().max() > 0.5


def test_layers_without_rotation_are_read_as_they_are_and_unknown_rotations_refused():
    states = torch.randn(3, 4)
    assert Unrotation(None)(states, torch.arange(3)) is states
    with pytest.raises(ServingError, match="Identity"):
        Unrotation(torch.nn.Identity())


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(6, 20), st.booleans())
def test_the_ends_and_what_is_pooled_of_them_are_those_of_the_other_engine(lengths, end_tokens, shared):
    prompts = [torch.randint(1, 90, (length,)) for length in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    real = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
    layout = BatchLayout.from_mask(real)
    tokens, counts = take_ends_of_tensor(Prompt(padded, layout, lengths), end_tokens)
    ends = [take_ends(prompt.tolist(), end_tokens) for prompt in prompts]
    assert ends == [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]

    flat, positions, metadata = lay_out(ends, 6, torch.device("cpu"))
    assert (flat.dtype, positions.dtype) == (torch.int32, torch.int64)  # what vLLM compiles models for, unchecked
    assert flat.view(len(ends), -1).shape == positions.view(len(ends), -1).shape == tokens.shape
    rotary, layers = Rotary(8, True), torch.randn(2, len(flat), 3, 8)
    for layer, heads in enumerate(layers):
        metadata.read(layer, rotary(heads, positions) if layer == 0 or shared else heads)
    found = metadata.pooled([Unrotation(rotary), Unrotation(rotary if shared else None)])
    expected = [Pooling(counts, 6)(heads.view(*tokens.shape, 3, 8)) for heads in layers]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-4)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=3))
def test_each_pair_of_ends_attends_to_itself_alone(counts):
    flat, _, metadata = lay_out([[1] * count for count in counts], 4, torch.device("cpu"))
    query, key, value = torch.randn(len(flat), 4, 8), *torch.randn(2, len(flat), 2, 8)
    found = metadata.attend(query, key, value, 0.3).view(len(counts), -1, 4, 8)
    rows = [states.view(len(counts), -1, *states.shape[1:]) for states in (query, key, value)]
    for row, count in enumerate(counts):
        alone = [states[row : row + 1, :count].transpose(1, 2) for states in rows]
        torch.testing.assert_close(found[row, :count], reference.full(*alone, 0.3)[0].transpose(0, 1))


@pytest.mark.parametrize("takes_budget", [False, True])
def test_all_routers_at_once_say_what_each_says(takes_budget):
    torch.manual_seed(0)
    routers = [LayerRouter(8, takes_budget) for _ in range(5)]
    for router in routers:
        torch.nn.init.normal_(router.head[-1].weight)
        torch.nn.init.zeros_(router.head[-1].bias)
    pooled = torch.randn(5, 7, 8)
    told = [torch.full((7,), 0.3)] if takes_budget else []
    expected = torch.stack([hard_route(router(x, *told)) for router, x in zip(routers, pooled, strict=True)], dim=1)
    found = Routers(routers)(pooled, 0.3 if takes_budget else None)
    assert torch.equal(found, expected) and 0 < found.sum() < found.numel()


def test_a_router_that_gives_no_number_leaves_its_layer_full():
    routers = [LayerRouter(8) for _ in range(2)]
    routers[0].head[-1].bias.data[:] = torch.tensor([3.0, 0.0])
    pooled = torch.randn(2, 2, 8)
    pooled[0, 1] = float("nan")
    assert Routers(routers)(pooled).tolist() == [[False, True], [True, True]]
