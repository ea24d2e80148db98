"""EVA-02 against timm and the golden cases."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
from conftest import GoldenCase, golden_names, load_golden
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLU, resample_abs_pos_embed
from timm.models.eva import Eva
from torch import nn
from torch.testing import assert_close

from pixelllm.models.eva02 import AlignedSwiGLU, Eva02Encoder, eva02, eva02_from_timm
from pixelllm.models.stem import ConvStem
from pixelllm.scenic import part_state


def encoder_of(case: GoldenCase) -> Eva02Encoder:
    h = case.hparams
    encoder = eva02(
        h["pretrain_img_size"],
        h["patch_size"],
        h["embed_dim"],
        h["depth"],
        h["num_heads"],
        drop_path=h["drop_path_rate"],
        final_norm=h["use_ln_post"],
    )
    encoder.vit.load_state_dict(part_state("git_backbone", case.weights()))
    return encoder.eval()


@pytest.mark.parametrize("name", golden_names("eva02_vit"))
def test_golden_eva02_vit(name: str):
    case = load_golden(name)
    features = encoder_of(case)(case.tensor("in.images").movedim(-1, 1))
    expected = case.tensor("out.tokens")[:, 1:]  # ours drops the class token
    assert_close(features.flatten(2).mT, expected, **case.tolerance)


@pytest.mark.parametrize("interpolate_rope", [False, True])
def test_encoder_equals_timm_at_another_size(interpolate_rope: bool, generator: torch.Generator):
    """timm fixes the size when the model is built: table and rotary positions resized once."""
    sizes = dict(
        patch_size=14, embed_dim=36, depth=2, num_heads=3, mlp_ratio=8 / 3, qkv_fused=False,
        swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True, num_classes=0, global_pool="",
    )  # fmt: skip
    ours = eva02(56, 14, 36, 2, 3, interpolate_rope=interpolate_rope).eval()
    theirs = Eva(img_size=90, ref_feat_shape=4 if interpolate_rope else None, **sizes).eval()
    state = ours.vit.state_dict()
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], (6, 6), (4, 4))
    theirs.load_state_dict(state)
    for block in theirs.blocks:
        block.mlp.norm.eps = 1e-5
    images = torch.randn(2, 3, 90, 90, generator=generator)
    expected = theirs.forward_features(images)[:, 1:]
    assert_close(ours(images).flatten(2).mT, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("eva02_tiny_patch14_224", 27),
        ("eva02_large_patch14_224", 27),
        ("eva02_large_patch14_clip_224", 27),
        ("eva02_base_patch16_clip_224", 24),
    ],
)
def test_timm_names_build_and_take_the_published_frame(name: str, cells: int):
    with torch.device("meta"):
        encoder = eva02_from_timm(name).eval()
        features = encoder(torch.empty(1, 3, 384, 384))
    assert features.shape == (1, encoder.out_channels, cells, cells)


def test_named_encoder_equals_timms_own_features(generator: torch.Generator):
    ours = eva02_from_timm("eva02_tiny_patch14_224", interpolate_rope=True).eval()
    theirs = timm.create_model("eva02_tiny_patch14_224", num_classes=0, global_pool="").eval()
    theirs.load_state_dict(ours.vit.state_dict())
    images = torch.randn(1, 3, 224, 224, generator=generator)
    with torch.no_grad():
        expected = theirs.forward_features(images)[:, 1:]
        assert_close(ours(images).flatten(2).mT, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("hidden", [50, 128])
def test_aligned_gated_layer_learns_as_timms(hidden: int, generator: torch.Generator):
    theirs = SwiGLU(12, hidden, norm_layer=nn.LayerNorm)
    theirs.fc1_g.weight.data.normal_(generator=generator)
    ours = deepcopy(theirs)
    ours.__class__ = AlignedSwiGLU
    x = torch.randn(2, 5, 12, generator=generator)
    results = [layer(x) for layer in (ours, theirs)]
    for result in results:
        result.pow(2).sum().backward()
    assert_close(*results)
    for mine, timms in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(mine.grad, timms.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_aligned_gated_layer_answers_from_weights_that_learnt(
    dtype: torch.dtype, generator: torch.Generator, tmp_path: Path
):
    """Without gradients the rows of zeros lie behind the weights, wherever those went."""
    ours = SwiGLU(12, 50, norm_layer=nn.LayerNorm)
    ours.__class__ = AlignedSwiGLU
    ours.to(dtype)
    x = torch.randn(2, 5, 12, generator=generator, dtype=dtype)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1)
    ours(x).sum().backward()
    optimizer.step()
    assert all(layer.weight.untyped_storage().nbytes() == 64 * 12 * dtype.itemsize
               for layer in (ours.fc1_g, ours.fc1_x))  # fmt: skip
    theirs = SwiGLU(12, 50, norm_layer=nn.LayerNorm).to(dtype)
    save_file(ours.state_dict(), tmp_path / "weights.safetensors")
    theirs.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    with torch.no_grad():
        assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
        assert_close(deepcopy(ours)(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_large_encoder_has_the_published_parameter_count():
    """The table stays that of pretraining, as in the release: 16 x 16 and the class token."""
    with torch.device("meta"):
        by_size, by_name = eva02(224, 14, 1024, 24, 16), eva02_from_timm("eva02_large_patch14_224")
    assert sum(p.numel() for p in by_size.parameters()) == 303_268_800
    shapes = {key: value.shape for key, value in by_size.state_dict().items()}
    assert shapes == {key: value.shape for key, value in by_name.state_dict().items()}


def test_stem_replaces_the_patch_embedding_and_everything_learns():
    encoder = eva02(64, 16, 24, 2, 3, stem=ConvStem(24, 16))
    features = encoder(torch.randn(1, 3, 64, 64))
    assert features.shape == (1, 24, 4, 4)
    features.pow(3).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_drop_path_grows_with_depth_and_only_trains():
    encoder = eva02(56, 14, 24, 3, 3, drop_path=0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in encoder.vit.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    images = torch.randn(16, 3, 56, 56)
    assert not torch.equal(encoder(images), encoder(images))
    encoder.eval()
    assert torch.equal(encoder(images), encoder(images))
