"""Point head against the official numbers; it must stay in float32."""

from __future__ import annotations

import pytest
import torch
from conftest import golden_names, load_golden
from flax_language import point_head_state
from torch import nn

from pixelllm.models.points import PointHead


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
    head.load_state_dict(point_head_state(case.weights()))
    points = head(hidden)
    torch.testing.assert_close(points, case.tensor("out.point_coords"), **case.tolerance)
    logits = head.outputs(hidden)[..., 2:]
    torch.testing.assert_close(logits, case.tensor("out.logits"), **case.tolerance)
