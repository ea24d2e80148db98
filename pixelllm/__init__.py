"""PixelLLM in PyTorch: a vision-language model that points at every word it writes.

Shape letters, used in comments and docstrings of the whole tree:
    B images, K prompts per image, R rows (B * K), N visual tokens, T text tokens,
    C encoder channels, D model width, V vocabulary, H x W pixels, h x w feature cells.

Points are (x, y), boxes are xyxy, both in [0, 1] of the original image; sizes are (H, W).
A name ending in `_px` departs from that. Masks named `padding` are True on padding.
"""

import logging
from importlib import import_module
from typing import Any

_HOMES = {
    "PixelLLM": "pixelllm.pretrained",
    "PerceptionGPT": "pixelllm.perceiving",
    "Processor": "pixelllm.processor",
}
__all__ = ["PerceptionGPT", "PixelLLM", "Processor"]

# Where torchao is installed, transformers imports it, and torch then warns of its way with enums.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Load the model's code when it is asked for; the data readers never do."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
