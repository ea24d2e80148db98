"""What commands check before any work is done, and the model they were given."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from pixelllm.checkpoints import CONFIG_FILE, find_file
from pixelllm.devices import choose_device
from pixelllm.perceiving import PerceptionGPT
from pixelllm.perception_config import PerceptionConfig
from pixelllm.pretrained import PixelLLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_files(images: Iterable[Path], written: Iterable[Path | None]) -> None:
    """Raise OSError naming an image that is missing or an output that is a folder."""
    for path in images:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such image")
    for path in written:
        if path is not None and path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; name the file to write")


def check_at_least_one(option: str, value: int) -> None:
    """Raise ValueError naming the option of a count."""
    if value < 1:
        raise ValueError(f"{option} {value}: expected 1 or more")


class Search(Protocol):
    """The options of a command that writes words."""

    beams: int
    sample: bool
    temperature: float
    top_p: float
    seed: int


def search_options(command: Search) -> dict[str, Any]:
    """How `PixelLLM.generate` chooses words. Raises ValueError naming the option that is wrong."""
    check_at_least_one("--beams", command.beams)
    if not command.sample:
        if (command.temperature, command.top_p, command.seed) != (1.0, 1.0, 0):
            raise ValueError("--temperature, --top-p and --seed do nothing without --sample")
        return {"num_beams": command.beams}
    if command.beams > 1:
        raise ValueError(f"--beams {command.beams} searches and --sample draws; give one of them")
    if not 0 < command.temperature < math.inf:
        raise ValueError(f"--temperature {command.temperature}: expected a number above 0")
    if not 0 < command.top_p <= 1:
        raise ValueError(f"--top-p {command.top_p}: expected above 0, and at most 1")
    return {"do_sample": True, "temperature": command.temperature, "top_p": command.top_p}


def load_model(
    name_or_path: str, device: str, dtype: str | None = None, int8: bool = False
) -> PixelLLM:
    """The model on the device. Raises ValueError for a device that is not there, before loading."""
    chosen = choose_device(device)
    return PixelLLM.from_pretrained(name_or_path, DTYPES.get(dtype), int8).to(chosen)


def load_any_model(
    name_or_path: str, device: str, dtype: str | None = None, int8: bool = False
) -> PixelLLM | PerceptionGPT:
    """`load_model`, or a PerceptionGPT where the run's configuration says that it holds one."""
    if not holds_perception(name_or_path):
        return load_model(name_or_path, device, dtype, int8)
    chosen = choose_device(device)
    return PerceptionGPT.from_pretrained(name_or_path, DTYPES.get(dtype), int8).to(chosen)


def holds_perception(name_or_path: str) -> bool:
    """Whether a run's folder, or a Hub id, holds a PerceptionGPT."""
    try:
        fields = json.loads(find_file(name_or_path, CONFIG_FILE).read_text())
    except ValueError:  # what is wrong is said where it is loaded
        return False
    return fields.get("kind") == PerceptionConfig.__name__
