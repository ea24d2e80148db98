"""How a saved model comes back: what its file carries, and in which precision it is held."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pixelllm.config import Config
from pixelllm.perception_config import PerceptionConfig

Settings = TypeVar("Settings", Config, PerceptionConfig)
INITIALISERS = frozenset(
    "normal_ uniform_ trunc_normal_ kaiming_uniform_ xavier_uniform_ constant_ zeros_ ones_ zero_ "
    "fill_ erfinv_ mul_ add_ div_ clamp_".split()
)


class WithoutInitialValues(TorchFunctionMode):
    """Modules built inside get parameters without values, for weights that are loaded next.

    Their memory is not touched and so not taken, also where they are cast to bfloat16. On the meta
    device modules would have no buffers.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("tensor")
        if isinstance(first, nn.Parameter):
            if func.__name__ in INITIALISERS:
                first.has_value = False
                return first
            if func.__name__ == "copy_":  # published weights, loaded while the model is built
                first.has_value = True
            if func.__name__ == "bfloat16" and not vars(first).get("has_value", True):
                return torch.empty_like(first, dtype=torch.bfloat16)
        return func(*args, **kwargs)


def held_in(config: Settings, dtype: torch.dtype) -> Settings:
    """The configuration with its encoders and trunk in float32 or bfloat16; CLIP stays as it is.

    Raises ValueError for another precision.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype {dtype}: expected torch.float32 or torch.bfloat16")
    model, is_half = config.model, dtype == torch.bfloat16
    parts = {
        name: replace(getattr(model, name), bfloat16=is_half)
        for name in ("sam", "eva02", "language")
        if hasattr(model, name)
    }
    return replace(config, model=replace(model, **parts))


def is_referenced(name: str, config: Config) -> bool:
    """Whether a saved model names the source of this tensor instead of carrying it.

    These are the frozen weights that are published: the trunk under its LoRA factors, SAM, EVA02.
    """
    part = ".".join(name.split(".")[: 2 if name.startswith("mask_head.") else 1])
    model, frozen = config.model, config.train.frozen
    if config.include_frozen:
        return False
    if part == "language":
        return (
            model.language.trunk is not None
            and model.language.lora_rank > 0
            and "lora_" not in name
        )
    sources = {
        "sam": model.sam.weights,
        "prompt_encoder": model.sam.weights,
        "mask_head.decoder": model.sam.weights,
        "eva02": model.eva02.weights,
    }
    return part in frozen and sources.get(part) is not None
