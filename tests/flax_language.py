"""Flax parameters of the official language parts -> state dicts of our modules."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Weights = dict[str, np.ndarray]


def point_head_state(weights: Weights) -> dict[str, Tensor]:
    """`mlp_point_predictor` -> `PointHead`; keys without a prefix."""
    state = {}
    for path, value in weights.items():
        module, leaf = path.rsplit("/", 1)
        if module == "LayerNorm_0":
            state[f"norm.{_LEAVES[leaf]}"] = _tensor(value)
        else:  # an activation lies between two layers
            index = 2 * int(module.removeprefix("mlp/layers."))
            state[f"mlp.{index}.{_LEAVES[leaf]}"] = _dense(leaf, value)
    return state


_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def _tensor(value: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(value))


def _dense(leaf: str, value: np.ndarray) -> Tensor:
    """Dense kernels are (in, out) in Flax."""
    return _tensor(value.T if leaf == "kernel" else value)
