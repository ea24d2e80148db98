"""PerceptionGPT of the sizes of official weights, and our names of those weights."""

from __future__ import annotations

import re

from conftest import part_of
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from pixelllm.markers import MarkerIds
from pixelllm.models.clip import FusedClip
from pixelllm.models.language import build_trunk
from pixelllm.models.mask_encoder import MaskEncoder
from pixelllm.models.perceptiongpt import PerceptionGPTNetwork
from pixelllm.models.vis_boxes import BoxDecoder, BoxEncoder
from pixelllm.models.vis_masks import VisMaskDecoder, VisMaskHead

FINE_PATCH = 8
NAMES = (
    (r"^merge_coef_lower$", "clip.coarse_weights"),
    (r"^merge_coef_higher$", "clip.fine_weights"),
    (r"^clip\.", "clip.vit."),
    (r"^model\.mm_projector\.", "projector."),
    (r"^(model|lm_head)\.", r"language.model.\1."),
    (r"^bbox_", "box_"),
    (r"^decoder_mapping\.", "mask_head.query."),
    (r"^visual_adaptor\.", "mask_head.adapter."),
    (r"^mask_decoder\.", "mask_head.decoder."),
)


def our_name(official: str) -> str:
    for pattern, ours in NAMES:
        official, count = re.subn(pattern, ours, official)
        if count:
            break
    stage = r"output_upscaling\.layer(\d)"
    return re.sub(stage, lambda m: f"output_upscaling.stages.{int(m[1]) - 1}", official)


def our_state(weights: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Weights by our names, those under `prefix` without it."""
    return part_of({our_name(key): value for key, value in weights.items()}, prefix)


def official_clip(
    weights: dict[str, Tensor], image_size: int, num_heads: int, fine_patch: int = FINE_PATCH
) -> FusedClip:
    """With official weights of CLIP alone."""
    width, _, patch, _ = weights["embeddings.patch_embedding.weight"].shape
    vit = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=len(weights["encoder.layers.0.mlp.fc1.bias"]),
            num_hidden_layers=sum(key.endswith("mlp.fc1.bias") for key in weights),
            num_attention_heads=num_heads,
            image_size=image_size,
            patch_size=patch,
        )
    )
    vit.load_state_dict(weights)
    return FusedClip(vit, fine_patch)


def official_mask_head(weights: dict[str, Tensor], num_heads: int) -> VisMaskHead:
    """With official projection, adapter and mask decoder."""
    mlp_width, width = weights["mask_decoder.transformer.layers.0.mlp.lin1.weight"].shape
    depth = sum(key.endswith("norm4.bias") for key in weights)
    decoder = VisMaskDecoder(width, depth, num_heads, mlp_width, release_positions=True)
    head = VisMaskHead(weights["decoder_mapping.weight"].shape[1], decoder)
    head.load_state_dict(our_state(weights, "mask_head."))
    return head


def official_markers(case: dict[str, Tensor]) -> MarkerIds:
    """Those of a case; it has no markers of phrases."""
    names = {"vis": "loc", "vis_start": "obj_vis_s", "vis_end": "obj_vis_e"}
    names |= {"image": "im_patch", "image_start": "im_start", "image_end": "im_end"}
    known = {ours: int(case[f"in.tok_{theirs}"]) for ours, theirs in names.items()}
    return MarkerIds(**known, text_start=-1, text_end=-1)


def official_network(case: dict[str, Tensor]) -> PerceptionGPTNetwork:
    """A whole network with the official weights of a `forward` case."""
    weights = part_of(case, "w.")
    vocab_size, width = weights["lm_head.weight"].shape
    trunk = build_trunk(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=len(weights["model.layers.0.mlp.up_proj.weight"]),
            num_hidden_layers=sum(key.endswith("up_proj.weight") for key in weights),
            num_attention_heads=int(case["in.llm_num_heads"]),
            rms_norm_eps=1e-6,
            pad_token_id=int(case["in.tok_pad"]),
            bos_token_id=int(case["in.tok_bos"]),
            eos_token_id=int(case["in.tok_eos"]),
        )
    )
    hidden = len(weights["bbox_encoder.layers.0.bias"])
    network = PerceptionGPTNetwork(
        official_clip(
            part_of(weights, "clip."), case["in.images"].shape[-1], int(case["in.clip_num_heads"])
        ),
        nn.Linear(weights["model.mm_projector.weight"].shape[1], width),
        trunk,
        BoxEncoder(width, hidden),
        BoxDecoder(width, hidden),
        MaskEncoder(width, case["in.masks"].shape[-1], bottleneck=8),
        official_mask_head(weights, int(case["in.mask_num_heads"])),
        official_markers(case),
    )
    last = f"clip.vit.encoder.layers.{len(network.clip.vit.encoder.layers)}."
    state = {
        key: value
        for key, value in our_state(weights).items()
        if not key.startswith((last, "clip.vit.post_layernorm."))  # nothing reads them
    }
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and all(key.startswith("mask_encoder.") for key in missing)
    return network
