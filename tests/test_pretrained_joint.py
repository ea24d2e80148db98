"""The model of all tasks: it describes images, grows out of a smaller one and comes back whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_DETECTOR, TINY_MASKS, make_tiny_joint_config
from PIL import Image

from pixelllm.config import StartConfig
from pixelllm.generation import CaptionedBox
from pixelllm.pretrained import PixelLLM
from pixelllm.processor import Processor
from pixelllm.training.captioning import build_model, start_from_sam, with_mask_decoder

SIZES = [(48, 64), (60, 40), (30, 90)]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    coarse = (Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)) for _ in SIZES)
    return [image.resize(size[::-1]) for image, size in zip(coarse, SIZES, strict=True)]


def describe(model: PixelLLM, images: list[Image.Image], **options) -> list[list[CaptionedBox]]:
    inputs = model.processor()(images)
    return model.describe(inputs["images"], inputs["sizes"], max_new_tokens=8, **options)


@pytest.fixture
def eager(tiny_joint_model, monkeypatch) -> PixelLLM:
    """After a few steps it finds one object an image; let it keep what it is unsure of."""
    monkeypatch.setattr(tiny_joint_model.detector, "min_score", 1e-4)
    monkeypatch.setattr(tiny_joint_model.detector, "detection_iou", 0.95)
    return tiny_joint_model


def assert_same_objects(found: list[CaptionedBox], expected: list[CaptionedBox]) -> None:
    assert [item.caption.text for item in found] == [item.caption.text for item in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.box == pytest.approx(theirs.box, abs=1e-5)
        assert ours.score == pytest.approx(theirs.score, rel=1e-4)
        assert ours.caption.log_prob == pytest.approx(theirs.caption.log_prob, abs=1e-4)


# --- finding and captioning objects ---


def test_objects_come_by_falling_score_inside_the_image(eager, pictures):
    for objects in describe(eager, pictures):
        assert len(objects) > 2
        scores = [item.score for item in objects]
        assert scores == sorted(scores, reverse=True)
        for item in objects:
            x0, y0, x1, y1 = item.box
            assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
            per_word = item.caption.log_prob / (len(item.caption.words) + 1)
            expected = (item.detection_score * np.exp(per_word)) ** 0.5
            assert item.score == pytest.approx(expected, rel=1e-5)


def test_chunks_of_any_size_give_the_same_captions(eager, pictures):
    """Each chunk pads to its own longest caption and is a batch of its own."""
    expected = describe(eager, pictures[:1])[0]
    for max_rows in (1, 2):
        assert_same_objects(describe(eager, pictures[:1], max_rows=max_rows)[0], expected)


def test_images_are_described_as_each_alone(eager, pictures):
    together = describe(eager, pictures, max_detections=3)
    assert [len(objects) for objects in together] == [3, 3, 3]
    for image, objects in zip(pictures, together, strict=True):
        assert_same_objects(objects, describe(eager, [image], max_detections=3)[0])


def test_an_image_without_objects_has_an_empty_list(tiny_joint_model, pictures, monkeypatch):
    monkeypatch.setattr(tiny_joint_model.detector, "min_score", 1.0)
    assert describe(tiny_joint_model, pictures[:2]) == [[], []]


def test_describing_needs_a_detector(tiny_model, pictures):
    with pytest.raises(ValueError, match="no detector; train one of the densecap recipes"):
        describe(tiny_model, pictures)


# --- captions of many boxes ---


def test_boxes_in_chunks_are_captioned_as_all_at_once(tiny_joint_model, pictures):
    """Images interleave within a chunk; captions must go back to their own image."""
    box = torch.rand(2, 7, 4, generator=torch.Generator().manual_seed(0)) / 2
    boxes = (box + torch.tensor([0.0, 0.0, 0.5, 0.5])).tolist()
    inputs = tiny_joint_model.processor()(pictures[:2], boxes)
    expected = tiny_joint_model.generate(**inputs, max_new_tokens=8)
    assert len({round(caption.log_prob, 3) for caption in expected}) > 7
    for max_rows in (1, 6, 64):
        found = tiny_joint_model.generate(**inputs, max_new_tokens=8, max_rows=max_rows)
        assert [caption.text for caption in found] == [caption.text for caption in expected]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.log_prob == pytest.approx(theirs.log_prob, abs=1e-4)


# --- growing, saving and loading ---


def test_a_model_grows_the_parts_that_it_lacks(tiny_run):
    """What it has stays; SAM's decoder comes trained, the gate before it is shut."""
    model = PixelLLM.from_pretrained(tiny_run.main)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = replace(make_tiny_joint_config(), name="grown")
    language = replace(config.model.language, vocab_size=len(model.tokenizer))
    config = replace(config, model=replace(config.model, language=language))
    model.grow(config, model.tokenizer)
    start_from_sam(model, str(tiny_run.sam), with_encoder=False)
    after = model.state_dict()
    new = {name.split(".")[0] for name in after.keys() - before.keys()}
    assert new == {"mask_head", "detector"} and before.keys() <= after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.config.name == "grown" and not model.mask_head.adapter.alpha.any()
    head, detector = model.mask_head, model.detector
    model.grow(config, model.tokenizer)  # nothing is missing now
    assert model.mask_head is head and model.detector is detector


def test_a_grown_mask_decoder_is_that_of_the_published_sam(tmp_path: Path, tiny_model):
    config = make_tiny_joint_config()
    language = replace(config.model.language, vocab_size=len(tiny_model.tokenizer))
    sam = replace(config.model.sam, conv_stem=False)
    plain = replace(config.model, language=language, sam=sam, masks=None, detector=None)
    model = PixelLLM(replace(config, model=plain), tiny_model.tokenizer)
    other = PixelLLM(replace(config, model=replace(plain, masks=TINY_MASKS)), tiny_model.tokenizer)
    parts = {
        "image_encoder": other.sam.encoder,
        "prompt_encoder": other.prompt_encoder,
        "mask_decoder": other.mask_head.decoder,
    }
    state = {f"{n}.{k}": v for n, part in parts.items() for k, v in part.state_dict().items()}
    torch.save(state, tmp_path / "sam.pth")
    sam = replace(sam, weights=str(tmp_path / "sam.pth"))
    model.grow(replace(config, model=replace(plain, sam=sam, masks=TINY_MASKS)), model.tokenizer)
    for name, tensor in model.mask_head.decoder.state_dict().items():
        assert torch.equal(tensor, other.mask_head.decoder.state_dict()[name]), name


def test_a_frozen_mask_decoder_comes_from_somewhere(tiny_run, tiny_model):
    """A recipe of masks alone names no SAM of its own: it would train on random weights."""
    config = make_tiny_joint_config(start=StartConfig(run=str(tiny_run.main)))
    language = tiny_model.config.model.language
    config = replace(
        config,
        model=replace(config.model, language=language),
        train=replace(config.train, frozen=("mask_head.decoder",)),
    )
    with pytest.raises(ValueError, match="frozen and would stay random; give --model.sam.weights"):
        build_model(config, tiny_model.tokenizer)
    assert with_mask_decoder(config, "sam.pth").model.sam.weights == "sam.pth"
    start = replace(config.start, sam=str(tiny_run.sam))
    assert build_model(replace(config, start=start), tiny_model.tokenizer).mask_head is not None


def test_a_model_of_all_tasks_comes_back_the_same(tiny_joint_model, pictures, tmp_path: Path):
    """Optional parts of the config are dataclasses within dataclasses, or null."""
    tiny_joint_model.save_pretrained(tmp_path)
    loaded = PixelLLM.from_pretrained(tmp_path)
    assert loaded.config == tiny_joint_model.config and not loaded.training
    assert (loaded.config.model.masks, loaded.config.model.detector) == (TINY_MASKS, TINY_DETECTOR)
    expected = tiny_joint_model.state_dict()
    assert all(torch.equal(tensor, expected[n]) for n, tensor in loaded.state_dict().items())
    assert describe(loaded, pictures[:1]) == describe(tiny_joint_model, pictures[:1])
    inputs = Processor.from_pretrained(tmp_path).locating(pictures[:1], [["red", "a ball"]])
    expected = tiny_joint_model.locate(**inputs, with_masks=True)
    assert loaded.locate(**inputs, with_masks=True) == expected


def test_a_model_without_optional_parts_comes_back_without(tiny_model):
    assert (tiny_model.config.model.masks, tiny_model.config.model.detector) == (None, None)
    assert tiny_model.mask_head is None and tiny_model.detector is None
