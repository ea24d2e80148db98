"""Dense captioning against the official model at tiny size (golden `pixel_llm_densecap*`).

The functions here are what a dense captioner does with the parts: detections, or in training
sampled proposals, prompt the language model.
"""

from __future__ import annotations

import pytest
import torch
from conftest import golden_names, load_golden
from official_model import Inputs, official_model
from torch import Tensor

from pixelllm.boxes import to_relative
from pixelllm.decoding import beam_search
from pixelllm.detection import rank_captions, take_rows
from pixelllm.losses import text_loss
from pixelllm.models import detector as detector_module
from pixelllm.models.detector import DetectorOutput
from pixelllm.models.pixelllm import Text
from pixelllm.models.trunk import Language

NAMES = golden_names("pixel_llm_densecap")


class DenseCase:
    """Our model and batch of a case; the release clips boxes to the frame, not to the image."""

    def __init__(self, name: str) -> None:
        self.case = load_golden(name)
        self.h = self.case.hparams["model"]
        self.model = official_model(self.case)
        self.inputs = Inputs(self.case)
        frame = self.inputs.images.shape[-1]
        self.frames = torch.full_like(self.inputs.sizes, frame)
        self.features = self.model.encode(self.inputs.images, self.inputs.sizes, {})
        only_sam = self.h["box_decoder_feature_key"] == "sam_visual_features"
        self.detected_on = self.features.sam if only_sam else self.features.fused

    def visual_tokens(self, boxes_px: Tensor) -> Tensor:
        sizes = self.inputs.sizes
        return self.model.prefix(self.features, sizes, to_relative(boxes_px, sizes))

    def close(self, ours: Tensor, key: str) -> None:
        torch.testing.assert_close(ours, self.case.tensor(key).to(ours), **self.case.tolerance)


def write_beams(language: Language, prefix: Tensor, length: int, beams: int) -> tuple[Tensor, ...]:
    """All finished captions of R rows without a context, int64[R, beams, T], and their scores."""
    nothing = torch.zeros(len(prefix), 0, dtype=torch.long)
    prompt = language.encode(prefix, nothing, nothing.bool()).repeat(beams)
    start = torch.full((len(prefix), length), language.eos_id)
    start[:, 0] = language.bos_id

    def next_logits(token_ids: Tensor, t: int) -> Tensor:
        return language.logits(language.decode(prompt, token_ids[:, : t + 1])[:, -1])

    return beam_search(next_logits, start, language.eos_id, beams)


def prompted_text(text: Text, output: DetectorOutput, count: int) -> tuple[Tensor, Text, Tensor]:
    """The first proposals as prompts, with context and words of the object that each one matches.

    Returns:
        boxes float32[B, n, 4], the text of B * n rows, and bool[B * n], rows that are an object.
    """
    boxes_px, index, is_object = (part[:, :count] for part in output[1:])
    by_image = [part.unflatten(0, (len(index), -1)) for part in text]
    rows = Text(*(take_rows(part, index).flatten(0, 1) for part in by_image))
    return boxes_px, rows, is_object.flatten()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_golden_dense_captions(name: str):
    """Catches another order of captions, and prompts that are not the detections."""
    dense = DenseCase(name)
    count = dense.h["box_decoder_args"]["roi_post_nms_num_detections"]
    found = dense.model.detector.detect(dense.detected_on, dense.frames, count)
    dense.close(found.boxes_px, "out.infer.prompt_boxes")
    prefix = dense.visual_tokens(found.boxes_px)
    length, beams = dense.h["max_caption_length"], dense.h["decode_beam_size"]
    token_ids, log_probs = write_beams(dense.model.language, prefix.flatten(0, 1), length, beams)
    token_ids, log_probs = (part.unflatten(0, (-1, count)) for part in (token_ids, log_probs))
    ranked = rank_captions(found.scores, log_probs, dense.h["num_detections"])
    dense.close(ranked.scores, "out.infer.detection_scores")
    dense.close(take_rows(found.boxes_px, ranked.detection), "out.infer.detection_boxes")
    dense.close(take_rows(prefix, ranked.detection), "out.infer.visual_features")
    captions = take_rows(
        take_rows(token_ids, ranked.detection).flatten(0, 1), ranked.beam.view(-1, 1)
    )
    expected = dense.case.tensor("out.infer.text_tokens").long().flatten(0, 1)
    assert torch.equal(captions[:, 0], expected)


@pytest.mark.parametrize("name", NAMES)
def test_golden_dense_captioning_losses(name: str, monkeypatch: pytest.MonkeyPatch):
    """The release drew its samples from another generator; we take the same and check that they
    are proposals of ours, and that the objects are those we find."""
    dense = DenseCase(name)
    expected = dense.case.tensor("out.train_forward.last_proposals")

    def the_same(proposals_px: Tensor, is_object: Tensor, *_: object) -> Tensor:
        distance = (expected[:, :, None] - proposals_px[:, None]).abs().amax(-1)
        assert distance.amin(-1).max() < dense.case.tolerance["atol"] * 10
        return take_rows(proposals_px, distance.argmin(-1))

    monkeypatch.setattr(detector_module, "sample_proposals", the_same)
    boxes_px = dense.case.tensor("in.label.boxes")
    valid = dense.case.tensor("in.label.labels") > 0
    output = dense.model.detector(dense.detected_on, dense.frames, boxes_px, valid)
    terms = {"total": "det", "heatmap_pos": "pos", "heatmap_neg": "neg", "giou": "reg"}
    terms |= {"roi_cls": "stage0_roi_cls", "roi_reg": "stage0_roi_reg"}
    for ours, theirs in terms.items():
        dense.close(getattr(output.losses, ours), f"out.train.{theirs}_loss")

    prompts_px, text, is_object = prompted_text(
        dense.inputs.text, output, dense.h["num_text_proposals"]
    )
    matched = "out.train_forward.matched"
    dense.close(prompts_px, f"{matched}.prompt_boxes")
    assert torch.equal(is_object, dense.case.tensor(f"{matched}.gt_classes").flatten() > 0)
    ids = dense.case.tensor(f"{matched}.gt_text_tokens").long().flatten(0, 1)
    assert torch.equal(text.token_ids[is_object], ids[is_object])
    prefix = dense.visual_tokens(prompts_px)
    dense.close(prefix, "out.train_forward.visual_features")
    logits = dense.model.language.logits(dense.model.language(prefix.flatten(0, 1), *text))
    loss = text_loss(logits, text.token_ids, is_object, 0, dense.h["end_token_id"])
    dense.close(loss, "out.train.text_loss")
    dense.close(loss + output.losses.total, "out.train.total_loss")
