"""Image files to frames to normalised tensors, as the published data pipeline does it.

Source: Scenic `pixel_llm`, `io/transforms.py` and the model's `preprocess`. One difference: frames
are rounded to uint8, so that a batch is four times smaller; the reference keeps floats.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

WIDE_MODES = ("I", "F")  # 32-bit PIL modes; the 16-bit ones begin with "I;16"


def open_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """Any image as upright 8-bit RGB.

    EXIF rotation is applied, alpha is laid over white, greyscale, palette and CMYK are converted,
    16-bit values are scaled, and an animation gives its first frame.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an image, truncated, or larger than Pillow's bomb limit; names the source.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "image in memory")
    if isinstance(source, bytes):
        name, stream = f"image of {len(source)} bytes", io.BytesIO(source)
    else:
        name, stream = str(source), Path(source)
    try:
        with Image.open(stream) as image:
            return _to_rgb(image, name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: no such image file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name}: refused as a decompression bomb ({error})") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name}: not an image that Pillow can read") from error
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{name}: broken or truncated image ({error})") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > Image.MAX_IMAGE_PIXELS:  # Pillow itself only warns up to twice the limit
        raise ValueError(
            f"{name}: refused as a decompression bomb ({width} x {height} pixels, "
            f"limit {Image.MAX_IMAGE_PIXELS}); shrink it first"
        )
    image = ImageOps.exif_transpose(image)
    if image.mode in WIDE_MODES or image.mode.startswith("I;16"):
        return _scale_to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Greyscale from 0..65535 integers or 0..1 floats; larger values stretch the range."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64)).clip(0)
    top = max(1.0 if image.mode == "F" else 65535.0, values.max())
    return Image.fromarray((values / top * 255).round().astype(np.uint8))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> uint8[3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize_size(size: tuple[int, int], shorter: int, longest: int | None) -> tuple[int, int]:
    """(H, W) after the shorter side becomes `shorter`, unless the longer would exceed `longest`.

    Truncates twice, as the reference does: the longer side can come out at `longest - 1`.
    """
    height, width = size
    short, long = min(size), max(size)
    if longest is not None and shorter * long / short > longest:
        shorter = max(math.floor(longest * short / long), 1)
    if shorter == short:
        return size
    long = shorter * long // short
    return (shorter, long) if height <= width else (long, shorter)


def resize_frame(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear without antialiasing, the data pipeline's rule: [3, H, W] -> float32[3, h, w]."""
    return F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False)[0]


def pad_frame(image: Tensor, frame: int) -> Tensor:
    """Zeros at the bottom and right up to a square: [..., h, w] -> [..., frame, frame]."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, frame - width, 0, frame - height))


def to_frame(image: Image.Image, frame: int) -> tuple[Tensor, tuple[int, int]]:
    """An image inside a square frame, its longer side at most `frame`.

    Returns:
        uint8[3, frame, frame], zero on the padding, and the unpadded (h, w).
    """
    pixels = to_tensor(image)
    size = resize_size(tuple(pixels.shape[1:]), frame, frame)
    return pad_frame(resize_frame(pixels, size).round().to(torch.uint8), frame), size


def resize(maps: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Antialiased resize with half-pixel centres (cubic a = -0.5), equal to `jax.image.resize`.

    Args:
        maps: float[B, C, H, W]; computed in float32, returned in its own dtype.
        mode: "bilinear" or "bicubic".
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps.float(), size, mode=mode, antialias=True).to(maps.dtype)


def normalise(
    images: Tensor,
    sizes: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    size: tuple[int, int],
) -> Tensor:
    """Normalised encoder input whose padding is exactly zero before the resize.

    Args:
        images: uint8 or float[B, 3, S, S] in 0..255.
        sizes: int[B, 2], unpadded (h, w); None where nothing is padded.
        mean: of RGB, in 0..255.
        std: of RGB, in 0..255.
        size: (H, W) of the result.

    Returns:
        float32[B, 3, H, W].
    """
    scale = images.new_tensor(std, dtype=torch.float32).view(3, 1, 1)
    shift = images.new_tensor(mean, dtype=torch.float32).view(3, 1, 1)
    pixels = (images.float() - shift) / scale
    if sizes is not None:
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device) < sizes[:, 0, None]  # (B, H)
        columns = torch.arange(width, device=images.device) < sizes[:, 1, None]  # (B, W)
        pixels = pixels * (rows[:, None, :, None] & columns[:, None, None, :])
    return resize(pixels, size, "bilinear")
