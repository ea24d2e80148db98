"""PerceptionGPT's box encoder and decoder."""

from __future__ import annotations

import pytest
import torch
from conftest import PERCEPTION_TOLERANCE, load_perception, part_of, perception_names
from torch.testing import assert_close

from pixelllm.models.vis_boxes import BoxDecoder, BoxEncoder


@pytest.mark.parametrize("name", perception_names("box_mlp"))
def test_golden_box_mlp(name: str):
    case = load_perception(name)
    hidden, width = case["w.dec.layers.0.weight"].shape
    encoder, decoder = BoxEncoder(width, hidden), BoxDecoder(width, hidden)
    encoder.load_state_dict(part_of(case, "w.enc."))
    decoder.load_state_dict(part_of(case, "w.dec."))
    assert_close(encoder(case["in.boxes"]), case["out.enc"], **PERCEPTION_TOLERANCE)
    assert_close(decoder(case["in.hidden"]), case["out.dec"], **PERCEPTION_TOLERANCE)


def test_boxes_stay_exact_under_autocast(generator: torch.Generator):
    """In bfloat16 a coordinate near 1 can only step by 1/256."""
    encoder, decoder = BoxEncoder(8, 16), BoxDecoder(8, 16)
    boxes, states = torch.rand(5, 4, generator=generator), torch.randn(5, 8, generator=generator)
    plain = encoder(boxes), decoder(states)
    with torch.autocast("cpu", torch.bfloat16):
        cast = encoder(boxes), decoder(states)
    assert_close(cast, plain, rtol=0, atol=0)


def test_the_first_box_already_teaches_the_language_model(generator: torch.Generator):
    """Through a last layer of zeros no gradient would reach it, and boxes were hardly learnt."""
    states = torch.randn(2, 8, generator=generator, requires_grad=True)
    BoxDecoder(8, 16)(states).sum().backward()
    assert states.grad.abs().max() > 1e-4


def test_untrained_embeddings_of_boxes_differ(generator: torch.Generator):
    """Beside a large constant part, which the norm of a trunk keeps, boxes would all look alike."""
    embedded = BoxEncoder(32, 64)(torch.rand(200, 4, generator=generator))
    mean = embedded.mean(0)
    assert (embedded - mean).norm(dim=1).mean() > 0.4 * mean.norm()
