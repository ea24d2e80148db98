"""Words, traces and tokens: the official numbers, and what the text alignment promises."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import golden_root, load_golden_json

from pixelllm.alignment import (
    assign_tokens,
    average_trace,
    match_utterances,
    rank_pieces,
    read_trace,
    read_utterances,
    sample_trace,
    text_pieces,
    token_boxes,
    token_centers,
    token_points_px,
    words_of,
)
from pixelllm.records import Piece


def test_golden_trace_alignment():
    for case in load_golden_json("trace_alignment.json")["records"]:
        trace, (_, times) = read_trace(case["record"]), read_utterances(case["record"])
        for num_samples, expected in case["expected"].items():
            places = sample_trace(trace, times, int(num_samples))
            centers = [[word["integral_x"], word["integral_y"]] for word in expected]
            boxes = [[w["min_x"], w["min_y"], w["max_x"], w["max_y"]] for w in expected]
            np.testing.assert_allclose(places.centers, centers, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(places.boxes, boxes, rtol=1e-9, atol=1e-9)


def test_golden_trace_alignment_drops_records_with_one_point():
    for case in load_golden_json("trace_alignment.json")["validity"]:
        utterance = {"utterance": "a", "start_time": 0.0, "end_time": 1.0}
        story = {"caption": "a", "timed_caption": [utterance], "traces": case["traces"]}
        assert bool(rank_pieces(story)) is case["kept"]
        assert bool(text_pieces(story)) is case["kept"]


def _check_rank(story, words, atol):
    pieces = rank_pieces(story)
    words = [word for word in words if word["utterance"].strip()]
    assert len(pieces) == len(words)
    np.testing.assert_allclose(
        [p.center for p in pieces], [w["center"] for w in words], atol=atol, rtol=0
    )
    np.testing.assert_allclose(
        [p.box for p in pieces], [w["box_xyxy"] for w in words], atol=atol, rtol=0
    )


def test_golden_ln_edge_cases():
    lines = (golden_root() / "ln_edge_cases/records.jsonl").read_text().splitlines()
    expected = load_golden_json("ln_edge_cases/expected.json")
    assert len(lines) == len(expected)
    for line, case in zip(lines, expected, strict=True):
        if case["words"] is None:
            assert rank_pieces(json.loads(line)) == text_pieces(json.loads(line)) == ()
        else:
            _check_rank(json.loads(line), case["words"], 1e-5)


def test_golden_trace_alignment_vidln(real_narratives):
    golden = load_golden_json("trace_alignment_vidln/vidln_ovis.json")
    narratives = {story["image_id"]: story for story in real_narratives}
    for record in golden["records"]:
        _check_rank(narratives[record["image_id"]], record["words"], 1e-5)


def test_golden_token_alignment():
    for case in load_golden_json("token_alignment.json")["cases"]:
        size = (case["image_height"], case["image_width"])
        special = {case["pad_token"], case["bos_token"], case["eos_token"]}
        for caption, expected in zip(case["captions"], case["expected_points"], strict=True):
            pieces = [
                Piece(-1, -1, tuple(center), tuple(box))
                for text, center, box in zip(
                    caption["utterances"], caption["center"], caption["bbox"], strict=True
                )
                if text.strip()
            ]
            offsets = [(0, 0 if token in special else 1) for token in caption["text_tokens"]]
            points = token_points_px(pieces, offsets, size, case["box_points_per_side"])
            expected = np.array(expected).reshape(points.shape)
            np.testing.assert_array_equal(points, expected, err_msg=case["name"])


@pytest.fixture
def real_narratives():
    root = Path(
        os.environ.get("PIXELLLM_REAL_DATA", Path(__file__).parents[2] / "shared/data/real")
    )
    file = root / "vidln/ln_schema.jsonl"
    if not file.exists():
        pytest.skip(f"no real narratives at {file}; set PIXELLLM_REAL_DATA to their folder")
    return [json.loads(line) for line in file.read_text().splitlines()]


def narrative(words, traces, caption=None):
    """`words`: (text, start, end); `traces`: segments of (x, y, t)."""
    return {
        "caption": " ".join(text for text, _, _ in words) if caption is None else caption,
        "timed_caption": [
            {"utterance": text, "start_time": start, "end_time": end} for text, start, end in words
        ],
        "traces": [[{"x": x, "y": y, "t": t} for x, y, t in segment] for segment in traces],
    }


def piece_of(*args, **kwargs):
    (piece,) = text_pieces(narrative(*args, **kwargs))
    return piece


STRAIGHT = [(0.2, 0.5, 0.0), (0.6, 0.5, 4.0)]  # x = 0.2 + 0.1 t


def test_centre_is_the_exact_time_average_and_box_the_extent():
    corner = [[(0.0, 0.0, 0.0), (1.0, 0.0, 1.0), (1.0, 1.0, 3.0)]]
    piece = piece_of([("word", 0.5, 2.0)], corner)
    # x: mean of 0.75 over 0.5 s and 1 over 1 s; y: 0 over 0.5 s, mean 0.25 over 1 s
    np.testing.assert_allclose(piece.center, [(0.375 + 1) / 1.5, 0.25 / 1.5])
    np.testing.assert_allclose(piece.box, [0.5, 0.0, 1.0, 0.5])


def test_centre_equals_a_fine_sampling_of_random_traces():
    rng = np.random.default_rng(0)
    times = np.sort(rng.uniform(0, 20, 200))
    trace = [[(*rng.random(2), t) for t in times]]
    spans = np.sort(rng.uniform(times[0], times[-1], (50, 2)), axis=1)
    story = narrative([("word", a, b) for a, b in spans], trace)
    exact = average_trace(read_trace(story), spans)
    fine = sample_trace(read_trace(story), spans, 20001)
    np.testing.assert_allclose(exact.centers, fine.centers, atol=1e-5)
    assert (exact.boxes[:, :2] <= fine.boxes[:, :2] + 1e-12).all()
    np.testing.assert_allclose(exact.boxes, fine.boxes, atol=2e-2)  # samples miss the corners


def test_words_beyond_the_trace_are_never_extrapolated():
    before, across, after, far = text_pieces(
        narrative(
            [("a", -0.9, -0.1), ("b", -1.0, 1.0), ("c", 4.5, 4.8), ("d", 5.1, 5.5)], [STRAIGHT]
        )
    )
    np.testing.assert_allclose(before.center, [0.2, 0.5])
    np.testing.assert_allclose(across.center, [0.25, 0.5])  # the second on the trace only
    np.testing.assert_allclose(after.box, [0.6, 0.5, 0.6, 0.5])
    assert far.center is None and far.box is None and far.start >= 0


def test_a_pause_within_a_segment_is_part_of_the_trace():
    rest = [[(0.2, 0.2, 0.0), (0.4, 0.2, 1.0), (0.4, 0.2, 9.0), (0.8, 0.2, 10.0)]]
    np.testing.assert_allclose(piece_of([("word", 4, 5)], rest).center, [0.4, 0.2])


def test_a_break_between_segments_counts_for_nothing():
    segments = [[(0.1, 0.1, 0.0), (0.1, 0.1, 2.0)], [(0.9, 0.9, 8.0), (0.9, 0.9, 10.0)]]
    words = [("tail", 1.5, 3.0), ("near", 2.2, 2.9), ("lost", 4.0, 6.0), ("head", 6.0, 7.5)]
    tail, near, lost, head = text_pieces(narrative(words, segments))
    np.testing.assert_allclose(tail.center, [0.1, 0.1])
    np.testing.assert_allclose(near.center, [0.1, 0.1])
    assert lost.center is None
    np.testing.assert_allclose(head.center, [0.9, 0.9])
    both = piece_of([("all", 0.0, 10.0)], segments)
    np.testing.assert_allclose(both.center, [0.5, 0.5])
    touching = piece_of([("gap", 2.0, 8.0)], segments)
    np.testing.assert_allclose(touching.box, [0.1, 0.1, 0.9, 0.9])


def test_places_stay_in_the_image():
    outside = [[(-0.2, 1.3, 0.0), (1.4, -0.3, 2.0)]]
    piece = piece_of([("word", 0, 2)], outside)
    assert piece.box == (0, 0, 1, 1)
    assert piece_of([("word", 0, 0)], outside).center == (0, 1)


def test_moments_and_reversed_spans_have_a_place():
    words = [("moment", 1.0, 1.0), ("reversed", 3.0, 2.0)]
    moment, reversed_ = text_pieces(narrative(words, [STRAIGHT]))
    np.testing.assert_allclose(moment.center, [0.3, 0.5])
    np.testing.assert_allclose(reversed_.box, [0.4, 0.5, 0.5, 0.5])


def test_segments_need_no_order():
    words = [("one", 0.3, 1.7), ("two", 2.5, 3.5)]
    forward = [STRAIGHT, [(0.6, 0.5, 4.0), (0.6, 0.9, 5.0)]]
    assert text_pieces(narrative(words, forward)) == text_pieces(narrative(words, forward[::-1]))


def test_overlapping_segments_leave_no_break():
    segments = [[(0.0, 0.0, 0.0), (1.0, 0.0, 8.0)], [(0.5, 0.0, 4.0)]]
    np.testing.assert_allclose(piece_of([("word", 2, 2)], segments).center, [0.25, 0.0])


def test_text_and_rank_agree_on_fine_traces_within_range(real_narratives):
    for story in real_narratives:
        trace, (_, times) = read_trace(story), read_utterances(story)
        inside = (times[:, 0] > trace.times[0]) & (times[:, 1] < trace.times[-1])
        exact = average_trace(trace._replace(breaks=trace.breaks & False), times[inside])
        sampled = sample_trace(trace, times[inside])
        np.testing.assert_allclose(exact.centers, sampled.centers, atol=0.02)


def texts(caption, utterances):
    return [s and caption[slice(*s)] for s in match_utterances(caption, utterances)]


def test_utterances_meet_the_caption_by_characters():
    assert texts("In this  image, a man.", [" in", "this image", "A", "man"]) == [
        "In",
        "this  image,",
        "a",
        "man.",
    ]
    assert texts('He said "no". A red-white T-shirt', ["he said no", "a red", "white tshirt"]) == [
        'He said "no".',
        "A red-",
        "white T-shirt",
    ]


def test_words_the_caption_lacks_have_no_span():
    caption = "In this image we can see two dogs and a road cone."
    said = ["in", "this", "um", "image", "we", "can", "see", "too", "dog", "a", "roadcone", "."]
    assert texts(caption, said) == [
        "In",
        "this",
        None,
        "image",
        "we",
        "can",
        "see",
        "two",
        "dogs",
        "a",
        "road cone.",
        None,
    ]


def test_repeated_words_are_taken_in_order():
    caption = "a cat, a dog and a cat"
    assert match_utterances(caption, ["a", "cat", "a", "dog", "a", "cat"]) == [
        (0, 1), (2, 6), (7, 8), (9, 12), (17, 18), (19, 22),
    ]  # fmt: skip


def test_every_span_of_every_real_word_is_that_word(real_narratives):
    for story in real_narratives:
        said = [entry["utterance"] for entry in story["timed_caption"]]
        assert texts(story["caption"], said) == said


def test_tokens_take_the_piece_that_holds_them_and_groups_share_it():
    words = [("In this", 0, 1), ("image", 1, 2), ("far", 9, 10)]
    pieces = text_pieces(narrative(words, [STRAIGHT], "In this image, far"))
    offsets = [(0, 0), (0, 2), (2, 7), (8, 10), (10, 13), (13, 14), (15, 18), (-1, -1)]
    assert assign_tokens(pieces, offsets).tolist() == [-1, 0, 0, 1, 1, 1, -1, -1]
    centers, boxes = token_centers(pieces, offsets), token_boxes(pieces, offsets)
    np.testing.assert_allclose(centers[1], [0.25, 0.5], atol=1e-6)
    np.testing.assert_allclose(boxes[3], [0.3, 0.5, 0.4, 0.5], atol=1e-6)
    for rows in (centers, boxes):
        assert np.isnan(rows[[0, 6, 7]]).all() and not np.isnan(rows[1:6]).any()


def test_no_piece_gives_no_token_a_place():
    assert np.isnan(token_boxes((), [(0, 2), (2, 4)])).all()
    assert token_boxes((), []).shape == (0, 4)


def test_rank_leads_the_first_of_four_words_to_the_second_piece():
    pieces = [Piece(-1, -1, (x, 0.5), (x, 0.5, x, 0.5)) for x in (0.1, 0.2, 0.3, 0.4)]
    assert assign_tokens(pieces, [(0, 0), (0, 1), (1, 2), (2, 3), (3, 4)]).tolist() == [
        -1, 1, 1, 2, 3,
    ]  # fmt: skip


def test_words_of_finds_words_between_blanks():
    assert words_of(" a  dog.\n") == [(1, 2), (4, 8)]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("traces", [[{"x": 0.1, "t": 0.0}]], "traces.*'y'"),
        ("traces", [[{"x": 0.1, "y": float("nan"), "t": 0.0}]], "not a finite"),
        ("traces", None, "traces"),
        ("timed_caption", [{"utterance": "a", "start_time": 0}], "timed_caption.*'end_time'"),
        ("timed_caption", [{"utterance": 3, "start_time": 0, "end_time": 1}], "not a string"),
        ("timed_caption", [{"utterance": "a", "start_time": None, "end_time": 1}], "not a finite"),
        ("timed_caption", [{"utterance": "a", "start_time": "x", "end_time": 1}], "timed_caption"),
    ],
)
@pytest.mark.parametrize("align", [text_pieces, rank_pieces])
def test_bad_fields_are_named(align, field, value, message):
    story = {**narrative([("a", 0, 1)], [STRAIGHT]), field: value}
    with pytest.raises(ValueError, match=message):
        align(story)
