"""A box into one embedding of the language model, and out of one (PerceptionGPT, section 3).

Two MLPs of three layers (reference, section 3.1), the release's sizes and names. Differences: both
compute in float32 whatever autocast says, because bfloat16 steps by 1/256 between 0.5 and 1, and
the decoder starts from random weights throughout. The release zeroes its last layer, through which
nothing learns at first, and then loads it over with random numbers.
"""

from __future__ import annotations

import torch
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor


class BoxEncoder(MLP):
    """Boxes to embeddings of width D; untrained, embeddings of near boxes already differ."""

    def __init__(self, width: int, hidden: int = 512) -> None:
        super().__init__(4, hidden, width, num_layers=3)
        first = self.layers[0]
        with torch.no_grad():  # steep, and measured from the middle
            first.weight.mul_(8)
            first.bias.copy_(-first.weight.sum(1) / 2)

    def forward(self, boxes: Tensor) -> Tensor:
        """float[n, 4], xyxy in [0, 1] of the padded square -> float32[n, D]."""
        with torch.autocast(boxes.device.type, enabled=False):
            return super().forward(boxes.float())


class BoxDecoder(MLP):
    """States of the language model to boxes."""

    def __init__(self, width: int, hidden: int = 512) -> None:
        super().__init__(width, hidden, 4, num_layers=3)

    def forward(self, states: Tensor) -> Tensor:
        """float[n, D] -> float32[n, 4], xyxy in [0, 1] of the padded square.

        Nothing orders the corners; `pixelllm.boxes.order_corners` does.
        """
        with torch.autocast(states.device.type, enabled=False):
            return super().forward(states.float()).sigmoid()
