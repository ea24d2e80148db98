"""Point head: where in the image each word lies. PixelLLM paper, section 3.3.

As in the official release two points are regressed per word, the corners (x_min, y_min) and
(x_max, y_max) of its box. The official head also has one more pair of outputs per point that
nothing reads; they are kept so that its weights fit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PointHead(nn.Module):
    """An MLP from the feature of a word to its points.

    Args:
        width: D of the features.
        hidden: width of the hidden layers.
        depth: number of linear layers.
        num_points: P per word.
        num_logits: unused outputs per point.
        pre_norm: LayerNorm on the features first.
        activation: class of the activation; GELU is the exact one.
    """

    def __init__(
        self,
        width: int,
        hidden: int = 512,
        depth: int = 4,
        num_points: int = 2,
        num_logits: int = 2,
        pre_norm: bool = True,
        activation: type[nn.Module] = nn.GELU,
    ):
        super().__init__()
        self.num_points = num_points
        self.norm = nn.LayerNorm(width, eps=1e-6) if pre_norm else nn.Identity()
        widths = [width] + [hidden] * (depth - 1) + [num_points * (2 + num_logits)]
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(fan_in, fan_out), activation()]
        self.mlp = nn.Sequential(*layers[:-1])
        for layer in self.mlp[::2]:  # LeCun normal, as in the official code
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Points of every word.

        Args:
            hidden: float[..., D], any dtype.

        Returns:
            float32[..., P, 2], (x, y) in [0, 1] of the original image, not clamped.
        """
        return (self.outputs(hidden)[..., :2] + 1) / 2

    def outputs(self, hidden: Tensor) -> Tensor:
        """All raw outputs, float32[..., P, 2 + num_logits]."""
        # Outside autocast: between 512 and 1024, bfloat16 can only step by 4 pixels.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.mlp(self.norm(hidden.float())).unflatten(-1, (self.num_points, -1))
