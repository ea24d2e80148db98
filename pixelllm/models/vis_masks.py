"""Masks out of states of the language model: PerceptionGPT's mask decoder (paper, section 3).

Reference, section 3.3: SAM's two-way transformer with a single query, the projected state, over
adapted CLIP features, an up-sampler by 8, and a dot product per pixel. Difference: the position
code is a plain two-dimensional one; the release's, whose axes are mixed up, is an option.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segment_anything.modeling import TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn


def sine_positions(h: int, w: int, channels: int, device: torch.device) -> Tensor:
    """Sines and cosines of row and column, float32[channels, h, w]; channels by 4."""
    return build_sincos2d_pos_embed([h, w], channels, device=device).T.unflatten(1, (h, w))


def release_positions(h: int, w: int, channels: int, device: torch.device) -> Tensor:
    """The release's position code, float32[channels, h, w]; w by 4.

    It takes columns for channels and channels for columns (reference, section 8.1): the left half
    of the image knows its channel but not its row.
    """
    half = w // 2
    column = torch.arange(w, device=device)
    frequency = 10000.0 ** (-2 * (column % half // 2) / half)  # (w,)
    channel, row = torch.arange(channels, device=device), torch.arange(h, device=device)
    place = torch.where(column < half, channel[:, None, None], row[:, None])  # (channels, h, w)
    angles = place * frequency
    return torch.where(column % 2 == 0, angles.sin(), angles.cos())


class Adapter(nn.Module):
    """A hidden layer beside a linear shortcut, all of one width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shortcut = nn.Linear(width, width)
        self.linear1 = nn.Linear(width, width)
        self.linear2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.linear2(self.linear1(x).relu())


class UpSampler(nn.Module):
    """Eight times the resolution at an eighth of the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (width, width // 4, width // 8, width // 8)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False),
                LayerNorm2d(fan_out),
                nn.ReLU(),
            )
            for fan_in, fan_out in zip(widths, widths[1:], strict=False)
        )
        self.conv = nn.Conv2d(widths[-1], widths[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        """float[n, C, h, w] -> float[n, C / 8, 8h, 8w]."""
        for stage in self.stages:
            x = F.interpolate(stage(x).float(), scale_factor=2, mode="bilinear")
        return self.conv(x)


class VisMaskDecoder(nn.Module):
    """One mask per query.

    Args:
        width: C of queries and features, 32 or more: a norm over fewer than width / 8 = 4 channels
            leaves little but their signs.
        depth, num_heads, mlp_width: of the two-way transformer.
        release_positions: the release's position code.
    """

    def __init__(
        self,
        width: int,
        depth: int = 2,
        num_heads: int = 8,
        mlp_width: int = 2048,
        release_positions: bool = False,
    ) -> None:
        super().__init__()
        self.release_positions = release_positions
        self.transformer = TwoWayTransformer(depth, width, num_heads, mlp_width)
        self.output_upscaling = UpSampler(width)
        self.output_hypernetworks_mlp = MLP(width, width, width // 8, num_layers=3)

    def forward(self, features: Tensor, queries: Tensor) -> Tensor:
        """float[n, C, h, w] and float[n, C] -> logits float[n, 8h, 8w]."""
        h, w = features.shape[-2:]
        positions = self.positions(h, w, features.device).expand_as(features)
        tokens, cells = self.transformer(features, positions, queries[:, None])
        upscaled = self.output_upscaling(cells.mT.unflatten(2, (h, w)))  # (n, C / 8, 8h, 8w)
        return torch.einsum("nc,nchw->nhw", self.output_hypernetworks_mlp(tokens[:, 0]), upscaled)

    def positions(self, h: int, w: int, device: torch.device) -> Tensor:
        """What is added to the cells wherever they are compared, float32[C, h, w]."""
        code = release_positions if self.release_positions else sine_positions
        return code(h, w, self.transformer.embedding_dim, device)


class VisMaskHead(nn.Module):
    """Masks of states.

    Args:
        state_width: D of the states.
        decoder: of the width of the features.
    """

    def __init__(self, state_width: int, decoder: VisMaskDecoder) -> None:
        super().__init__()
        width = decoder.transformer.embedding_dim
        self.query = nn.Linear(state_width, width)
        self.adapter = Adapter(width)
        self.decoder = decoder

    def forward(self, states: Tensor, features: Tensor, image_index: Tensor) -> Tensor:
        """Mask logits of every state.

        Args:
            states: float[n, D].
            features: float[B, C, h, w], of the fine pass.
            image_index: int64[n], the image that each state is about.

        Returns:
            float32[n, 8h, 8w] over the padded square, n may be 0.
        """
        adapted = self.adapter(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.decoder(adapted[image_index], self.query(states.to(features.dtype))).float()


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """float[n, h, w] -> float32[n, H, W], bilinearly and without antialiasing."""
    if not len(logits):
        return logits.new_zeros((0, *size), dtype=torch.float32)
    return F.interpolate(logits[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]
