from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from conftest import load_golden_json
from numpy.testing import assert_allclose, assert_array_equal

from pixelllm.evaluation.lbm import match, trace_distance, trace_distance_given_caption

ABSENT = [0.0, 0.0, 1.0, 1.0]


def random_boxes(count: int, seed: int = 0) -> np.ndarray:
    corners = np.random.default_rng(seed).uniform(size=(count, 2, 2))
    return np.sort(corners, axis=1).reshape(count, 4)


def windows(case: dict) -> list[tuple[int, float]]:
    return [(int(key[5:]), value) for key, value in case.items() if key.startswith("lbm_k")]


def test_golden_local_matching():
    for case in load_golden_json("lbm/local_matching.json")["cases"]:
        columns, mean = match(case["D"], case["window"])
        expected = np.array(case["T"]) > 0.5
        assert_array_equal(np.eye(case["m"], dtype=bool)[columns], expected)
        assert_allclose([mean, mean * case["p"]], [case["cost_mean"], case["cost_sum"]], atol=1e-5)


def test_golden_trace_given_caption():
    golden = load_golden_json("lbm/trace_given_caption.json")
    for case in golden["cases"]:
        for window, expected in windows(case):
            value = trace_distance_given_caption(case["pred"], case["gt"], window)
            assert_allclose(value, expected, atol=1e-5)
    batch = [golden["cases"][index] for index in golden["batch_of"]["indices"]]
    for window, expected in windows(golden["batch_of"]):
        values = [trace_distance_given_caption(case["pred"], case["gt"], window) for case in batch]
        assert_allclose(np.mean(values), expected, atol=1e-5)


def test_golden_free_length():
    for case in load_golden_json("lbm/free_length.json")["cases"]:
        for window, expected in windows(case):
            assert_allclose(trace_distance(case["pred"], case["gt"], window), expected, atol=1e-5)


@pytest.mark.parametrize("window", [0, 1, 2])
def test_match_is_the_cheapest_of_all_allowed_matchings(window):
    """Fails if the window or the optimum is wrong: compares with trying everything."""
    p, m = 3, 5
    cost = np.random.default_rng(window).uniform(size=(p, m))
    allowed = [
        sum(cost[i, j] for i, j in enumerate(columns)) / p
        for columns in permutations(range(m), p)
        if all((i - window) * m / p <= j < (i + 1 + window) * m / p for i, j in enumerate(columns))
    ]
    assert_allclose(match(cost, window)[1], min(allowed), atol=1e-12)


def test_window_zero_of_equal_lengths_is_the_plain_mean_and_wider_is_never_larger():
    ours, theirs = random_boxes(40, 1), random_boxes(40, 2)
    values = [trace_distance(ours, theirs, window) for window in range(4)]
    assert_allclose(values[0], np.abs(ours - theirs).mean(), atol=1e-12)
    assert values == sorted(values, reverse=True) and values[1] < values[0]


def test_a_short_last_segment_weighs_as_much_as_a_full_one():
    """Fails if segments are weighted by their rows."""
    ours = np.zeros((21, 4)) + [0.0, 0.0, 0.5, 0.5]
    theirs = ours.copy()
    theirs[20] += 0.4
    assert_allclose(trace_distance(ours, theirs, 0), 0.4 / 2, atol=1e-12)


def test_words_without_a_place_leave_the_target_but_not_the_prediction():
    """Fails if NaN or whole-image rows count, or if their predictions are dropped too."""
    boxes = random_boxes(3, 3)
    target = np.stack([boxes[0], ABSENT, [np.nan] * 4])
    assert trace_distance_given_caption(boxes, target) == 0.0
    swapped = boxes[[1, 0, 2]]  # the one placed word may choose the box of another word
    assert trace_distance_given_caption(swapped, target) == 0.0


def test_empty_traces_give_nan():
    boxes = random_boxes(2)
    assert np.isnan(trace_distance(np.zeros((0, 4)), boxes))
    assert np.isnan(trace_distance([], []))
    assert np.isnan(trace_distance_given_caption(boxes, [ABSENT, ABSENT]))


def test_unusable_traces_are_refused():
    boxes = random_boxes(3)
    with pytest.raises(ValueError, match="3 predicted boxes for 2 words"):
        trace_distance_given_caption(boxes, boxes[:2])
    with pytest.raises(ValueError, match="NaN"):
        trace_distance(np.full((3, 4), np.nan), boxes)
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        trace_distance(boxes[:, :2], boxes)
    with pytest.raises(ValueError, match="window -1"):
        trace_distance(boxes, boxes, -1)
    with pytest.raises(ValueError, match="rows <= columns"):
        match(np.zeros((3, 2)), 0)
