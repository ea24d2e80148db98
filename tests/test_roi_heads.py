"""Crops of a pyramid and the cascade on them."""

from __future__ import annotations

import pytest
import torch
from conftest import golden_names, load_golden
from torch.testing import assert_close

from pixelllm.models.roi_heads import RoiHeads, crop_features


@pytest.mark.parametrize("name", golden_names("roi_ops"))
def test_golden_crops(name: str):
    """Catches another rule for the level, and borders that repeat instead of fading to zero."""
    case = load_golden(name)
    h, boxes = case.hparams, case.tensor("in.boxes")
    levels = [case.tensor(f"in.feature_l{i}").permute(0, 3, 1, 2) for i in range(len(h["strides"]))]
    crops = crop_features(levels, h["strides"], boxes, h["output_size"])
    expected = case.tensor("out.roi_align_multilevel").flatten(0, 1).permute(0, 3, 1, 2)
    assert_close(crops, expected, **case.tolerance)
    one = h["single"]
    crops = crop_features([levels[one["level"]]], [one["scale"]], boxes, one["output_size"])
    expected = case.tensor("out.roi_align_single").flatten(0, 1).permute(0, 3, 1, 2)
    assert_close(crops, expected, **case.tolerance)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_images_without_objects_train_the_classes_alone(sigmoid: bool):
    torch.manual_seed(0)
    heads = RoiHeads(4, (8,), (0.5, 0.6), sigmoid=sigmoid)
    levels = [torch.randn(2, 4, 8, 8), torch.randn(2, 4, 4, 4)]
    proposals = torch.tensor([[[0.0, 0, 30, 30], [0, 0, 0, 0]]]).expand(2, -1, -1)
    stages = heads(levels, [8, 16], proposals, torch.tensor([[64, 64]] * 2))
    assert not stages[1].proposals_px.requires_grad
    nothing = torch.zeros(2, 1, 4), torch.zeros(2, 1, dtype=torch.bool)
    classes, deltas = heads.losses(stages, *nothing)
    assert classes > 0 and deltas == 0
    (classes + deltas).backward()
    assert heads.heads[0].object.weight.grad.abs().sum() > 0


def test_padded_proposals_do_not_count():
    torch.manual_seed(0)
    heads = RoiHeads(4, (8,))
    levels, sizes = [torch.randn(1, 4, 8, 8)], torch.tensor([[64, 64]])
    boxes, valid = torch.tensor([[[4.0, 4, 30, 30]]]), torch.tensor([[True]])
    proposals = torch.tensor([[[3.0, 4, 30, 28], [40, 40, 50, 60], [0, 0, 0, 0], [0, 0, 0, 0]]])
    full, _ = heads.losses(heads(levels, [8], proposals, sizes), boxes, valid)
    short, _ = heads.losses(heads(levels, [8], proposals[:, :2], sizes), boxes, valid)
    assert_close(full, short)
