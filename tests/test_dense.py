from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import golden_root, load_golden_json
from numpy.testing import assert_allclose
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pixelllm.evaluation import meteor
from pixelllm.evaluation.dense import (
    IOU_THRESHOLDS,
    RECALL_LEVELS,
    Detection,
    Region,
    average_precision,
    group_boxes,
    merge_regions,
    score_dense_captions,
)
from pixelllm.evaluation.results import coco_results


def golden_images(annotations: dict, predictions: list[dict]) -> tuple[dict, dict]:
    """Predictions and truth by image, with boxes in [0, 1]."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in annotations["images"]}
    found, truths = {image: [] for image in sizes}, {image: [] for image in sizes}

    def box(entry: dict) -> tuple[float, ...]:
        x, y, w, h = entry["bbox"]
        return tuple(np.array([x, y, x + w, y + h]) / np.tile(sizes[entry["image_id"]], 2))

    for entry in annotations["annotations"]:
        truths[entry["image_id"]].append(Region(box(entry), entry["caption"]))
    for entry in predictions:
        item = Detection(box(entry), entry["score"], entry["caption"])
        found[entry["image_id"]].append(item)
    return found, truths


def assert_scores(scores: dict[str, float], expected: dict[str, float], tolerance: float) -> None:
    for name, value in expected.items():
        ours = name.replace("mAP_detection_", "ap_").replace("mAP_iou", "ap_iou")
        ours = {"mAP": "map", "mAP_detection": "map_detection"}.get(ours, ours)
        assert_allclose(scores[ours], value, atol=tolerance, err_msg=name)


def assert_groups(truths: dict, sizes: dict, expected: dict[str, list[dict]]) -> None:
    for image, groups in expected.items():
        ours = merge_regions(truths[int(image)])
        assert [g.captions for g in ours] == [g["captions"] for g in groups]
        width, height = sizes[int(image)]
        for group, other in zip(ours, groups, strict=True):
            x, y, w, h = other["bbox"]
            box = group.box * [width, height, width, height]
            assert_allclose(box, [x, y, x + w, y + h], atol=1e-3)


def test_golden_map_with_the_recorded_similarities():
    golden = load_golden_json("eval_densecap.json")
    found, truths = golden_images(golden["annotations"], golden["predictions"])
    sizes = {i["id"]: (i["width"], i["height"]) for i in golden["annotations"]["images"]}
    for expected in golden["expected"].values():
        queries = expected["similarity_queries"]
        known = {(q["candidate"], tuple(q["references"])): q["score"] for q in queries}

        def similarity(captions, references, known=known):
            pairs = zip(captions, map(tuple, references), strict=True)
            return [known[pair] for pair in pairs]

        arguments = expected["arguments"]
        scores = score_dense_captions(
            found,
            truths,
            similarity if arguments.get("eval_meteor", True) else None,
            count_empty=arguments.get("ignore_empty_string", True),
        )
        assert_scores(scores, expected["metrics"], 1e-6)
        assert_groups(truths, sizes, expected.get("merged_gt", {}))
        num_groups = sum(len(merge_regions(regions)) for regions in truths.values())
        assert num_groups == expected["num_gt_after_merging"]


def densecap_files() -> list[dict]:
    paths = sorted(golden_root().glob("densecap_map/*.json"))
    assert paths, "the golden folder has no densecap_map/*.json"
    return [json.loads(path.read_text()) for path in paths]


def test_golden_detection_map_and_merged_ground_truth():
    for golden in densecap_files():
        found, truths = golden_images(golden["ground_truth"], golden["predictions"])
        sizes = {i["id"]: (i["width"], i["height"]) for i in golden["ground_truth"]["images"]}
        assert_scores(
            score_dense_captions(found, truths), golden["results"]["eval_meteor_false"], 1e-6
        )
        assert_groups(truths, sizes, golden["merged_ground_truth"])


@pytest.mark.skipif(meteor.unavailable_reason() is not None, reason="no METEOR tables")
def test_golden_map_with_meteor():
    def similarity(captions, references):
        return meteor.meteor_scores(captions, references)[1]

    for golden in densecap_files():
        found, truths = golden_images(golden["ground_truth"], golden["predictions"])
        for name, count_empty in (("default", True), ("ignore_empty_string_false", False)):
            scores = score_dense_captions(found, truths, similarity, count_empty=count_empty)
            assert_scores(scores, golden["results"][name], 1e-6)


def px(x: float, y: float, w: float, h: float) -> tuple[float, ...]:
    return (x / 200, y / 200, (x + w) / 200, (y + h) / 200)


def is_equal(captions, references):
    return [float(text in texts) for text, texts in zip(captions, references, strict=True)]


def test_the_worked_example_of_the_reference_sheet():
    truth = [
        Region(px(10, 10, 50, 50), "a"),
        Region(px(12, 10, 50, 50), "b"),
        Region(px(100, 100, 40, 40), "c"),
    ]
    boxes = [px(10, 10, 50, 50), px(12, 12, 50, 50), px(100, 100, 40, 25)]
    found = [Detection(box, score) for box, score in zip(boxes, (0.9, 0.8, 0.7), strict=True)]
    first, second = merge_regions(truth)
    assert_allclose(first.box, px(11, 10, 50, 50))
    assert second.captions == ["c"]
    scores = score_dense_captions({1: found}, {1: truth})
    assert_allclose(
        [scores[f"ap_iou{t}"] for t in IOU_THRESHOLDS], [0.836667] * 4 + [0.51], atol=1e-6
    )
    assert_allclose(scores["map_detection"], 0.771333, atol=1e-6)


def random_images(seed: int = 0, images: int = 6) -> tuple[dict, dict]:
    rng = np.random.default_rng(seed)
    truths, found = {}, {}
    for image in range(images):
        corners = rng.uniform(0, 0.6, size=(8, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(0.1, 0.4, size=(8, 2))], axis=1)
        truths[image] = [Region(tuple(box), str(i % 3)) for i, box in enumerate(boxes)]
        moved = boxes + rng.normal(0, 0.03, size=boxes.shape)
        found[image] = [Detection(tuple(box), rng.random(), str(rng.integers(3))) for box in moved]
    return found, truths


def test_perfect_predictions_score_one():
    _, truths = random_images()
    found = {
        image: [
            Detection(tuple(group.box), i + image / 10, group.captions[-1])
            for i, group in enumerate(merge_regions(regions))
        ]
        for image, regions in truths.items()
    }
    scores = score_dense_captions(found, truths, is_equal)
    assert len(scores) == 2 + 5 + 30
    assert set(scores.values()) == {1.0}


def test_the_order_of_images_and_of_detections_does_not_matter():
    found, truths = random_images()
    scores = score_dense_captions(found, truths, is_equal)
    assert 0 < scores["map"] < scores["map_detection"] < 1
    shuffled = {image: items[::-1] for image, items in reversed(found.items())}
    assert score_dense_captions(shuffled, truths, is_equal) == scores


def test_there_is_no_second_choice():
    """DenseCap, unlike COCO: the second detection does not fall back to the box beside it."""
    left, right = (0, 0, 0.5, 1), (0.3, 0, 0.8, 1)
    truth = {1: [Region(left, "a"), Region(right, "b")]}
    both_left = {1: [Detection(left, 0.9), Detection((0.1, 0, 0.6, 1), 0.8)]}
    assert score_dense_captions(both_left, truth)["ap_iou0.3"] == pytest.approx(0.51)
    # A poor first one takes the box all the same.
    poor = {1: [Detection((0, 0, 0.1, 1), 0.9), Detection(left, 0.8)]}
    assert score_dense_captions(poor, truth)["map_detection"] == 0.0


def test_detections_in_an_image_without_ground_truth_are_false_alarms():
    box = (0, 0, 0.5, 0.5)
    found = {1: [Detection(box, 0.5)], 2: [Detection(box, 0.9)]}
    scores = score_dense_captions(found, {1: [Region(box, "a")], 2: []})
    assert scores["map_detection"] == 0.5


def test_an_iou_at_its_threshold_is_a_hit_but_a_similarity_must_be_above():
    half = {1: [Detection((0, 0, 0.5, 1), 1)]}
    scores = score_dense_captions(half, {1: [Region((0, 0, 1, 1), "a")]})
    assert (scores["ap_iou0.5"], scores["ap_iou0.6"]) == (1.0, 0.0)
    found, truth = {1: [Detection((0, 0, 1, 1), 1, "x")]}, {1: [Region((0, 0, 1, 1), "a")]}
    scores = score_dense_captions(found, truth, lambda captions, references: [0.1])
    assert scores["ap_iou0.5_meteor0.05"] == 1.0
    assert scores["ap_iou0.5_meteor0.10"] == 0.0
    assert scores["map"] == pytest.approx(2 / 6)
    zero = score_dense_captions(found, truth, lambda captions, references: [0.0])
    assert zero["map"] == 0.0 and zero["map_detection"] == 1.0


def test_a_group_with_an_empty_caption_takes_any_words_or_is_not_to_be_found():
    found = {1: [Detection((0, 0, 1, 1), 1, "x"), Detection((0, 0, 0.2, 0.2), 0.5, "b")]}
    truth = {1: [Region((0, 0, 1, 1), "a"), Region((0, 0, 0.99, 1), ""),
                 Region((0, 0, 0.2, 0.2), "b")]}  # fmt: skip
    assert score_dense_captions(found, truth, is_equal)["map"] == 1.0
    strict = score_dense_captions(found, truth, is_equal, count_empty=False)
    assert strict["map"] == 0.5  # the first is a false alarm, the second the only one to be found


def test_only_detections_that_could_be_hits_are_compared():
    asked = []

    def similarity(captions, references):
        asked.extend(zip(captions, references, strict=True))
        return [1.0] * len(captions)

    box = (0, 0, 0.5, 0.5)
    found = {1: [Detection(box, 0.9, "x"), Detection(box, 0.8, "again"),
                 Detection((0.9, 0.9, 1, 1), 0.7, "nowhere")]}  # fmt: skip
    score_dense_captions(found, {1: [Region(box, "a")]}, similarity)
    assert asked == [("x", ["a"])]


def test_groups_cover_every_box_once_and_an_exact_overlap_of_70_percent_counts():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(size=(60, 2, 2)), axis=1).reshape(60, 4)
    members = np.concatenate(group_boxes(corners))
    assert sorted(members) == list(range(60))
    for width in range(10, 200):  # 7 of 10 pixels, in an image of any width
        boxes = np.array([[0, 0, 10, 5], [0, 0, 7, 5]]) / [width, 7, width, 7]
        assert len(group_boxes(boxes)) == 1
    assert [list(g) for g in group_boxes(np.zeros((2, 4)))] == [[0], [1]]
    assert group_boxes([]) == []


def test_recall_levels_are_exact():
    """7 of 10 reach the level 0.70 although 7 / 10 is below 0.7 in single precision."""
    hits = [True] * 7 + [False] * 3 + [True] * 3
    assert_allclose(average_precision(hits, 10), (71 + 29 * 10 / 13) / 100)
    assert average_precision([], 3) == 0.0
    assert average_precision([True], 100) == 0.02  # levels 0.00 and 0.01


def test_coco_evaluation_agrees_where_the_protocols_do():
    """Boxes that do not overlap and no lower-ranked doubles; COCO's levels set to DenseCap's."""
    rng = np.random.default_rng(0)
    corners = np.stack(np.meshgrid(np.arange(10), np.arange(10)), axis=-1).reshape(-1, 2)[:97] / 10
    boxes = np.concatenate([corners, corners + 0.08], axis=1)
    truths = {1: [Region(tuple(box), "") for box in boxes[:50]],
              2: [Region(tuple(box), "") for box in boxes[50:]]}  # fmt: skip
    found = {}
    for image, regions in truths.items():
        moved = [np.array(box) + rng.uniform(-0.012, 0.012, 4) for box, _ in regions]
        missed = [tuple(box) for box in boxes[-3:] + 0.1 * (image == 2)]
        found[image] = [Detection(tuple(box), rng.random()) for box in [*moved, *missed]]
    sizes = {1: (300, 400), 2: (500, 333)}
    dataset = COCO()
    entries = coco_results({i: [Detection(b, 1.0) for b, _ in r] for i, r in truths.items()}, sizes)
    dataset.dataset = {
        "images": [{"id": image, "height": h, "width": w} for image, (h, w) in sizes.items()],
        "categories": [{"id": 1}],
        "annotations": [
            {**entry, "id": i, "area": np.prod(entry["bbox"][2:]), "iscrowd": 0}
            for i, entry in enumerate(entries, start=1)
        ],
    }
    assert len(entries) == 97  # prime: no recall falls on a level, where rounding would decide
    dataset.createIndex()
    results = json.loads(json.dumps(coco_results(found, sizes)))
    evaluation = COCOeval(dataset, dataset.loadRes(results), "bbox")
    evaluation.params.iouThrs = np.array(IOU_THRESHOLDS)
    evaluation.params.recThrs = np.arange(RECALL_LEVELS) / RECALL_LEVELS
    evaluation.params.maxDets = [1000]
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.evaluate()
    evaluation.accumulate()
    theirs = evaluation.eval["precision"][:, :, 0, 0, 0].mean(axis=1)
    scores = score_dense_captions(found, truths)
    ours = [scores[f"ap_iou{threshold}"] for threshold in IOU_THRESHOLDS]
    assert_allclose(ours, theirs, atol=1e-6)
    assert 0.2 < ours[-1] < ours[0] < 1


def test_results_carry_what_is_known():
    mask = {"size": [100, 200], "counts": "0"}
    found = {7: [((0.1, 0.2, 0.6, 0.7), 0.5), Detection((0, 0, 1, 1), 1, "", mask)]}
    first, second = coco_results(found, {7: (100, 200)}, category_id=0)
    assert first.pop("bbox") == pytest.approx([20, 20, 100, 50])
    assert first == {"image_id": 7, "category_id": 0, "score": 0.5}
    assert second["caption"] == "" and second["segmentation"] == mask
    with pytest.raises(ValueError, match="image 7 has predictions but no size"):
        coco_results(found, {8: (1, 1)})


def test_bad_input_is_named():
    found, truth = {1: [Detection((0, 0, 1, 1), 1, "x")]}, {1: [Region((0, 0, 1, 1), "a")]}
    with pytest.raises(ValueError, match="no images to score"):
        score_dense_captions({}, {})
    with pytest.raises(ValueError, match="1 images without a prediction: 2"):
        score_dense_captions(found, truth | {2: []})
    with pytest.raises(ValueError, match="1 images without ground truth: 2"):
        score_dense_captions(found | {2: []}, truth)
    with pytest.raises(ValueError, match="no regions in the ground truth of 1 images"):
        score_dense_captions(found, {1: []})
    with pytest.raises(ValueError, match="predictions of 1: a score is NaN"):
        score_dense_captions({1: [Detection((0, 0, 1, 1), np.nan)]}, truth)
    with pytest.raises(ValueError, match=r"truth of 1: box .* is not in \[0, 1\]"):
        score_dense_captions(found, {1: [Region((0, 0, 100, 50), "a")]})
    with pytest.raises(ValueError, match="a detection has no caption"):
        score_dense_captions({1: [Detection((0, 0, 1, 1), 1)]}, truth, is_equal)
