"""Point head against the official numbers; it must stay in float32."""

from __future__ import annotations

import pytest
import torch
from conftest import golden_names, load_golden
from torch import nn

from pixelllm.models.points import PointHead
from pixelllm.scenic import part_state


@pytest.mark.parametrize("name", golden_names("point_predictor"))
def test_golden_point_predictor(name):
    case = load_golden(name)
    hidden = case.tensor("in.text_feat")
    head = PointHead(
        hidden.shape[-1],
        hidden=case.hparams["hidden_dim"],
        depth=case.hparams["depth"],
        num_points=case.hparams["num_output_points"],
        num_logits=1 + case.hparams["num_classes"],
        pre_norm=case.hparams["pre_norm"],
        activation={"gelu": nn.GELU, "relu": nn.ReLU}[case.hparams["mlp_activation"]],
    )
    head.load_state_dict(part_state("point_predictor", case.weights()))
    points = head(hidden)
    torch.testing.assert_close(points, case.tensor("out.point_coords"), **case.tolerance)
    logits = head.outputs(hidden)[..., 2:]
    torch.testing.assert_close(logits, case.tensor("out.logits"), **case.tolerance)


def test_points_stay_float32_under_autocast():
    """Between 512 and 1024, bfloat16 can only step by 4 pixels."""
    head, hidden = PointHead(16, hidden=8), torch.randn(2, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        points = head(hidden)
    assert points.dtype == torch.float32
    torch.testing.assert_close(points, head(hidden))


def test_an_untrained_head_points_around_the_centre():
    torch.manual_seed(0)
    points = PointHead(64, hidden=64)(torch.randn(500, 64))
    assert points.shape == (500, 2, 2)
    assert (points.mean((0, 1)) - 0.5).abs().max() < 0.25
