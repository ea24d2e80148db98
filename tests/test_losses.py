"""Losses against the official numbers, their gradients, and hand-computed cases."""

from __future__ import annotations

import pytest
import torch
from conftest import golden_names, load_golden

from pixelllm.losses import mask_iou, mask_loss, point_loss, text_loss, token_mask


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


def sheet_logits():
    """Reference sheet, section 15: V = 7, two captions of five tokens, EOS 1."""
    return torch.sin(0.7 * torch.arange(2 * 5 * 7)).view(2, 5, 7)


@pytest.mark.parametrize(
    ("second", "row_valid", "expected"),
    [
        ([0, 2, 1, 0, 0], [True, True], 2.152665),
        ([0, 2, 1, 0, 0], [True, False], 1.983670),
        ([0, 1, 0, 0, 0], [True, True], 1.983670),  # an empty caption
    ],
)
def test_text_loss_of_the_reference_sheet(second, row_valid, expected):
    token_ids = torch.tensor([[0, 3, 5, 1, 0], second])
    loss = text_loss(sheet_logits(), token_ids, torch.tensor(row_valid), pad_id=0, eos_id=1)
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_point_loss_of_the_reference_sheet():
    points = 10.0 * torch.arange(2 * 3 * 2 * 2).view(2, 3, 2, 2)
    targets = torch.zeros(2, 3, 2, 2)
    targets[0, 1] = torch.tensor([[30, 40], [50, 60]])
    targets[1, 0] = torch.tensor([[100, 100], [150, 160]])
    targets[1, 1] = torch.tensor([[160, 170], [180, 190]])
    valid = torch.tensor([[False, True, True], [True, True, False]])
    assert point_loss(points, targets, valid).item() == pytest.approx(9.166667, abs=1e-5)
    assert point_loss(points, targets, valid, kind="l1").item() == pytest.approx(30.625)


def test_mask_loss_of_the_reference_sheet():
    ticks = torch.arange(4.0)
    logits = 2 - (ticks[:, None] - 1.5).abs() - (ticks - 1.5).abs()
    masks = torch.zeros(1, 2, 16, 16)
    masks[0, :, 4:12, 4:12] = 1
    padding = torch.zeros(1, 16, 16, dtype=torch.bool)
    padding[:, 12:] = True
    loss = mask_loss(
        logits.expand(1, 2, 1, 4, 4),
        torch.full((1, 2, 1), 0.5),
        masks,
        torch.tensor([[True, False]]),
        padding,
    )
    assert [term.item() for term in loss] == pytest.approx(
        [1.692090, 1.133245, 0.545531, 0.013314], abs=1e-5
    )


@pytest.mark.parametrize(
    ("token_ids", "bos_eos", "exclude", "expected"),
    [
        ([0, 7, 8, 9, 1, 0, 0], (0, 1), "begin,end,pad", "0111000"),
        ([0, 7, 8, 9, 1, 0, 0], (0, 1), "^end-1", "0001000"),
        ([0, 7, 8, 9, 10, 11, 12], (0, 1), "begin,end,pad", "0111111"),
        ([0, 7, 8, 9, 10, 11, 12], (0, 1), "^end-1", "0000000"),
        ([101, 7, 8, 9, 102, 0, 0], (101, 102), "text", "1000111"),
        ([101, 7, 8, 9, 102, 0, 0], (101, 102), "pad", "1111100"),
    ],
)
def test_token_mask_of_the_reference_sheet(token_ids, bos_eos, exclude, expected):
    mask = token_mask(torch.tensor(token_ids), exclude, *bos_eos, pad_id=0)
    assert mask.tolist() == [digit == "1" for digit in expected]


def test_nothing_valid_gives_zero_and_finite_gradients():
    logits = torch.randn(2, 5, 7, requires_grad=True)
    points = torch.randn(2, 5, 2, 2, requires_grad=True)
    none = torch.zeros(2, 5, dtype=torch.bool)
    token_ids = torch.randint(2, 7, (2, 5))
    loss = text_loss(logits, token_ids, none[:, 0], 0, 1)
    loss = loss + point_loss(points, torch.ones(2, 5, 2, 2), none)
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all() and (points.grad == 0).all()


def test_losses_are_float32_for_bfloat16_inputs():
    logits = torch.randn(1, 3, 7, dtype=torch.bfloat16)
    loss = text_loss(logits, torch.tensor([[0, 4, 1]]), torch.tensor([True]), 0, 1)
    assert loss.dtype == torch.float32
    points = torch.rand(1, 3, 2, 2, dtype=torch.bfloat16)
    loss = point_loss(points, torch.ones(1, 3, 2, 2), torch.ones(1, 3, dtype=torch.bool))
    assert loss.dtype == torch.float32


def test_unknown_kind_of_token_is_an_error():
    with pytest.raises(ValueError, match="'last'.*begin, end, end-1, pad, text"):
        token_mask(torch.tensor([0, 1]), "pad,last", 0, 1, 0)


def test_mask_iou_by_hand():
    first, second = torch.zeros(2, 2, 4, 4, dtype=torch.bool)
    first[0, :2], second[0, 1:3] = True, True  # one shared row of three
    assert mask_iou(first, second).tolist() == pytest.approx([1 / 3, 0])
