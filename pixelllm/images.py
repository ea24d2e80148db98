"""Image files to frames to normalised tensors, as the published data pipeline does it.

Source: Scenic `pixel_llm`, `io/transforms.py` and the model's `preprocess`. One difference: frames
are rounded to uint8, so that a batch is four times smaller; the reference keeps floats.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # Pillow's convert() would clip them
# What the decoders of Pillow raise on damaged files.
UNREADABLE = (OSError, SyntaxError, TypeError, ValueError, EOFError, RuntimeError, struct.error)
TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """Any image as upright 8-bit RGB.

    EXIF rotation is applied, alpha is laid over white, greyscale, palette and CMYK are converted,
    16-bit values are scaled, and an animation gives its first frame.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an image, truncated, or larger than Pillow's bomb limit; names the source.
    """
    name = str(source)
    if isinstance(source, bytes | Image.Image):
        name = f"{type(source).__name__} in memory"
    try:
        with _opened(source) as image:
            return _to_rgb(image)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: no such image file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name}: refused as a decompression bomb: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name}: not an image in a format that Pillow reads") from error
    except UNREADABLE as error:
        raise ValueError(f"{name}: broken, truncated or unreadable image: {error}") from error


def _opened(source: str | Path | bytes | Image.Image) -> AbstractContextManager[Image.Image]:
    if isinstance(source, Image.Image):
        return nullcontext(source)  # the caller's to close
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _to_rgb(image: Image.Image) -> Image.Image:
    width, height = image.size
    limit = Image.MAX_IMAGE_PIXELS or width * height  # Pillow itself only warns up to twice of it
    if width * height > limit:
        raise Image.DecompressionBombError(
            f"{width} x {height} pixels, the limit is {limit}; shrink it first"
        )
    image.load()  # TIFFs are turned by this already, and no longer say that they should be
    turn = TURNS.get(image.getexif().get(0x0112))  # ImageOps would write all of the EXIF anew
    image = image if turn is None else image.transpose(turn)
    if image.mode in WIDE_MODES:
        image = _scale_to_8_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")  # a copy
    image.info = {}  # it is upright: opened once more, nothing may turn it again
    return image


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Greyscale from 0..65535 integers or 0..1 floats; larger values stretch the range."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0).clip(0)
    top = max(1.0 if image.mode == "F" else 65535.0, values.max())
    return Image.fromarray((values / top * 255).round().astype(np.uint8))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> uint8[3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize_size(size: tuple[int, int], shorter: int, longest: int | None) -> tuple[int, int]:
    """(H, W) after the shorter side becomes `shorter`, unless the longer would exceed `longest`.

    Truncates twice, as the reference does: the longer side can come out at `longest - 1`.
    """
    short, long = min(size), max(size)
    if longest is not None and shorter * long > longest * short:
        shorter = max(longest * short // long, 1)
        long = min(shorter * long // short, longest)
    else:
        long = shorter * long // short
    return (shorter, long) if size[0] <= size[1] else (long, shorter)


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


def resize_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest neighbour at cell centres, the data pipeline's rule for masks: [n, H, W]."""
    return F.interpolate(masks[None], size, mode="nearest-exact")[0]


def restore_mask(
    logits: Tensor, size: tuple[int, int], frame: int, image_size: tuple[int, int]
) -> Tensor:
    """A mask of the original image from logits over its padded frame, the evaluation's rule.

    The part inside the image is cut out in whole cells, rounded down, enlarged bilinearly without
    antialiasing, and what is above 0 is foreground.

    Args:
        logits: float[h, w]; one mask, because those of a large photograph fill the memory.
        size: unpadded (H, W) inside the frame.
        frame: side of the frame.
        image_size: (H, W) of the original image.

    Returns:
        bool[H, W].
    """
    h, w = (
        max(int(side * (cells / frame)), 1) for side, cells in zip(size, logits.shape, strict=True)
    )
    logits = logits[None, None, :h, :w].float()
    return F.interpolate(logits, image_size, mode="bilinear", align_corners=False)[0, 0] > 0


def crop_points(points: Tensor, window: Tensor) -> Tensor:
    """Points seen through a window, moved onto its border where they lie outside.

    Args:
        points: float[..., 2], (x, y) in the unit of `window`.
        window: float[4], xyxy.

    Returns:
        float[..., 2] in [0, 1] of the window.
    """
    return ((points - window[:2]) / (window[2:] - window[:2])).clamp(0, 1)


def crop_boxes(boxes: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes seen through a window: `crop_points` of the corners, and which are not empty.

    Returns:
        float[n, 4] and bool[n].
    """
    cropped = crop_points(boxes.unflatten(-1, (2, 2)), window)
    return cropped.flatten(-2), (cropped[..., 1, :] > cropped[..., 0, :]).all(-1)


def flip_points(points: Tensor) -> Tensor:
    """Mirror left and right: float[..., 2] in [0, 1]."""
    return torch.stack([1 - points[..., 0], points[..., 1]], dim=-1)


def flip_boxes(boxes: Tensor) -> Tensor:
    """Mirror left and right: float[..., 4], xyxy in [0, 1]."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack([1 - x1, y0, 1 - x0, y1], dim=-1)


def random_frame(
    image: Image.Image, frame: int, scale: tuple[float, float], generator: torch.Generator
) -> tuple[Tensor, tuple[int, int], Tensor]:
    """The reference's training view: random size, then a random crop that fits the frame.

    Args:
        image: RGB.
        frame: side of the result.
        scale: range of the longer side before the crop, over `frame`.
        generator: source of the randomness.

    Returns:
        uint8[3, frame, frame], the unpadded (h, w), and the window that is seen, float32[4], xyxy
        in [0, 1] of the image, for `crop_boxes` and `crop_points`.
    """
    low, high = scale
    longer = int(frame * (low + (high - low) * torch.rand((), generator=generator).item()))
    pixels = to_tensor(image)
    height, width = resize_size(tuple(pixels.shape[1:]), longer, longer)
    h, w = min(height, frame), min(width, frame)
    top = int(torch.randint(height - h + 1, (), generator=generator))
    left = int(torch.randint(width - w + 1, (), generator=generator))
    pixels = resize_frame(pixels, (height, width))[:, top : top + h, left : left + w]
    window = torch.tensor([left, top, left + w, top + h])
    window = window / torch.tensor([width, height, width, height])
    return pad_frame(pixels.round().to(torch.uint8), frame), (h, w), window
