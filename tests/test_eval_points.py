from __future__ import annotations

import numpy as np
import pytest
from conftest import load_golden_json
from numpy.testing import assert_allclose

from pixelllm.evaluation.points import mean_trace_l1, trace_l1


def golden_image(example: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The (points, targets, valid) of a golden example, in [0, 1] of its image."""
    height, width = example["size_hw"]
    scale = np.array([width, height])
    valid = np.array(example["text_tokens"]) > 0
    if "token_padding_mask" in example:
        valid = np.array(example["token_padding_mask"]) > 0
    points = np.array(example["prediction_point_coords"]) / scale
    return points, np.array(example["gt_points"]) / scale, valid


def test_golden_trace_l1_of_each_image_and_their_mean():
    golden = load_golden_json("eval_point.json")
    images = [golden_image(example) for example in golden["examples"]]
    for image, example in zip(images, golden["examples"], strict=True):
        assert_allclose(trace_l1(*image), example["expected_error"], rtol=1e-5, atol=1e-6)
    assert_allclose(mean_trace_l1(images), golden["expected"]["point_l1"], rtol=1e-5, atol=1e-6)


def test_the_nearest_target_counts_and_predicted_points_are_averaged():
    """Fails if the distance is taken to the first target, or to the best predicted point."""
    points = [[[0.1, 0.1], [0.9, 0.5]]]
    targets = [[[0.2, 0.1], [0.9, 0.9]]]
    assert_allclose(trace_l1(points, targets, [True]), (0.05 + 0.2) / 2, atol=1e-7)


def test_captions_of_an_image_are_pooled_by_token_and_images_by_image():
    """Fails if captions, rather than their tokens, are averaged inside one image."""
    targets = np.full((2, 3, 1, 2), 0.5)
    points = targets[:, :, 0] + np.array([0.3, 0.0])[:, None, None]
    valid = np.array([[True, False, False], [True, True, True]])
    assert_allclose(trace_l1(points, targets, valid), 0.3 / 4, atol=1e-7)
    first = (points[:1], targets[:1], valid[:1])
    assert_allclose(mean_trace_l1([first, (targets[:, :, 0], targets, valid)]), 0.15, atol=1e-7)


@pytest.mark.parametrize("absent", [np.nan, 0.0])
def test_tokens_without_a_place_do_not_count(absent):
    targets = np.array([[[0.5, 0.5]], [[absent, absent]]])
    points = np.array([[0.6, 0.5], [0.9, 0.9]])
    assert_allclose(trace_l1(points, targets, [True, True]), 0.05, atol=1e-7)
    assert trace_l1(points, targets, [False, True]) == 0.0


def test_unfit_shapes_and_nan_predictions_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        trace_l1(np.zeros((3, 2)), np.ones((4, 1, 2)), np.ones(4, bool))
    with pytest.raises(ValueError, match="NaN"):
        trace_l1(np.full((1, 2), np.nan), np.ones((1, 1, 2)), [True])
    assert np.isnan(mean_trace_l1([]))
