"""Words, traces and tokens: the official numbers, and what the text alignment promises."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import golden_root, load_golden_json

from pixelllm.alignment import (
    rank_pieces,
    read_trace,
    read_utterances,
    sample_trace,
    text_pieces,
    token_points_px,
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
        narrative = {"caption": "a", "timed_caption": [utterance], "traces": case["traces"]}
        assert bool(rank_pieces(narrative)) is case["kept"]
        assert bool(text_pieces(narrative)) is case["kept"]


def _check_rank(narrative, words, atol):
    pieces = rank_pieces(narrative)
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
    narratives = {narrative["image_id"]: narrative for narrative in real_narratives}
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
