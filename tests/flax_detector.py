"""Our `Detector` of the sizes of a golden case, with its weights."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from pixelllm.models.centernet import CenterNetHead, SimplePyramid
from pixelllm.models.detector import Detector
from pixelllm.models.roi_heads import RoiHeads
from pixelllm.scenic import Tree, copy_state, model_state


def detector(weights: Tree, h: dict[str, Any], frame: int) -> Detector:
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
    whole = model_state({f"box_decoder/{path}": value for path, value in weights.items()})
    copy_state(nn.ModuleDict({"detector": model}), whole, "the case")
    return model.eval()
