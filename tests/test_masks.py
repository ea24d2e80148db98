"""Mask adapter and mask head against the official numbers, and what padding and gate promise."""

from __future__ import annotations

import pytest
import torch
from conftest import GoldenCase, golden_names, load_golden
from torch.testing import assert_close

from pixelllm.models.masks import MaskAdapter, MaskHead
from pixelllm.models.sam import MaskDecoder, PromptEncoder
from pixelllm.scenic import part_state

B, K, N, T = 2, 3, 4, 5


def adapter_of(case: GoldenCase) -> MaskAdapter:
    h = case.hparams
    adapter = MaskAdapter(
        case.arrays["in.visual_features"].shape[-1],
        case.arrays["in.textual_features"].shape[-1],
        h["transformer_dim"],
        h["depth"],
        h["num_heads"],
        h["mlp_dim"],
        gated=h["gating"],
        projected=h["input_projection"],
    )
    adapter.load_state_dict(part_state("mask_adapter", case.weights()))
    return adapter


@pytest.mark.parametrize("name", golden_names("mask_adapter"))
def test_golden_mask_adapter(name: str):
    case = load_golden(name)
    inputs = ("sparse_embedding", "visual_features", "textual_features")
    tokens = adapter_of(case)(*(case.tensor(f"in.{key}") for key in inputs), None)
    assert_close(tokens, case.tensor("out.embedding"), **case.tolerance)


def new_head() -> MaskHead:
    torch.manual_seed(0)
    return MaskHead(MaskAdapter(12, 10, 16, depth=2, mlp_width=24), MaskDecoder(16, mlp_width=24))


def small_head() -> MaskHead:
    """With an open gate."""
    head = new_head()
    torch.nn.init.constant_(head.adapter.alpha, 0.5)
    return head


def small_inputs(generator: torch.Generator) -> tuple[torch.Tensor | PromptEncoder, ...]:
    corner, extent = (torch.rand(2, B, K, 2, generator=generator) * 30).unbind()
    return (
        torch.randn(B, 16, 4, 4, generator=generator),
        torch.cat([corner, corner + extent], dim=-1),
        PromptEncoder(16, (4, 4), (64, 64)),
        torch.randn(B, K, N, 12, generator=generator),
        torch.randn(B, K, T, 10, generator=generator),
    )


def test_words_on_padding_change_nothing(generator: torch.Generator):
    """Otherwise the mask of an expression depends on the longest one in its batch."""
    head, inputs = small_head(), small_inputs(generator)
    padding = torch.zeros(B, K, T, dtype=torch.bool)
    padding[1, 2, 2:] = True
    masks, ious = head(*inputs, padding)
    words = inputs[4].masked_fill(padding[..., None], 1e3)
    again = head(*inputs[:4], words, padding)
    assert_close((masks, ious), again)
    alone = head(*inputs[:4], inputs[4][:, :, :2])
    assert_close(masks[1, 2], alone[0][1, 2])
    whole = head(*inputs)
    assert_close(masks[0], whole[0][0])
    assert not torch.allclose(masks[1, 2], whole[0][1, 2], atol=1e-5)


def test_training_starts_from_the_masks_of_sam(generator: torch.Generator):
    """A closed gate gives what SAM itself answers to the box, and opens by its gradient."""
    head, inputs = new_head(), small_inputs(generator)
    features, boxes_px, prompts = inputs[:3]
    masks, ious = head(*inputs)
    sparse, dense = prompts(None, boxes_px[1], None)
    for k in range(K):
        expected = super(MaskDecoder, head.decoder).forward(
            features[1:], prompts.get_dense_pe(), sparse[k : k + 1], dense[k : k + 1], False
        )
        assert_close(masks[1, k], expected[0][0, 0])
        assert_close(ious[1, k], expected[1][0, 0])
    masks.square().mean().backward()
    assert head.adapter.alpha.grad.abs().min() > 0


def test_a_frozen_decoder_passes_gradient_to_the_adapter_and_the_words(generator: torch.Generator):
    head, inputs = small_head(), small_inputs(generator)
    head.decoder.requires_grad_(False)
    for tokens in inputs[3:]:
        tokens.requires_grad_()
    masks, ious = head(*inputs)
    (masks.square().mean() + ious.square().mean()).backward()
    assert all(tokens.grad.abs().sum() > 0 for tokens in inputs[3:])
    assert all(p.grad is not None for p in head.adapter.parameters())
    assert all(p.grad is None for p in head.decoder.parameters())


def test_permuted_prompts_give_permuted_masks(generator: torch.Generator):
    head, inputs = small_head(), small_inputs(generator)
    features, boxes_px, prompts, prefix, hidden = inputs
    order = [2, 0, 1]
    masks, _ = head(*inputs)
    again, _ = head(features, boxes_px[:, order], prompts, prefix[:, order], hidden[:, order])
    assert_close(again, masks[:, order])


def test_masks_leave_autocast_in_float32(generator: torch.Generator):
    head, inputs = small_head(), small_inputs(generator)
    masks, ious = head(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = head(*inputs)
    assert cast[0].dtype == cast[1].dtype == torch.float32
    assert masks.shape == (B, K, 16, 16) and ious.shape == (B, K)
    assert_close(cast, (masks, ious), atol=0.1, rtol=0.1)
