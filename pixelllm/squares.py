"""The centred square that PerceptionGPT sees: images, boxes and masks into it and back.

Reference of PerceptionGPT, section 5.3: the shorter side is padded on both sides, by
floor((longer - shorter) / 2) pixels before it. Boxes are not rounded to thousandths as there.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pixelllm.images import resize, to_tensor


def _frame(size: tuple[int, int]) -> tuple[int, int, int]:
    """Side of the square in pixels, and how far in x and y the image lies inside it."""
    side = max(size)
    return side, (side - size[1]) // 2, (side - size[0]) // 2


def square_image(image: Image.Image, side: int) -> Tensor:
    """An RGB image on white, resized bicubically with antialiasing: uint8[3, side, side]."""
    full, left, top = _frame((image.height, image.width))
    canvas = Image.new("RGB", (full, full), "white")
    canvas.paste(image, (left, top))
    return to_tensor(canvas.resize((side, side), Image.Resampling.BICUBIC))


def square_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes float[..., 4] in [0, 1] of an image of `size`, in [0, 1] of its square; float32."""
    side, left, top = _frame(size)
    extent = torch.tensor([*size[::-1]] * 2, dtype=torch.float64)
    offset = torch.tensor([left, top] * 2, dtype=torch.float64)
    return ((boxes.double() * extent + offset) / side).clamp(0, 1).float()


def unsquare_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `square_boxes`; what lies on the padding moves onto the image's border."""
    side, left, top = _frame(size)
    extent, offset = boxes.new_tensor([*size[::-1]] * 2), boxes.new_tensor([left, top] * 2)
    return ((boxes * side - offset) / extent).clamp(0, 1)


def square_mask(mask: np.ndarray, side: int) -> Tensor:
    """A mask bool or uint8[H, W] in the square, its edges soft: float32[side, side] in [0, 1]."""
    full, left, top = _frame(mask.shape)
    height, width = mask.shape
    pixels = torch.from_numpy(np.ascontiguousarray(mask)).float()
    right, bottom = full - width - left, full - height - top
    pixels = F.pad(pixels, (left, right, top, bottom))
    return resize(pixels[None, None], (side, side), "bilinear")[0, 0]


def unsquare_mask(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits or probabilities float[s, s] over the square at the image's pixels: float32[H, W]."""
    side, left, top = _frame(size)
    values = values[None, None].float()
    for axis, start in ((2, top), (3, left)):  # one after the other: of a wide image the square is
        shape = [*values.shape[2:]]  # far larger than the image
        shape[axis - 2] = side
        values = F.interpolate(values, shape, mode="bilinear", align_corners=False)
        values = values.narrow(axis, start, size[axis - 2])
    return values[0, 0]
