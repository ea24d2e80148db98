"""Expressions become boxes, scores and masks, alone or in batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pixelllm.asked_images import roomy_box
from pixelllm.contexts import REGION_CONTEXT
from pixelllm.locating import SURE, Location, locate_boxes, snap_boxes, word_probability
from pixelllm.mask_codes import decode_mask
from pixelllm.models.pixelllm import Text
from pixelllm.pretrained import PixelLLM
from pixelllm.records import Box

SIZES = [(48, 64), (60, 40), (30, 90)]
EXPRESSIONS = [["the red circle on the left"], ["a blue square", "the square", "red"], ["a", "b c"]]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    coarse = (Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)) for _ in SIZES)
    return [image.resize(size[::-1]) for image, size in zip(coarse, SIZES, strict=True)]


def locate(model: PixelLLM, images, expressions, **options) -> list[list[Location]]:
    """Per image, without the rows that fill up."""
    found = model.locate(**model.processor().locating(images, expressions), **options)
    K = max(map(len, expressions))
    return [found[i * K : i * K + len(texts)] for i, texts in enumerate(expressions)]


def assert_close(found: Location, expected: Location) -> None:
    assert found.box == pytest.approx(expected.box, abs=1e-5)
    assert found.score == pytest.approx(expected.score, rel=1e-4)
    assert found.mask == expected.mask


def given_words(model: PixelLLM, context: str, words: str) -> Text:
    """One row of teacher forcing, written out."""
    tokenizer = model.tokenizer
    rows = [
        [*tokenizer(context, add_special_tokens=False).input_ids, tokenizer.eos_token_id],
        [0, *tokenizer(words, add_special_tokens=False).input_ids, tokenizer.eos_token_id],
    ]
    ids = [torch.tensor([row]) for row in rows]
    padding = [torch.zeros_like(row, dtype=torch.bool) for row in ids]
    return Text(ids[0], padding[0], ids[1], padding[1])


def test_a_location_is_the_point_of_the_last_word(tiny_joint_model, pictures):
    """Teacher forcing by hand: the expression as context and words, the box at its last word."""
    model, words = tiny_joint_model, "the red circle"
    inputs = model.processor()(pictures[0])

    def read(box: Box, context: str):
        boxes, text = torch.tensor([[box]]), given_words(model, context, words)
        with torch.no_grad():
            return model(inputs["images"], inputs["sizes"], boxes, text), text

    prediction, _ = read((0, 0, 1, 1), f"where is {words}")
    (x0, y0), (x1, y1) = prediction.points[0, -2].clamp(0, 1).tolist()
    box = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
    prediction, text = read(box, REGION_CONTEXT)
    chances = prediction.logits[0, :-1].softmax(-1)
    own = [chances[t, token].item() for t, token in enumerate(text.token_ids[0, 1:].tolist())]
    ((found,),) = locate(model, pictures[:1], [[words]])
    assert_close(found, Location(box, float(np.prod(own)) ** (1 / len(own))))


def test_images_together_give_what_each_gives_alone(tiny_joint_model, pictures):
    """With different numbers of expressions, so that some rows only fill up."""
    together = locate(tiny_joint_model, pictures, EXPRESSIONS, with_masks=True)
    for image, texts, found in zip(pictures, EXPRESSIONS, together, strict=True):
        for text, location in zip(texts, found, strict=True):
            assert_close(
                location, locate(tiny_joint_model, [image], [[text]], with_masks=True)[0][0]
            )


def test_chunks_of_expressions_give_what_all_give_at_once(tiny_joint_model, pictures):
    """Images interleave within a chunk; locations must go back to their own expression."""
    expected = locate(tiny_joint_model, pictures, EXPRESSIONS, with_masks=True)
    for max_rows in (1, 6):
        found = locate(tiny_joint_model, pictures, EXPRESSIONS, with_masks=True, max_rows=max_rows)
        for ours, theirs in zip(found, expected, strict=True):
            assert len(ours) == len(theirs)
            for one, other in zip(ours, theirs, strict=True):
                assert_close(one, other)


def test_what_is_found_is_captioned_as_its_box_is(tiny_joint_model, pictures):
    """Rows of images with fewer expressions included, in chunks as at once."""
    expressions = [["a car", "the red tree", "it"], ["a ball"]]
    found = locate(tiny_joint_model, pictures[:2], expressions, with_captions=True)
    chunks = locate(tiny_joint_model, pictures[:2], expressions, with_captions=True, max_rows=2)
    for picture, of_image, others in zip(pictures, found, chunks, strict=False):
        for one, other in zip(of_image, others, strict=True):
            inputs = tiny_joint_model.processor()([picture], [[roomy_box(one.box)]])
            (caption,) = tiny_joint_model.generate(**inputs)
            assert one.caption == other.caption == caption.text
    assert locate(tiny_joint_model, pictures[:2], expressions)[0][0].caption is None


def test_masks_have_the_size_of_the_image_and_boxes_lie_inside(tiny_joint_model, pictures):
    found = locate(tiny_joint_model, pictures, EXPRESSIONS, with_masks=True)
    for size, locations in zip(SIZES, found, strict=True):
        for location in locations:
            assert decode_mask(location.mask).shape == size
            x0, y0, x1, y1 = location.box
            assert 0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1
            assert 0 < location.score < 1
            assert location.to_json().keys() == {"box", "score", "mask", "polygons"}
    (first,) = locate(tiny_joint_model, pictures[:1], [["red"]])[0]
    assert first.mask is None and first.to_json().keys() == {"box", "score"}


def test_reversed_corners_outside_the_image_make_a_box_inside(
    tiny_joint_model, pictures, monkeypatch
):
    """Points are not clamped, and nothing keeps the second corner right of the first."""
    model = tiny_joint_model
    inputs = model.processor().locating(pictures[:1], [["red"]])
    corners = torch.tensor([[1.4, 0.2], [0.3, -0.5]])

    def point_head(hidden):
        return corners.expand(*hidden.shape[:2], 2, 2)

    monkeypatch.setattr(model.point_head, "forward", point_head)
    features = model.encode(inputs["images"], inputs["sizes"], {})
    text = Text(*(inputs[name] for name in Text._fields))
    rows = inputs["boxes"], text, inputs["is_place"]
    found = locate_boxes(model, features, inputs["sizes"], *rows)
    torch.testing.assert_close(found.boxes, torch.tensor([[[0.3, 0.0, 1.0, 0.2]]]))


def test_word_probability_leaves_out_padding():
    logits = torch.tensor([[[0.0, 0.0], [0.0, 3.0], [0.0, 0.0]]]).log_softmax(-1)
    ids, padding = torch.tensor([[0, 1, 1]]), torch.tensor([[False, False, True]])
    nothing = torch.empty(1, 0)
    found = word_probability(logits, Text(nothing, nothing, ids, padding))
    torch.testing.assert_close(found, torch.tensor([0.5]))


def test_masks_need_a_mask_head(tiny_model, pictures):
    with pytest.raises(ValueError, match="no mask head; train one of the refseg recipes"):
        locate(tiny_model, pictures[:1], [["red"]], with_masks=True)


@pytest.mark.parametrize(
    ("expressions", "message"),
    [
        ([["red"]], "1 lists of expressions for 3 images"),
        ([["red"], ["red", " \n"], ["red"]], "expression 1 is empty; say what to look for"),
        ([["red"], [], ["red"]], "no expression given"),
        (["red", "blue", "car"], "expected a list of expressions for each image, not 'red'"),
    ],
)
def test_bad_expressions_are_named(tiny_joint_model, pictures, expressions, message):
    with pytest.raises(ValueError, match=message):
        tiny_joint_model.processor().locating(pictures, expressions)


def test_a_box_snaps_to_the_sure_detection_that_fits_best() -> None:
    """Catches unsure detections that win, and images that borrow each other's."""
    boxes = torch.tensor([[[0.1, 0.1, 0.4, 0.4], [0.8, 0.1, 0.9, 0.2]], [[0.1, 0.1, 0.4, 0.4]] * 2])
    detected = torch.tensor(
        [[[0.12, 0.1, 0.38, 0.4], [0.6, 0.6, 0.9, 0.9], [0.1, 0.1, 0.4, 0.41]]] * 2
    )
    scores = torch.tensor([[0.9, 0.8, SURE - 0.01], [0.1, 0.1, 0.1]])
    snapped = snap_boxes(boxes, detected, scores)
    assert torch.equal(snapped[0], detected[0, :2])  # the second by nearness, nothing overlaps it
    assert torch.equal(snapped[1], boxes[1])


def test_snapping_needs_a_detector(tiny_run) -> None:
    model = PixelLLM.from_pretrained(tiny_run.main)
    inputs = model.processor().locating([Image.new("RGB", (64, 48))], [["a car"]])
    with pytest.raises(ValueError, match="this model has no detector"):
        model.locate(**inputs, snap=True)
