"""Losses against the official numbers, their gradients, and hand-computed cases."""

from __future__ import annotations

import pytest
import torch
from conftest import golden_names, load_golden

from pixelllm.losses import mask_loss, point_loss, text_loss, token_mask


def assert_gradient(case, loss, tensor, key):
    loss.backward()
    torch.testing.assert_close(tensor.grad, case.tensor(key), **case.tolerance)


@pytest.mark.parametrize("name", golden_names("text_loss"))
def test_golden_text_loss_and_gradient(name):
    case = load_golden(name)
    logits = case.tensor("in.text_outputs").requires_grad_()
    token_ids = case.tensor("in.gt_text").long().flatten(0, -2)
    valid = torch.ones(len(token_ids), dtype=torch.bool)
    if "in.mask" in case.arrays:
        valid = case.tensor("in.mask").flatten() > 0
    loss = text_loss(
        logits.flatten(0, -3),
        token_ids,
        valid,
        pad_id=case.hparams["pad_token_id"],
        eos_id=case.hparams["end_token_id"],
        smoothing=case.hparams["label_smooth"],
    )
    torch.testing.assert_close(loss, case.tensor("out.text_loss"), **case.tolerance)
    assert_gradient(case, loss, logits, "out.grad_text_outputs")


@pytest.mark.parametrize("name", golden_names("point_loss"))
def test_golden_point_loss_and_gradient(name):
    case = load_golden(name)
    points = case.tensor("in.pred_points").requires_grad_()
    targets, target_valid = case.tensor("in.gt_points"), case.tensor("in.gt_valid_mask")
    if targets.ndim < points.ndim:  # one pair for the whole caption
        targets = targets[:, :, None].expand_as(points)
        target_valid = target_valid[:, :, None]
    valid = case.tensor("in.pred_valid_mask") & target_valid
    loss = point_loss(points, targets, valid, kind=case.hparams["loss_type"])
    torch.testing.assert_close(loss, case.tensor("out.point_loss"), **case.tolerance)
    assert_gradient(case, loss, points, "out.grad_pred_points")


@pytest.mark.parametrize("name", golden_names("sam_mask_loss"))
def test_golden_mask_loss_and_gradients(name):
    case = load_golden(name)
    logits = case.tensor("in.pred_masks").requires_grad_()
    ious = case.tensor("in.pred_ious").requires_grad_()
    loss = mask_loss(
        logits,
        ious,
        case.tensor("in.gt_masks")[..., 0],
        case.tensor("in.gt_valid") > 0,
        case.tensor("in.padding_mask") == 0,
        focal_weight=case.hparams["focal_loss_weight"],
        dice_weight=case.hparams["dice_loss_weight"],
        iou_weight=case.hparams["iou_pred_loss_weight"],
        focal_alpha=case.hparams["focal_alpha"],
        focal_gamma=case.hparams["focal_gamma"],
    )
    for term, key in (
        (loss.focal, "mask_focal_loss"),
        (loss.dice, "mask_dice_loss"),
        (loss.iou, "mask_iou_pred_loss"),
        (loss.total, "mask_loss"),
    ):
        torch.testing.assert_close(term, case.tensor(f"out.{key}"), **case.tolerance)
    assert_gradient(case, loss.total, logits, "out.grad_pred_masks")
    torch.testing.assert_close(ious.grad, case.tensor("out.grad_pred_ious"), **case.tolerance)


@pytest.mark.parametrize("name", golden_names("token_valid_mask"))
def test_golden_token_mask(name):
    case = load_golden(name)
    token_ids = case.tensor("in.text_tokens")
    begin, end = case.hparams["begin_token_id"], case.hparams["end_token_id"]
    for key, exclude in case.hparams["ignore_strings"].items():
        mask = token_mask(token_ids, exclude, begin, end, pad_id=0)
        assert torch.equal(mask, case.tensor(key)), exclude
