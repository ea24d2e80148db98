from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import (
    PERCEPTION_TOLERANCE,
    load_golden_json,
    load_perception,
    perception_names,
)
from numpy.testing import assert_allclose
from pycocotools import mask as coco_mask
from torch.nn.functional import interpolate

from pixelllm.evaluation.referring import score_referred_boxes, score_referred_masks

GOLDEN_NAMES = {
    "box_Precision@1": "box_precision",
    "seg_box_Precision@1": "mask_box_precision",
    "seg_cIoU": "mask_ciou",
    "seg_gIoU": "mask_giou",
    "seg_AP": "mask_precision",
}


@pytest.fixture(scope="module")
def golden() -> dict:
    return load_golden_json("eval_refcoco.json")


def golden_boxes(golden: dict) -> tuple[dict, dict]:
    """Predicted and true boxes by expression, in [0, 1]."""
    found = {}
    for example in golden["examples"]:
        scale = np.tile(example["size_hw"][::-1], 2)
        for key, box in zip(example["refexp_ids"], example["detection_boxes"], strict=True):
            if key > 0:  # 0 is padding
                found[key] = np.array(box) / scale
    sizes = {image["id"]: image for image in golden["annotations"]["images"]}
    truths = {}
    for entry in golden["annotations"]["annotations"]:
        image, (x, y, w, h) = sizes[entry["image_id"]], entry["bbox"]
        scale = np.tile([image["width"], image["height"]], 2)
        truths[entry["id"]] = np.array([x, y, x + w, y + h]) / scale
    return found, {key: truths[key] for key in found}


def golden_masks(golden: dict) -> tuple[dict, dict]:
    found = {}
    for example in golden["examples"]:
        for key, logits in zip(example["refexp_ids"], example["detection_masks"], strict=True):
            if key > 0:
                logits = torch.tensor(logits)
                share = np.divide(example["size_hw"], example["padded_size_hw"])
                height, width = np.round(share * logits.shape).astype(int)
                valid = logits[None, None, :height, :width]
                resized = interpolate(valid, size=example["orig_size_hw"], mode="bilinear")
                found[key] = resized[0, 0].numpy() > 0
    sizes = {i["id"]: (i["height"], i["width"]) for i in golden["annotations"]["images"]}
    truths = {}
    for entry in golden["annotations"]["annotations"]:
        mask, size = entry["segmentation"], sizes[entry["image_id"]]
        if isinstance(mask, list):
            mask = coco_mask.merge(coco_mask.frPyObjects(mask, *size))
        truths[entry["id"]] = mask
    return found, {key: truths[key] for key in found}


def test_golden_scores_of_boxes_and_masks(golden):
    case = load_golden_json("index.json")["cases"]["eval_refcoco"]
    boxes, truth_boxes = golden_boxes(golden)
    masks, truth_masks = golden_masks(golden)
    for name, expected in golden["expected"].items():
        if isinstance(expected, list):
            continue  # predictions, below
        other = name.partition("threshold_")[2]
        threshold = float(other) if other else case["hparams"]["iou_threshold"]
        scores = score_referred_boxes(boxes, truth_boxes, threshold)
        scores |= score_referred_masks(masks, truth_masks, truth_boxes, threshold)
        ours = {key: scores[GOLDEN_NAMES[key]] for key in expected}
        assert_allclose(list(ours.values()), list(expected.values()), **case["tolerance"])
    areas = golden["expected"]["prediction_mask_area"]
    assert [int(mask.sum()) for mask in masks.values()] == areas


def test_an_overlap_of_exactly_the_threshold_is_not_above_it():
    """In [0, 1] coordinates of a 30-pixel image, 10 / 20 pixels must not come out above a half."""
    for width in range(20, 200):
        truth, half = (0, 0, 20 / width, 0.7), (0, 0, 10 / width, 0.7)
        assert score_referred_boxes({"a": half}, {"a": truth})["box_precision"] == 0.0
    more = score_referred_boxes({"a": (0, 0, 0.51, 1)}, {"a": (0, 0, 1, 1)})
    assert more == {"box_precision": 1.0, "box_iou": 0.51}


def test_predicted_boxes_are_clipped_and_inverted_ones_overlap_nothing():
    truth = {"a": (0.5, 0.5, 1, 1)}
    assert score_referred_boxes({"a": (0.5, 0.5, 1.5, 1.9)}, truth)["box_iou"] == 1.0
    assert score_referred_boxes({"a": (1, 1, 0.5, 0.5)}, truth)["box_iou"] == 0.0


def test_a_worse_box_never_raises_the_precision():
    rng = np.random.default_rng(0)
    truths = {str(i): np.sort(rng.uniform(size=(2, 2)), axis=0).ravel() for i in range(50)}
    scores = []
    for shift in np.linspace(0, 0.5, 20):
        moved = {key: box + [shift, 0, 0, 0] for key, box in truths.items()}
        scores.append(score_referred_boxes(moved, truths)["box_precision"])
    assert scores[0] == 1.0 and scores[-1] < 0.5
    assert scores == sorted(scores, reverse=True)


def rectangle(box_px: tuple[int, int, int, int], size: tuple[int, int] = (10, 20)) -> np.ndarray:
    x0, y0, x1, y1 = box_px
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


BOXES = {"a": (0, 0, 0.5, 1), "b": (0.5, 0, 0.6, 0.2)}
MASKS = {"a": rectangle((0, 0, 10, 10)), "b": rectangle((10, 0, 12, 2))}


def test_large_objects_weigh_more_in_ciou_than_in_giou():
    """Fails if cIoU is the mean of the quotients, or gIoU the quotient of the means."""
    found = {"a": MASKS["a"], "b": rectangle((12, 0, 14, 2))}
    scores = score_referred_masks(found, MASKS, BOXES)
    assert_allclose(scores["mask_ciou"], 100 / 108, rtol=1e-6)
    assert_allclose(scores["mask_giou"], 0.5, rtol=1e-6)
    assert scores["mask_precision"] == scores["mask_box_precision"] == 0.5


def test_masks_in_any_form_in_any_order_score_alike():
    perfect = score_referred_masks(MASKS, MASKS, BOXES)
    assert_allclose(list(perfect.values()), 1.0, atol=1e-5)
    encoded = {key: coco_mask.encode(np.asfortranarray(m, np.uint8)) for key, m in MASKS.items()}
    text = {key: {**m, "counts": m["counts"].decode()} for key, m in reversed(encoded.items())}
    lists = {"a": {"size": [10, 20], "counts": [0, 100, 100]}, "b": encoded["b"]}
    for masks in (encoded, text, lists):
        assert score_referred_masks(masks, MASKS, BOXES) == perfect
    assert isinstance(text["a"]["counts"], str)  # as it came


def test_an_empty_mask_is_a_miss():
    found = {key: np.zeros_like(mask) for key, mask in MASKS.items()}
    assert set(score_referred_masks(found, MASKS, BOXES).values()) == {0.0}


def test_bad_input_is_named():
    box, mask = {"a": (0, 0, 1, 1)}, {"a": np.ones((4, 6), bool)}
    with pytest.raises(ValueError, match="no expressions to score"):
        score_referred_boxes({}, {})
    with pytest.raises(ValueError, match="1 expressions without ground truth: b"):
        score_referred_boxes(box | {"b": (0, 0, 1, 1)}, box)
    with pytest.raises(ValueError, match="1 expressions without a prediction: b"):
        score_referred_masks(mask, mask | {"b": mask["a"]}, box)
    with pytest.raises(ValueError, match=r"a: box \[0.0, 0.0, 40.0, 30.0\] is not in \[0, 1\]"):
        score_referred_boxes({"a": (0, 0, 40, 30)}, box)
    with pytest.raises(ValueError, match="a: a box is NaN"):
        score_referred_boxes({"a": (0, 0, 1, np.nan)}, box)
    with pytest.raises(ValueError, match=r"a: boxes of shape \(1, 3\)"):
        score_referred_boxes({"a": (0, 0, 1)}, box)
    with pytest.raises(ValueError, match=r"a: .* size \(6, 4\); resize it to the \(4, 6\)"):
        score_referred_masks({"a": mask["a"].T}, mask, box)
    with pytest.raises(ValueError, match="a: mask uint8"):
        score_referred_masks({"a": mask["a"].astype(np.uint8)}, mask, box)
    with pytest.raises(ValueError, match="a: mask with keys"):
        score_referred_masks({"a": {"counts": "x"}}, mask, box)
    for counts in ("0", "@@@zz", [5, 3]):  # pycocotools never comes back from these
        with pytest.raises(ValueError, match="a: corrupt run lengths"):
            score_referred_masks({"a": {"size": [4, 6], "counts": counts}}, mask, box)


@pytest.mark.parametrize("name", perception_names("metrics"))
def test_golden_metrics_of_perceptiongpt(name: str):
    """Masks of probability above 0.35; two empty ones agree."""
    case = {key: value.numpy() for key, value in load_perception(name).items()}
    keys = [str(row) for row in range(len(case["in.gt_mask"]))]
    truths = dict(zip(keys, case["in.gt_mask"] > 0.5, strict=True))
    masks = dict(zip(keys, case["in.pred_mask_prob"][:, 0] > 0.35, strict=True))
    boxes = dict(zip(keys, case["in.gt_boxes"], strict=True))
    found = dict(zip(keys, case["in.pred_boxes"], strict=True))

    def masks_of(keys: list[str]) -> dict[str, float]:
        given = ({key: part[key] for key in keys} for part in (masks, truths, boxes))
        return score_referred_masks(*given, empty_iou=1.0)

    ious = [masks_of([key])["mask_giou"] for key in keys]
    assert_allclose(ious, case["out.iou_per_mask"], **PERCEPTION_TOLERANCE)
    whole = masks_of(keys)
    assert_allclose(whole["mask_giou"], case["out.giou"], **PERCEPTION_TOLERANCE)
    assert_allclose(whole["mask_ciou"], case["out.ciou"], **PERCEPTION_TOLERANCE)
    outside = ({key: ~mask for key, mask in part.items()} for part in (masks, truths))
    shares = [score_referred_masks(*outside, boxes)["mask_ciou"], whole["mask_ciou"]]
    assert_allclose(shares, case["out.inter"] / case["out.union"], **PERCEPTION_TOLERANCE)
    ious = [score_referred_boxes({k: found[k]}, {k: boxes[k]})["box_iou"] for k in keys]
    assert_allclose(ious, case["out.box_iou"], **PERCEPTION_TOLERANCE)
    whole = score_referred_boxes(found, boxes)
    assert_allclose(whole["box_iou"], case["out.box_miou"], **PERCEPTION_TOLERANCE)
    assert_allclose(whole["box_precision"], case["out.box_acc"], **PERCEPTION_TOLERANCE)
