"""The two-way transformer of many prompts against segment_anything's, one prompt at a time."""

from __future__ import annotations

import pytest
import torch
from segment_anything.modeling import TwoWayTransformer
from torch import Tensor
from torch.testing import assert_close

from pixelllm.models.two_way import two_way

B, K, Q, H, W, D = 2, 3, 4, 3, 5, 16


def small_transformer() -> TwoWayTransformer:
    torch.manual_seed(0)
    return TwoWayTransformer(3, D, num_heads=2, mlp_dim=24)


def official(transformer: TwoWayTransformer, tokens: Tensor, cells: Tensor, positions: Tensor):
    """Every prompt with its own copy of everything."""
    maps = (
        x.expand(B, K, H * W, D).flatten(0, 1).mT.unflatten(2, (H, W)) for x in (cells, positions)
    )
    results = transformer(*maps, tokens.flatten(0, 1))
    return tuple(x.unflatten(0, (B, K)) for x in results)


@pytest.mark.parametrize("prompts_of_cells", [1, K])
def test_values_and_gradients_equal_segment_anything(prompts_of_cells: int, generator):
    """Sharing must not lose what the gradient of one cell gets from several prompts."""
    transformer = small_transformer()
    shapes = [(B, K, Q, D), (B, prompts_of_cells, H * W, D), (H * W, D)]
    inputs = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    learnt = [*inputs, *transformer.parameters()]
    outcomes = []
    for call in (official, two_way):
        outputs = call(transformer, *inputs)
        loss = sum(output.pow(3).sum() for output in outputs)
        outcomes.append([*outputs, *torch.autograd.grad(loss, learnt)])
    for theirs, ours in zip(*outcomes, strict=True):
        assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_hidden_cells_are_as_good_as_absent(generator):
    transformer = small_transformer()
    tokens = torch.randn(B, K, Q, D, generator=generator)
    cells = torch.randn(B, K, H * W, D, generator=generator)
    seen = torch.ones(B, K, H * W, dtype=torch.bool)
    seen[..., 7:] = False
    hidden, _ = two_way(transformer, tokens, cells, seen=seen)
    absent, _ = two_way(transformer, tokens, cells[:, :, :7])
    assert_close(hidden, absent, atol=1e-5, rtol=1e-5)
