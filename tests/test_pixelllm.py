"""The whole model against the official one at tiny size (golden `pixel_llm_trace*`)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import golden_names, load_golden
from official_model import Inputs, official_model

from pixelllm.config import SamConfig
from pixelllm.losses import point_loss, text_loss
from pixelllm.models.build import build_sam_branch


@pytest.mark.parametrize("name", golden_names("pixel_llm_trace"))
def test_golden_whole_model_predicts_the_official_points(name: str) -> None:
    """Catches any mistake in wiring, preprocessing, prompt scale or coordinate convention."""
    case = load_golden(name)
    model, inputs = official_model(case), Inputs(case)
    with torch.no_grad():
        features = model.encode(inputs.images, inputs.sizes, {})
        prefix = model.prefix(features, inputs.sizes, inputs.boxes)
        prediction = model(inputs.images, inputs.sizes, inputs.boxes, inputs.text)
    expected = case.tensor("out.forward_eval_with_text.visual_features")
    torch.testing.assert_close(prefix, expected, **case.tolerance)
    expected = case.tensor("out.forward_eval_with_text.point_coords")
    torch.testing.assert_close(inputs.points_px(prediction.points), expected, **case.tolerance)


@pytest.mark.parametrize("name", golden_names("pixel_llm_trace"))
def test_golden_whole_model_has_the_official_training_losses(name: str) -> None:
    """Catches shifted targets, wrong masks and a point loss in the wrong unit."""
    case = load_golden(name)
    model, inputs = official_model(case), Inputs(case)
    h = case.hparams["model"]
    with torch.no_grad():
        prediction = model(inputs.images, inputs.sizes, inputs.boxes, inputs.text)
    ids = inputs.text.token_ids
    rows = case.tensor("in.label.labels").flatten() > 0
    B = len(inputs.sizes)
    text = text_loss(prediction.logits, ids, rows, 0, h["end_token_id"], smoothing=0.1)
    words = (ids > 0) & (ids != h["begin_token_id"]) & (ids != h["end_token_id"])
    valid = (words & rows[:, None]).unflatten(0, (B, -1))
    targets = case.tensor("in.label.points")
    points = point_loss(inputs.points_px(prediction.points), targets, valid, h["point_loss_type"])
    torch.testing.assert_close(text, case.tensor("out.train.text_loss"), **case.tolerance)
    torch.testing.assert_close(points, case.tensor("out.train.point_loss"), **case.tolerance)
    total = text + h["point_loss_weight"] * points
    torch.testing.assert_close(total, case.tensor("out.train.total_loss"), **case.tolerance)


@pytest.mark.parametrize("rule", ["beam4", "greedy"])
@pytest.mark.parametrize("name", golden_names("pixel_llm_trace"))
def test_golden_whole_model_writes_the_official_captions(name: str, rule: str) -> None:
    """Catches decoding that departs from the release, and points that are not of those words."""
    case = load_golden(name)
    model, inputs = official_model(case), Inputs(case)
    expected = case.tensor(f"out.infer_{rule}.text_tokens").long().flatten(0, 1)
    num_beams = case.hparams["model"]["decode_beam_size"] if rule == "beam4" else 1
    with torch.no_grad():
        features = model.encode(inputs.images, inputs.sizes, {})
        prefix = model.prefix(features, inputs.sizes, inputs.boxes).flatten(0, 1)
        found = model.language.generate_official(
            prefix, *inputs.text[:2], max_new_tokens=expected.shape[1] - 2, num_beams=num_beams
        )
        points = inputs.points_px(model.point_head(found.hidden))
    T = found.token_ids.shape[1]
    end = case.hparams["model"]["end_token_id"]
    ours = torch.where(found.padding, end, found.token_ids)
    torch.testing.assert_close(ours, expected[:, :T], rtol=0, atol=0)
    valid = case.tensor(f"out.infer_{rule}.point_valid_mask")[:, :, :T]
    official = case.tensor(f"out.infer_{rule}.point_coords")[:, :, :T]
    torch.testing.assert_close(points[valid], official[valid], **case.tolerance)


def test_a_bfloat16_sam_gives_nearly_the_same_float32_features() -> None:
    """Catches pixels in another dtype than the frozen weights, and low precision leaking out."""
    config = SamConfig(64, 16, 32, 2, 2, 16, window_size=2, global_blocks=(1,))
    torch.manual_seed(0)
    full = build_sam_branch(config, 64)
    half = build_sam_branch(replace(config, bfloat16=True), 64)
    half.load_state_dict(full.state_dict())
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    sizes = torch.tensor([[64, 64], [40, 64]])
    with torch.no_grad():
        expected, found = full(images, sizes), half(images, sizes)
    assert found.dtype == torch.float32
    assert next(half.parameters()).dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)
