"""Fixtures shared by the whole suite: the golden numbers and one obvious home for "small"."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

GOLDEN = Path(os.environ.get("PIXELLLM_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


@dataclass(frozen=True)
class GoldenCase:
    """One case of the official implementation: its index entry, inputs, weights and outputs."""

    name: str
    index: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def hparams(self) -> dict[str, Any]:
        return self.index["hparams"]

    @property
    def tolerance(self) -> dict[str, float]:
        return self.index["tolerance"]

    def tensor(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.array(self.arrays[key]))

    def weights(self) -> dict[str, np.ndarray]:
        """The Flax parameters without their `w.` prefix."""
        return {key[2:]: value for key, value in self.arrays.items() if key.startswith("w.")}


def golden_root() -> Path:
    if not GOLDEN.exists():
        pytest.skip(f"no golden numbers at {GOLDEN}; set PIXELLLM_GOLDEN to their folder")
    return GOLDEN


def golden_names(prefix: str) -> list[str]:
    """Names of the array cases that begin with `prefix`; one placeholder where there are none."""
    index = GOLDEN / "index.json"
    if not index.exists():
        return ["absent"]
    return [name for name in json.loads(index.read_text())["cases"] if name.startswith(prefix)]


def load_golden(name: str) -> GoldenCase:
    """An array case (.npz) by name; skips the test where the folder is absent."""
    root = golden_root()
    index = json.loads((root / "index.json").read_text())["cases"][name]
    with np.load(root / index["file"]) as archive:
        return GoldenCase(name, index, {key: archive[key] for key in archive.files})


def load_golden_json(relative: str) -> Any:
    """A JSON case by its path below the golden folder; skips where the folder is absent."""
    return json.loads((golden_root() / relative).read_text())


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
