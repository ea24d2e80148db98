"""A mask into one embedding of the language model: a small ResNet (PerceptionGPT, section 3).

Reference, section 3.2. Difference: one norm everywhere; the release's mixture is an option.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

INNER, OUTER = 32, 64  # channels inside and between the blocks
STRIDES = (1, 2, 2, 2)
REDUCTION = 32  # of all strides: stem 2, pooling 2, stages 8


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; every one is rectified before the sum."""

    def __init__(
        self, channels: int, stride: int, norm: type[nn.Module], is_first: bool = False
    ) -> None:
        super().__init__()
        conv = partial(nn.Conv2d, bias=False)
        self.conv1, self.norm1 = conv(channels, INNER, 1), norm(INNER)
        self.conv2, self.norm2 = conv(INNER, INNER, 3, stride, padding=1), norm(INNER)
        self.conv3, self.norm3 = conv(INNER, OUTER, 1), norm(OUTER)
        self.downsample = nn.Identity()
        if is_first:
            self.downsample = nn.Sequential(conv(channels, OUTER, 1, stride), norm(OUTER))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm1(self.conv1(x)).relu()
        inner = self.norm2(self.conv2(inner)).relu()
        inner = self.norm3(self.conv3(inner)).relu()
        return (self.downsample(x) + inner).relu()


class MaskEncoder(nn.Module):
    """Masks to embeddings.

    Args:
        width: D of the embeddings.
        size: side of the masks in pixels, a multiple of 32.
        bottleneck: width between the two linear layers, which have nothing between them.
        mixed_norms: batch norm in every second block, as in the release; otherwise all are layer
            norms over the channels.
    """

    def __init__(
        self, width: int, size: int = 256, bottleneck: int = 512, mixed_norms: bool = False
    ) -> None:
        super().__init__()
        self.size = size
        self.conv1 = nn.Conv2d(1, INNER, 7, stride=2, padding=3, bias=False)
        self.norm1 = LayerNorm2d(INNER)
        second = nn.BatchNorm2d if mixed_norms else LayerNorm2d
        self.stages = nn.ModuleList(
            nn.Sequential(
                Bottleneck(channels, stride, LayerNorm2d, is_first=True),
                Bottleneck(OUTER, 1, second),
            )
            for channels, stride in zip((INNER, OUTER, OUTER, OUTER), STRIDES, strict=True)
        )
        self.linear_enc = nn.Linear(OUTER * (size // REDUCTION) ** 2, bottleneck)
        self.linear_dec = nn.Linear(bottleneck, width)

    def forward(self, masks: Tensor) -> Tensor:
        """float[n, size, size] in [0, 1] -> float[n, D].

        Raises ValueError for masks of another size.
        """
        return self.linear_dec(self.code(masks))

    def code(self, masks: Tensor) -> Tensor:
        """What is between the two linear layers, float[n, bottleneck]."""
        size = (self.size, self.size)
        if masks.shape[1:] != size:
            raise ValueError(
                f"the mask encoder takes masks of {size[0]} x {size[1]} pixels, not "
                f"{' x '.join(map(str, masks.shape[1:]))}; resize them with pixelllm.squares"
            )
        x = self.norm1(self.conv1(masks[:, None])).relu()
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in self.stages:
            x = stage(x)
        return self.linear_enc(x.flatten(1))
