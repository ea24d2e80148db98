"""Convolutional patch embedding that small image encoders need to learn anything in minutes.

After "Early Convolutions Help Transformers See Better" (Xiao et al., 2021). Not part of the
published model, whose large encoders start from pretrained weights with a linear patch embedding.
"""

from __future__ import annotations

from torch import Tensor, nn


class ConvStem(nn.Module):
    """Overlapping convolutions, 7x7 of stride 4 and then 3x3 of stride 2, down to one patch.

    With batch normalisation between them, as in that paper: with layer normalisation a small EVA02
    named half as many objects after the same time. Takes the place of the `proj` convolution in
    SAM's and in timm's `PatchEmbed`.

    Args:
        width: channels of the output; earlier layers have half of the next one's.
        patch_size: total stride, a power of two of at least 4.
    """

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        num_halvings = patch_size.bit_length() - 3
        if patch_size != 4 << max(num_halvings, 0):
            raise ValueError(f"patch_size of a ConvStem must be 4, 8, 16, ..., not {patch_size}")
        widths = [width >> step for step in range(num_halvings, -1, -1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 7, stride=4, padding=3)]
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.BatchNorm2d(before), nn.GELU()]
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """float[B, 3, H, W], sides divisible by the patch -> float[B, width, h, w]."""
        return self.layers(images)
