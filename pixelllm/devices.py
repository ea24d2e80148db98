"""Which device to run on."""

from __future__ import annotations

import torch


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU. Raises ValueError for one that is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next((kind for kind, there in present.items() if there), "cpu"))
    kind = name.split(":")[0]
    if kind != "cpu" and not present.get(kind, False):
        raise ValueError(f"device {name!r} is not available here; try auto or cpu")
    return torch.device(name)
