"""CenterNet2's first stage: a pyramid from one feature map, and heat and boxes on all its levels.

The pyramid is ViTDet's (Li et al., 2022), from the fused features of PixelLLM instead of a
backbone; the head is CenterNet2's proposal network (Zhou et al., 2021), class agnostic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

START_PROBABILITY_LOGIT = -4.6  # cells begin at 1%, or the background drowns all else
START_DISTANCE = 8.0  # strides; boxes begin large, so that they overlap what they should find


class SimplePyramid(nn.Module):
    """Maps of twice, once and half the size, and up to two smaller ones.

    Args:
        in_channels: of the map.
        width: channels of all levels.
        up_channels: of the enlarged map before its projection.
        num_top_blocks: 0; 1 adds every other cell of the last map; 2 adds two strided convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        width: int = 256,
        up_channels: int = 384,
        num_top_blocks: int = 2,
    ) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, up_channels, 2, stride=2)
        self.down = nn.MaxPool2d(2)
        channels = (up_channels, in_channels, in_channels)
        self.laterals = nn.ModuleList(_lateral(each, width) for each in channels)
        self.num_top_blocks = num_top_blocks
        self.tops = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride=2, padding=1)
            for _ in range(2 if num_top_blocks == 2 else 0)
        )

    @property
    def num_levels(self) -> int:
        return len(self.laterals) + self.num_top_blocks

    def forward(self, features: Tensor) -> list[Tensor]:
        """float[B, C, h, w] -> float[B, width, h', w'] of every level, finest first."""
        maps = [self.up(features), features, self.down(features)]
        levels = [lateral(each) for lateral, each in zip(self.laterals, maps, strict=True)]
        if self.num_top_blocks == 1:
            levels.append(levels[-1][..., ::2, ::2])
        elif self.num_top_blocks == 2:
            levels.append(self.tops[0](levels[-1]))
            levels.append(self.tops[1](levels[-1].relu()))
        return levels


def _lateral(in_channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 1, bias=False),
        LayerNorm2d(width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        LayerNorm2d(width),
    )


class Heat(NamedTuple):
    """`logits` float32[B, M], whether an object's centre is in the cell, and `ltrb`
    float32[B, M, 4], distances to the sides of its box in strides, of all cells of a pyramid."""

    logits: Tensor
    ltrb: Tensor


class CenterNetHead(nn.Module):
    """One tower for all levels and for both outputs; only a scale of the boxes is a level's own.

    Args:
        in_channels: of the levels.
        width: of the tower, a multiple of its 32 norm groups.
        num_layers: of the tower.
        num_levels: of the pyramid.
    """

    def __init__(
        self, in_channels: int = 256, width: int = 256, num_layers: int = 4, num_levels: int = 5
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (in_channels, *[width] * (num_layers - 1)):
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            layers += [nn.GroupNorm(32, width, eps=1e-6), nn.ReLU()]
        self.tower = nn.Sequential(*layers)
        self.heat = nn.Conv2d(width, 1, 3, padding=1)
        self.ltrb = nn.Conv2d(width, 4, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(num_levels))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        nn.init.constant_(self.heat.bias, START_PROBABILITY_LOGIT)
        nn.init.constant_(self.ltrb.bias, START_DISTANCE)

    def forward(self, levels: list[Tensor]) -> Heat:
        """Levels float[B, C, h, w], finest first, as `Heat` of all their cells in that order."""
        logits, ltrb = [], []
        for level, scale in zip(levels, self.scales, strict=True):
            hidden = self.tower(level)
            logits.append(self.heat(hidden).flatten(1))
            ltrb.append((self.ltrb(hidden) * scale).relu().flatten(2).mT)
        return Heat(torch.cat(logits, dim=1), torch.cat(ltrb, dim=1))
