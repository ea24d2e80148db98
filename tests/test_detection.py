"""Matching, sampling, suppression, deltas and scores of boxes."""

from __future__ import annotations

import pytest
import torch
from conftest import golden_names, load_golden
from torch.testing import assert_close

from pixelllm.detection import (
    box_areas,
    clip_boxes,
    decode_deltas,
    encode_deltas,
    match,
    rank_captions,
    rescore,
    sample_proposals,
    suppress,
)


def grid_boxes(count: int) -> torch.Tensor:
    """Boxes [1, count, 4] of 8 px in a row, without overlap."""
    start = torch.arange(count)[:, None] * 10.0
    return torch.cat([start, start * 0, start + 8, start * 0 + 8], dim=1)[None]


@pytest.mark.parametrize("name", golden_names("roi_ops"))
def test_golden_deltas_and_clipping(name: str):
    case = load_golden(name)
    boxes, weight = case.tensor("in.boxes"), case.hparams["weights"][0]
    encoded = encode_deltas(boxes, boxes.flip(1), weight)
    assert_close(encoded, case.tensor("out.encoded"), **case.tolerance)
    decoded = decode_deltas(case.tensor("in.deltas"), boxes, weight)
    assert_close(decoded, case.tensor("out.decoded"), **case.tolerance)
    width, height = case.hparams["clip_xy"]
    clipped = clip_boxes(decoded, torch.tensor([[height, width]] * len(boxes)))
    assert_close(clipped, case.tensor("out.clipped"), **case.tolerance)


@pytest.mark.parametrize("name", golden_names("roi_ops"))
def test_golden_suppression(name: str):
    case = load_golden(name)
    boxes, scores = case.tensor("in.nms_boxes")[None], case.tensor("in.nms_scores")[None]
    thresholds = [key.split("_")[1].removesuffix(".idx") for key in case.arrays if ".idx" in key]
    assert thresholds
    for text in thresholds:
        found = suppress(boxes, scores, float(text), case.hparams["nms_max_output"])
        expected = case.tensor(f"out.nms_{text}.scores")
        kept = expected > 0
        assert len(found.scores[0]) == kept.sum()
        assert_close(found.scores[0], expected[kept], **case.tolerance)
        assert_close(
            found.boxes_px[0], case.tensor(f"out.nms_{text}.boxes")[kept], **case.tolerance
        )


@pytest.mark.parametrize("name", golden_names("box_decoder"))
def test_golden_match(name: str):
    case = load_golden(name)
    valid = case.tensor("in.gt_classes") > 0
    proposals, boxes = case.tensor("in.match_proposals"), case.tensor("in.gt_boxes")
    index, is_object = match(proposals, boxes, valid, case.hparams["match_gt_thresh"])
    classes = case.tensor("out.match_class")
    assert torch.equal(is_object, classes > 0)
    assert torch.equal(index[is_object], case.tensor("out.match_idx").long()[is_object])


def test_padded_ground_truth_matches_nothing():
    """Catches padding whose coordinates are not 0, and 0 / 0 between two empty boxes."""
    boxes = torch.tensor([[[0.0, 0, 0, 0], [10, 10, 20, 20]]])
    _, is_object = match(boxes, boxes, torch.tensor([[True, False]]), 0.5)
    assert not is_object.any()


def test_deltas_take_a_proposal_to_its_box():
    boxes = torch.tensor([[3.0, 5, 50, 41]])
    proposals = torch.tensor([[10.0, 1, 30, 60]])
    assert_close(decode_deltas(encode_deltas(boxes, proposals, 20), proposals, 20), boxes)


def test_samples_are_objects_up_to_their_quota_then_background(generator: torch.Generator):
    proposals, is_object = grid_boxes(40), (torch.arange(40) % 2 == 0)[None]
    samples = sample_proposals(proposals, is_object, 12, 0.25, generator)[0]
    number = (samples[:, 0] / 10).long()
    assert (number[:3] % 2 == 0).all() and (number[3:] % 2 == 1).all()
    assert (number[:3].diff() > 0).all() and (number[3:].diff() > 0).all()
    again = sample_proposals(proposals, is_object, 12, 0.25, torch.Generator().manual_seed(0))
    other = sample_proposals(proposals, is_object, 12, 0.25, torch.Generator().manual_seed(1))
    assert torch.equal(samples, again[0]) and not torch.equal(samples, other[0])


def test_surplus_objects_never_pose_as_background(generator: torch.Generator):
    samples = sample_proposals(grid_boxes(6), torch.ones(1, 6).bool(), 6, 0.5, generator)
    assert (box_areas(samples) > 0).tolist() == [[True] * 3 + [False] * 3]


def test_padding_is_sampled_last(generator: torch.Generator):
    proposals = torch.cat([torch.zeros(1, 20, 4), grid_boxes(5)], dim=1)
    samples = sample_proposals(proposals, torch.zeros(1, 25).bool(), 5, 0.25, generator)
    assert torch.equal(samples, grid_boxes(5))


def test_suppression_removes_at_the_threshold_and_pads_with_zeros():
    """Two halves of a box have IoU 1/2 with it; torchvision alone would keep them."""
    first = torch.tensor([[0.0, 0, 10, 10], [0, 0, 5, 10], [20, 0, 30, 10]])
    boxes = torch.stack([first, first + torch.tensor([[0.0], [50], [100]])])
    scores = torch.tensor([[0.9, 0.8, 0.7], [0.9, 0.8, -1.0]])
    found = suppress(boxes, scores, 0.5, 3)
    assert_close(found.scores, torch.tensor([[0.9, 0.7, 0.0], [0.9, 0.8, 0.0]]))
    assert torch.equal(found.boxes_px[0], torch.stack([first[0], first[2], torch.zeros(4)]))


def test_rescoring_is_the_geometric_mean():
    scores = rescore(torch.tensor([0.5, -1.0]), torch.tensor([0.08, 0.5]).log())
    assert_close(scores, torch.tensor([0.2, 0.0]))


def test_captions_of_one_detection_can_outrank_another_detection():
    log_probs = torch.tensor([[[0.1, 0.9], [0.1, 0.6]]]).log()
    ranked = rank_captions(torch.tensor([[0.8, 0.4]]), log_probs, 3)
    assert ranked.detection.tolist() == [[0, 1, 0]] and ranked.beam.tolist() == [[1, 1, 0]]
    assert_close(ranked.scores, torch.tensor([[0.72, 0.24, 0.08]]).sqrt())
