"""The detector against the official numbers, and what it learns by itself."""

from __future__ import annotations

import pytest
import torch
from conftest import GoldenCase, golden_names, load_golden
from flax_detector import detector
from torch.testing import assert_close
from torchvision.ops import box_iou

from pixelllm.detection import suppress, take_rows
from pixelllm.models.centernet import CenterNetHead, SimplePyramid
from pixelllm.models.detector import Detector
from pixelllm.models.roi_heads import RoiHeads

FRAME = 160
BOXES = torch.tensor([[[10.0, 20, 60, 50], [70, 60, 150, 150], [100, 5, 130, 45]]])
SIZES = torch.tensor([[FRAME, FRAME]])


def build(case: GoldenCase) -> tuple[Detector, torch.Tensor]:
    """The case's detector and features; its frame is that of its nominal strides."""
    features = case.tensor("in.image_embeddings").permute(0, 3, 1, 2)
    frame = features.shape[-1] * case.hparams["strides"][1]
    return detector(case.weights(), case.hparams, frame), features


@pytest.mark.parametrize("name", golden_names("box_decoder"))
@torch.no_grad()
def test_golden_first_stage(name: str):
    """Catches a wrong pyramid, tower or decoding, and suppression after clipping."""
    case = load_golden(name)
    model, features = build(case)
    levels, _, cells, heat = model.scan(features)
    numbers = range(len(levels))
    expected = torch.cat([case.tensor(f"out.heatmap_l{i}").flatten(1) for i in numbers], dim=1)
    assert_close(heat.logits, expected, **case.tolerance)
    expected = torch.cat([case.tensor(f"out.box_reg_l{i}").flatten(1, 2) for i in numbers], dim=1)
    assert_close(heat.ltrb, expected, **case.tolerance)
    everywhere = torch.tensor([[10**6] * 2] * len(features))
    for split, limits in (("train", model.train_limits), ("test", model.test_limits)):
        scores, cell = heat.logits.sigmoid().topk(limits[0])
        assert_close(scores, case.tensor(f"out.peaks_{split}.scores"), **case.tolerance)
        peaks = take_rows(cells.boxes(heat.ltrb), cell)
        assert_close(peaks, case.tensor(f"out.peaks_{split}.boxes"), **case.tolerance)
        found = suppress(peaks, scores, model.proposal_iou, limits[1])
        expected = case.tensor(f"out.proposals_{split}.scores")
        kept = expected > 0
        assert_close(found.scores[found.scores > 0], expected[kept], **case.tolerance)
        expected = case.tensor(f"out.proposals_{split}.boxes")[kept]
        assert_close(found.boxes_px[found.scores > 0], expected, **case.tolerance)
        clipped = model.propose(heat, cells, everywhere, limits).boxes_px
        assert_close(clipped, found.boxes_px.clamp(min=0))


@pytest.mark.parametrize("name", golden_names("box_decoder"))
@torch.no_grad()
def test_golden_detections(name: str):
    case = load_golden(name)
    model, features = build(case)
    sizes = case.tensor("in.image_shape").long()
    levels, strides, cells, heat = model.scan(features)
    proposals = model.propose(heat, cells, sizes, model.test_limits).boxes_px
    last = model.roi_heads(levels, strides, proposals, sizes)[-1]
    for ours, key in ((last.logits, "class"), (last.deltas, "box")):
        assert_close(ours, case.tensor(f"out.roi_{key}_outputs_last_stage"), **case.tolerance)
    found = model.detect(features, sizes, case.hparams["roi_post_nms_num_detections"])
    expected = case.tensor("out.detection_scores").clamp(min=0)
    assert_close(found.scores, expected, **case.tolerance)
    boxes = case.tensor("out.detection_boxes")[expected > 0]
    assert_close(found.boxes_px[expected > 0], boxes, **case.tolerance)


@pytest.mark.parametrize("name", golden_names("box_decoder"))
def test_golden_detector_losses(name: str):
    case = load_golden(name)
    model, features = build(case)
    boxes, valid = case.tensor("in.gt_boxes"), case.tensor("in.gt_classes") > 0
    output = model(features, case.tensor("in.image_shape"), boxes, valid)
    terms = {"total": "det", "heatmap_pos": "pos", "heatmap_neg": "neg", "giou": "reg"}
    for ours, theirs in terms.items():
        expected = case.tensor(f"out.train.{theirs}_loss")
        assert_close(getattr(output.losses, ours), expected, **case.tolerance)
    stages = range(len(case.hparams["roi_matching_threshold"]))
    for ours in ("roi_cls", "roi_reg"):
        expected = torch.stack([case.tensor(f"out.train.stage{k}_{ours}_loss") for k in stages])
        assert_close(getattr(output.losses, ours), expected.mean(), **case.tolerance)
    assert_close(output.proposals_px, case.tensor("out.train.last_proposals"), **case.tolerance)


def small_detector() -> Detector:
    torch.manual_seed(0)
    return Detector(
        SimplePyramid(32, 32, 32),
        CenterNetHead(32, 32, num_layers=1),
        RoiHeads(32, (64,)),
        FRAME,
        train_limits=(200, 50),
        test_limits=(200, 50),
        num_samples=32,
    )


def test_by_default_the_cells_tile_the_frame():
    _, strides, cells, _ = small_detector().scan(torch.randn(1, 32, 10, 10))
    assert_close(torch.tensor(strides), torch.tensor([8, 16, 32, FRAME / 3, 80]))
    assert_close(cells.strides.square().sum(), torch.tensor(5.0 * FRAME**2))
    assert cells.centers_px.min() == 4 and cells.centers_px.max() == FRAME - 4


def test_three_boxes_on_a_fixed_map_are_learned_and_found(generator: torch.Generator):
    """Catches targets, crops or deltas that disagree between training and detection."""
    model, features = small_detector(), torch.randn(1, 32, 10, 10, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(30):
        losses = model(features, SIZES, BOXES, torch.ones(1, 3).bool(), generator).losses
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    found = model.detect(features, SIZES, max_detections=6)
    assert box_iou(found.boxes_px[0, :3], BOXES[0]).amax(0).min() > 0.7
    assert (found.scores[0, :3] > 0.5).all() and (found.scores[0].diff() <= 0).all()
    assert found.boxes_px.shape == (1, 6, 4)


def test_an_image_without_objects_trains_the_background():
    model = small_detector()
    features = torch.randn(2, 32, 10, 10)
    boxes, valid = BOXES.expand(2, -1, -1), torch.tensor([[True] * 3, [False] * 3])
    output = model(features, SIZES.expand(2, -1), boxes, valid)
    assert output.is_object[0].any() and not output.is_object[1].any()
    empty = model(features[1:], SIZES, BOXES, valid[1:])
    empty.losses.total.backward()
    assert empty.losses.heatmap_neg > 0 and empty.losses.giou == 0 and empty.losses.roi_reg == 0
    assert torch.isfinite(empty.losses.total)


def test_sampled_objects_come_first_with_their_ground_truth(generator: torch.Generator):
    """The ground truth is always among them, whatever the first stage proposes; its padding not."""
    output = small_detector()(
        torch.randn(1, 32, 10, 10), SIZES, BOXES, torch.tensor([[True, False, True]]), generator
    )
    objects = output.is_object[0].sum()
    assert output.is_object[0, :objects].all() and objects >= 2
    truth = BOXES[0, output.object_index[0, :objects]]
    assert box_iou(output.proposals_px[0, :objects], truth).diagonal().min() >= 0.6
    assert set(output.object_index[0, :objects].tolist()) == {0, 2}
    assert not (output.proposals_px == BOXES[0, 1]).all(-1).any()
    assert not output.proposals_px.requires_grad


def test_every_parameter_learns_and_the_features_too():
    model, features = small_detector(), torch.randn(1, 32, 10, 10, requires_grad=True)
    # A box of each size, for the two smallest maps have no part in the others' losses.
    boxes = torch.cat([BOXES, torch.tensor([[[5.0, 5, 155, 155]]])], dim=1)
    model(features, SIZES, boxes, torch.ones(1, 4).bool()).losses.total.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still and features.grad.any()


def test_proposals_and_detections_stay_inside_the_image():
    model, features = small_detector().eval(), torch.randn(1, 32, 10, 10)
    model.min_score = 0.0
    sizes = torch.tensor([[90, 130]])
    boxes = model.detect(features, sizes).boxes_px
    output = model(features, sizes, BOXES.clamp(max=90), torch.ones(1, 3).bool())
    for found in (boxes, output.proposals_px):
        assert found.amin() >= 0 and found[..., 2].max() <= 130 and found[..., 3].max() <= 90


def test_what_scores_too_low_is_padding():
    model = small_detector()
    model.min_score = 1.0
    boxes, scores = model.detect(torch.randn(1, 32, 10, 10), SIZES, max_detections=4)
    assert boxes.shape == (1, 4, 4) and not boxes.any() and not scores.any()


def test_the_default_sizes_are_the_release_s():
    with torch.device("meta"):
        parts = SimplePyramid(1280), CenterNetHead(), RoiHeads()
        model = Detector(*parts, frame=384)
    assert sum(parameter.numel() for parameter in model.parameters()) == 21_948_560


@pytest.mark.parametrize("num_top_blocks", [0, 1, 2])
def test_the_pyramid_has_as_many_levels_as_it_says(num_top_blocks: int):
    pyramid = SimplePyramid(8, 16, 8, num_top_blocks)
    levels = pyramid(torch.randn(1, 8, 27, 27))
    assert [level.shape[-1] for level in levels] == [54, 27, 13, 7, 4][: pyramid.num_levels]
    assert len(levels) == 3 + num_top_blocks
