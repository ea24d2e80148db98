"""Flax parameters of the official box decoder -> our `Detector`."""

from __future__ import annotations

import re
from typing import Any

import flax_weights
import numpy as np
import torch
from flax_weights import StateDict, Weights
from torch import Tensor

from pixelllm.models.centernet import CenterNetHead, SimplePyramid
from pixelllm.models.detector import Detector
from pixelllm.models.roi_heads import POOL_SIZE, RoiHeads

# Patterns of plain torch names, and ours.
NAMES = (
    (r"simfp_3\.0", "up"),
    (r"simfp_(\d)\.(\d)(\.norm)?", lambda m: f"laterals.{_lateral(*m.groups())}"),
    (r"top_block\.p6", "tops.0"),
    (r"top_block\.p7", "tops.1"),
    (r"bbox_tower", "tower"),
    (r"agn_hm", "heat"),
    (r"box_head\.", "heads."),
    (r"fc(\d)", lambda m: f"layers.{2 * int(m[1]) - 1}"),
    (r"cls_score", "object"),
    (r"bbox_pred(\.\d)?\.(weight|bias)$", lambda m: f"deltas{m[1] or '.0'}.{m[2]}"),
)


def _lateral(level: str, place: str, norm: str | None) -> str:
    """Level 4 counts its two convolutions from 0, the others from 1."""
    number = int(place) - (level != "4")
    return f"{int(level) - 3}.{2 * number + (norm is not None)}"


def detector_state(weights: Weights) -> StateDict:
    state: dict[str, Tensor] = {}
    scales = {}
    for path, value in weights.items():
        part, _, rest = path.partition("/")
        part = {"fpn": "pyramid", "proposal_generator": "head"}.get(part, part)
        key, tensor = next(iter(flax_weights.plain({rest: value}).items()))
        if rest.startswith("scales."):
            scales[int(re.search(r"\d+", rest)[0])] = tensor
            continue
        if rest == "simfp_3.0/kernel":
            tensor = torch.from_numpy(value[::-1, ::-1].transpose(2, 3, 0, 1).copy())
        if rest.endswith("fc1/kernel"):  # it reads (row, column, channel), ours channel first
            grid = np.reshape(value, (POOL_SIZE, POOL_SIZE, -1, value.shape[1]))
            tensor = torch.from_numpy(grid.transpose(3, 2, 0, 1).reshape(value.shape[::-1]).copy())
        if part == "head":
            key = key.replace("bbox_pred", "ltrb")
        for pattern, name in NAMES:
            key = re.sub(pattern, name, key)
        state[f"{part}.{key}"] = tensor
    state["head.scales"] = torch.cat([scales[level] for level in sorted(scales)])
    return state


def detector(weights: Weights, h: dict[str, Any], frame: int) -> Detector:
    """The detector of a `box_decoder*` case, or of a whole model's `box_decoder_args`."""
    fpn, thresholds = h["fpn_args"], h["roi_matching_threshold"]
    towers = [key for key in weights if re.search(r"bbox_tower/\d+/kernel", key)]
    model = Detector(
        SimplePyramid(
            weights["fpn/simfp_4.0/kernel"].shape[2],
            fpn["out_channels"],
            fpn["in_dim"] // 2,
            fpn.get("num_top_blocks", 2),
        ),
        CenterNetHead(
            fpn["out_channels"], weights[towers[0]].shape[-1], len(towers), len(h["strides"])
        ),
        RoiHeads(
            fpn["out_channels"],
            h["roi_fc_dims"],
            thresholds,
            h.get("roi_use_sigmoid_ce", False),
            h.get("roi_add_box_pred_layers", False),
        ),
        frame,
        strides=h["strides"],
        size_ranges=[tuple(map(float, bounds)) for bounds in h["fpn_range"]],
        heat_weight=h["hm_weight"],
        giou_weight=h["reg_weight"],
        train_limits=(h["pre_nms_topk_train"], h["post_nms_topk_train"]),
        test_limits=(h["pre_nms_topk_test"], h["post_nms_topk_test"]),
        proposal_iou=h["iou_thresh"],
        num_samples=h["roi_samples_per_image"],
        positive_fraction=h["roi_positive_fraction"],
        detection_iou=h["roi_nms_threshold"],
    )
    model.load_state_dict(detector_state(weights))
    return model.eval()
