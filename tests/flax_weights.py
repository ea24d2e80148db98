"""Weights of the golden cases (Flax trees, flattened) as state dicts of our modules.

Every function takes one module's weights, keyed by their path without the module's own name:
`part(case.weights(), "sam_backbone")` cuts them out of a whole model's.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

Weights = dict[str, np.ndarray]
StateDict = dict[str, Tensor]


def part(weights: Weights, name: str) -> Weights:
    """The weights below one module of the tree."""
    prefix = name + "/"
    return {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}


def plain(weights: Weights) -> StateDict:
    """Flax names and layouts to torch's: dense, convolution, norm and embedding."""
    return dict(_plain(key, value) for key, value in weights.items())


def _plain(key: str, value: np.ndarray) -> tuple[str, Tensor]:
    path = key.replace("/", ".")
    stem, _, leaf = path.rpartition(".")
    if leaf == "kernel":
        # Dense (in, out), convolution (h, w, in, out); SAM's transposed ones (h, w, out, in).
        axes = {2: (1, 0), 4: (3, 2, 0, 1)}[value.ndim]
        return f"{stem}.weight", torch.from_numpy(value.transpose(axes).copy())
    if leaf in ("scale", "embedding"):
        return f"{stem}.weight", torch.from_numpy(value.copy())
    return path, torch.from_numpy(value.copy())


def sam_encoder(weights: Weights) -> StateDict:
    return plain(weights)


def prompt_encoder(weights: Weights, like: StateDict) -> StateDict:
    """`like` supplies the mask branch, which whole-model cases do not have."""
    branch = {key: value for key, value in like.items() if key.startswith("mask_downscaling")}
    return branch | plain(weights)


def mask_decoder(weights: Weights) -> StateDict:
    return plain(weights)


EVA02_NAMES = (
    ("attn.q_bias", "attn.q_proj.bias"),
    ("attn.v_bias", "attn.v_proj.bias"),
    ("mlp.ffn_ln", "mlp.norm"),
    ("mlp.w1", "mlp.fc1_g"),
    ("mlp.w2", "mlp.fc1_x"),
    ("mlp.w3", "mlp.fc2"),
    ("ln_post", "norm"),
)


def eva02_encoder(weights: Weights) -> StateDict:
    state = {}
    for key, value in plain(weights).items():
        for flax, torch_name in EVA02_NAMES:
            key = key.replace(flax, torch_name)
        state[f"vit.{key}"] = value
    return state


PROMPT_NAMES = (
    ("output_tokens.weight", "output_tokens"),
    ("image_projection_mlp.layers.0", "image_projection"),
    ("prompt_embedding_projection_mlp.layers.0", "prompt_projection"),
    ("image_pe_projection_mlp.layers.0", "position_projection"),
)


def prompt_extractor(weights: Weights) -> StateDict:
    """Stacks the heads of the output tokens; drops the dense output, which the model never uses."""
    state, heads = {}, {}
    for key, value in plain(weights).items():
        head = re.match(r"output_hypernetworks_mlps\.(\d+)\.layers\.0\.(weight|bias)", key)
        if head:
            heads[head[2], int(head[1])] = value.T if value.ndim == 2 else value
        elif not key.startswith("dense_output_mlp"):
            for flax, torch_name in PROMPT_NAMES:
                key = key.replace(flax, torch_name)
            state[key] = value
    for kind in ("weight", "bias"):
        numbers = sorted(number for leaf, number in heads if leaf == kind)
        state[f"head_{kind}"] = torch.stack([heads[kind, number] for number in numbers])
    return state
