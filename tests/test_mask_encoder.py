"""PerceptionGPT's mask encoder."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import PERCEPTION_TOLERANCE, load_perception, part_of, perception_names
from torch.testing import assert_close

from pixelllm.models.mask_encoder import MaskEncoder


@pytest.mark.parametrize("name", perception_names("mask_encoder"))
def test_golden_mask_encoder(name: str):
    case = load_perception(name)
    masks = case["in.masks"][:, 0]
    bottleneck, width = len(case["w.linear_enc.bias"]), len(case["w.linear_dec.bias"])
    encoder = MaskEncoder(width, masks.shape[-1], bottleneck, mixed_norms=True)
    weights = {
        re.sub(r"^dlayer(\d)", lambda stage: f"stages.{int(stage[1]) - 1}", key): value
        for key, value in part_of(case, "w.").items()
    }
    missing, unexpected = encoder.load_state_dict(weights, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    encoder.eval()
    assert_close(encoder.code(masks), case["out.eval_bottleneck"], **PERCEPTION_TOLERANCE)
    assert_close(encoder(masks), case["out.eval"], **PERCEPTION_TOLERANCE)
    assert_close(encoder.train()(masks), case["out.train"], **PERCEPTION_TOLERANCE)


def test_a_mask_does_not_see_the_others_of_its_batch(generator: torch.Generator):
    """It does where a norm takes its statistics from the batch."""
    encoder = MaskEncoder(8, size=32, bottleneck=8).train()
    masks = (torch.rand(3, 32, 32, generator=generator) > 0.5).float()
    assert_close(encoder(masks)[:1], encoder(masks[:1]))


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match="masks of 64 x 64 pixels, not 56 x 64; .*squares"):
        MaskEncoder(8, size=64, bottleneck=8)(torch.zeros(1, 56, 64))
