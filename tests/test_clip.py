"""CLIP with fused layers: the official numbers, one backbone, and the gradient of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import PERCEPTION_TOLERANCE, load_perception, part_of, perception_names
from official_perception import official_clip
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPVisionConfig, CLIPVisionModel

from pixelllm.models.clip import FusedClip
from pixelllm.models.stem import ConvStem


def patch_of(images: Tensor, num_tokens: int) -> int:
    return round(images.shape[-1] / num_tokens**0.5)


@pytest.mark.parametrize("name", perception_names("clip_fusion"))
def test_golden_clip_fusion(name: str):
    case = load_perception(name)
    images, lower, higher = case["in.images"], case["in.coef_lower"], case["in.coef_higher"]
    fine_patch = patch_of(images, case["out.fused_higher"].shape[1])
    clip = official_clip(
        part_of(case, "w."), images.shape[-1], int(case["in.num_heads"]), fine_patch
    )
    grid = images.shape[-1] // fine_patch

    def coarse(raw: Tensor) -> Tensor:
        clip.coarse_weights = torch.nn.Parameter(raw)
        return clip.coarse(images)

    def fine(raw: Tensor) -> Tensor:
        clip.fine_weights = torch.nn.Parameter(raw)
        return clip.fine(images).flatten(2).mT

    with torch.no_grad():
        assert_close(clip.positions(grid, grid), case["out.pos_emb8"], **PERCEPTION_TOLERANCE)
        states = torch.eye(len(lower)).log()  # each picks one state
        for state, expected in zip(states, case["out.hidden14"].unbind(1), strict=False):
            assert_close(coarse(state), expected[:, 1:], **PERCEPTION_TOLERANCE)
        for state, key in ((states[0], "first"), (states[-1], "last_used")):
            expected = case[f"out.hidden8_{key}"][:, 1:]
            assert_close(fine(state), expected, **PERCEPTION_TOLERANCE)
        assert_close(coarse(lower), case["out.fused_lower"], **PERCEPTION_TOLERANCE)
        assert_close(fine(higher), case["out.fused_higher"], **PERCEPTION_TOLERANCE)


def new_clip(fine_patch: int = 4, **options: Any) -> FusedClip:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 2, "image_size": 24, "patch_size": 8}
    return FusedClip(CLIPVisionModel(CLIPVisionConfig(**sizes)), fine_patch, **options)


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 3, 24, 24, generator=generator)


def test_a_frozen_backbone_still_teaches_its_weights(images: Tensor):
    """Their gradient is that of a sum over all states at once."""
    clip = new_clip()
    clip.vit.requires_grad_(False)
    target = torch.randn(2, 9, 16)
    (clip.coarse(images) * target).sum().backward()
    raw = clip.coarse_weights.detach().requires_grad_()
    with torch.no_grad():
        states = [clip.vit.pre_layrnorm(clip.embed(images, 8))]
        for block in clip.vit.encoder.layers:
            states.append(block(states[-1], None))
    fused = torch.einsum("l,lbnc->bnc", raw.softmax(0), torch.stack(states))
    (fused[:, 1:] * target).sum().backward()
    assert clip.coarse_weights.grad.abs().max() > 1e-3
    assert_close(clip.coarse_weights.grad, raw.grad)
    assert clip.fine_weights.grad is None


def test_every_parameter_learns(images: Tensor):
    clip = new_clip()
    (clip.coarse(images).square().mean() + clip.fine(images).square().mean()).backward()
    assert [name for name, p in clip.named_parameters() if p.grad is None] == []


def test_a_fine_pass_at_the_own_patch_size_is_the_coarse_one(images: Tensor):
    clip = new_clip(fine_patch=8)
    assert_close(clip.fine(images).flatten(2).mT, clip.coarse(images))


def test_the_last_layer_alone_is_no_sum(images: Tensor):
    """The baseline of layer fusion; it has nothing to learn."""
    last, fused = new_clip(fuse_layers=False), new_clip()
    state = fused.vit(images).last_hidden_state[:, 1:]  # the last block is cut off
    assert_close(last.coarse(images), state)
    assert not torch.allclose(fused.coarse(images), state, atol=1e-2)
    assert all(name.startswith("vit.") for name, _ in last.named_parameters())


def test_a_stem_sees_a_larger_image_in_the_fine_pass(images: Tensor):
    """Its patches are then as small as those of a resized kernel would be."""
    clip = new_clip(stem=ConvStem(16, 8)).eval()
    large = torch.nn.functional.interpolate(images, scale_factor=2, mode="bilinear")
    clip.coarse_weights = clip.fine_weights
    assert_close(clip.fine(images).flatten(2).mT, clip.coarse(large))


def test_a_frozen_backbone_keeps_its_statistics(images: Tensor):
    """Batch norms of a stem in training mode would change what was pretrained."""
    clip = new_clip(stem=ConvStem(16, 8))
    clip.vit.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    clip.train().fine(images)
    assert_close(clip.state_dict(), before, rtol=0, atol=0)


def test_images_of_other_sizes_are_seen(generator: torch.Generator):
    clip = new_clip()
    images = torch.randn(1, 3, 16, 40, generator=generator)
    assert clip.coarse(images).shape == (1, 10, 16)
    assert clip.fine(images).shape == (1, 16, 4, 10)


def test_an_image_that_patches_do_not_fill_is_refused():
    with pytest.raises(ValueError, match="multiples of 8, not 24 x 20"):
        new_clip().coarse(torch.zeros(1, 3, 24, 20))
