"""PerceptionGPT's losses: the official numbers, and what ours do differently on purpose."""

from __future__ import annotations

import pytest
import torch
from conftest import PERCEPTION_TOLERANCE, load_perception, perception_names
from torch.testing import assert_close

from pixelllm.vis_losses import answer_loss, box_loss, vis_mask_loss


@pytest.mark.parametrize("name", perception_names("box_loss"))
def test_golden_box_loss(name: str):
    case = load_perception(name)
    boxes, targets = case["in.pred"].requires_grad_(), case["in.target"]
    ours, official = box_loss(boxes, targets), box_loss(boxes, targets, centre_reading=True)
    for found, key in (
        (ours.l1, "l1"),
        (ours.giou, "giou_xyxy"),
        (official.giou, "giou_official"),
        (official.l1 + official.giou, "total_official"),
    ):
        assert_close(found, case[f"out.{key}"], **PERCEPTION_TOLERANCE)
    for row in range(len(boxes)):
        one = slice(row, row + 1)
        giou = [box_loss(boxes[one], targets[one], reading).giou for reading in (False, True)]
        expected = [case[f"out.giou_{kind}_per_box"][row] for kind in ("xyxy", "official")]
        assert_close(giou, expected, **PERCEPTION_TOLERANCE)
    (official.l1 + official.giou).backward()
    assert_close(boxes.grad, case["out.grad_pred_official"], **PERCEPTION_TOLERANCE)


@pytest.mark.parametrize("name", perception_names("mask_loss"))
def test_golden_mask_loss(name: str):
    case = load_perception(name)
    logits, targets = case["in.logits"].requires_grad_(), case["in.target"]
    loss = vis_mask_loss(logits[:, 0], targets, whole_batch=True)
    assert_close(loss.bce, case["out.bce"], **PERCEPTION_TOLERANCE)
    assert_close(loss.dice, case["out.dice"], **PERCEPTION_TOLERANCE)
    total = loss.bce + loss.dice
    assert_close(total, case["out.total"], **PERCEPTION_TOLERANCE)
    total.backward()
    assert_close(logits.grad, case["out.grad_logits"], **PERCEPTION_TOLERANCE)
    empty = torch.zeros(2, 8, 8)
    dice = vis_mask_loss(empty - 100, empty, whole_batch=True).dice
    assert_close(dice, case["out.dice_empty_vs_empty"], **PERCEPTION_TOLERANCE)


def test_corners_in_any_order_are_the_same_box():
    """A decoder is free to swap them; unordered corners would have a negative area."""
    boxes = torch.tensor([[0.8, 0.6, 0.2, 0.1]])
    assert_close(box_loss(boxes, boxes[:, [2, 3, 0, 1]]).giou, torch.tensor(0.0))


def test_a_small_mask_counts_as_much_as_a_large_one():
    """With one Dice of the whole batch a missed small object would hardly show."""
    targets = torch.zeros(2, 16, 16)
    targets[0, :, :8] = 1
    targets[1, 0, 0] = 1
    logits = (targets * 2 - 1) * 50
    logits[1] = -50
    assert_close(vis_mask_loss(logits, targets).dice, torch.tensor(0.5))
    assert vis_mask_loss(logits, targets, whole_batch=True).dice < 0.01


def test_small_logits_are_scored_at_the_size_of_the_targets():
    logits = torch.full((1, 4, 4), 50.0)
    assert vis_mask_loss(logits, torch.ones(1, 16, 16)).bce < 1e-6


def test_nothing_to_score_gives_zero_with_a_graph():
    """The mean of nothing is NaN, and would stop training on a batch of questions."""
    boxes = torch.zeros(0, 4, requires_grad=True)
    logits = torch.zeros(0, 8, 8, requires_grad=True)
    words = torch.zeros(0, 5, requires_grad=True)
    losses = [
        *box_loss(boxes, boxes.detach()),
        *box_loss(boxes, boxes.detach(), centre_reading=True),
        *vis_mask_loss(logits, torch.zeros(0, 16, 16)),
        *vis_mask_loss(logits, torch.zeros(0, 16, 16), whole_batch=True),
        answer_loss(words, torch.zeros(0, dtype=torch.int64)),
    ]
    assert [loss.item() for loss in losses] == [0.0] * len(losses)
    sum(losses).backward()
