"""The parts of PerceptionGPT from their configuration, with random or published weights."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PretrainedConfig

from pixelllm.markers import MarkerIds
from pixelllm.models.build import SpecialIds, build_language
from pixelllm.models.clip import FusedClip
from pixelllm.models.language import DecoderOnlyLanguage, Language
from pixelllm.models.mask_encoder import MaskEncoder
from pixelllm.models.perceptiongpt import PLACE_CHANNELS
from pixelllm.models.stem import ConvStem
from pixelllm.models.vis_boxes import BoxDecoder, BoxEncoder
from pixelllm.models.vis_masks import VisMaskDecoder, VisMaskHead
from pixelllm.perception_config import ClipConfig, PerceptionModelConfig
from pixelllm.weights import pretrained_source, refuse_misfits


def build_perception(
    config: PerceptionModelConfig,
    markers: MarkerIds,
    ids: SpecialIds,
    published: Collection[str],
    structure: PretrainedConfig | None = None,
) -> dict[str, object]:
    """The arguments of `PerceptionGPTNetwork`.

    Every part learns but the trunk under its LoRA factors, whose embeddings learn all the same;
    the release also freezes "clip.vit" and "projector" (`TrainConfig.frozen`).

    Args:
        markers, ids: of the tokenizer.
        published: "language" and "clip" where they start from the weights that `config` names.
        structure: of a trunk with random weights; None takes the sizes of `config`.
    """
    clip = build_clip(config.clip, "clip" in published)
    given = (config.clip.width, ids, "language" in published, structure)
    language = build_language(config.language, *given)
    if isinstance(language, DecoderOnlyLanguage):  # the network refuses others
        grow_vocabulary(language, max(markers) + 1)
        train_embeddings(language)
    width, vis = language.width, config.vis
    transformer = (vis.num_layers, vis.num_heads, vis.ff_width, vis.release_positions)
    mask_sizes = (vis.mask_size, vis.mask_bottleneck, vis.mixed_norms)
    return {
        "clip": clip,
        "projector": nn.Linear(clip.width, width),
        "language": language,
        "box_encoder": BoxEncoder(width, vis.box_hidden),
        "box_decoder": BoxDecoder(width, vis.box_hidden),
        "mask_encoder": MaskEncoder(width, *mask_sizes),
        "mask_head": VisMaskHead(width, VisMaskDecoder(clip.width, *transformer)),
        "markers": markers,
        "place_map": nn.Linear(PLACE_CHANNELS, width) if config.value_position else None,
    }


def build_clip(config: ClipConfig, pretrained: bool) -> FusedClip:
    """Of the given sizes, with the weights of that name or random ones.

    Raises ValueError where the sizes of the weights differ.
    """
    sizes = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ff_width,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }
    if pretrained and config.weights is not None:
        source, options = pretrained_source(config.weights)
        options |= {"dtype": torch.float32, "output_loading_info": True}
        options |= {"ignore_mismatched_sizes": True}  # which are listed below
        vit, misfits = CLIPVisionModel.from_pretrained(source, **options)
        found = {name: getattr(vit.config, name) for name in sizes}
        if wrong := [f"{k} is {v}, not {sizes[k]}" for k, v in found.items() if v != sizes[k]]:
            raise ValueError(f"model.clip: in {config.weights} {'; '.join(wrong)}")
        odd = [(key, *map(tuple, shapes)) for key, *shapes in sorted(misfits["mismatched_keys"])]
        # What is unexpected are the parts of CLIP that read text.
        refuse_misfits(config.weights, sorted(misfits["missing_keys"]), [], odd)
    else:
        vit = CLIPVisionModel(CLIPVisionConfig(**sizes))
    stem = ConvStem(config.width, config.patch_size) if config.conv_stem else None
    return FusedClip(vit, config.fine_patch, config.fuse_layers, stem)


def grow_vocabulary(language: DecoderOnlyLanguage, num_tokens: int) -> None:
    """Embeddings for at least so many tokens, in place; new ones start at the mean of the old."""
    model = language.model
    num_known = model.get_input_embeddings().num_embeddings
    if num_known >= num_tokens:
        return
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    language.vocab_size = num_tokens
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight[num_known:] = module.weight[:num_known].mean(0)


def train_embeddings(language: Language) -> None:
    """Let input and output embeddings learn beside LoRA factors, for the sake of the markers.

    They become float32, because small steps are lost in bfloat16; what the trunk reads keeps its
    precision.
    """
    embedding, head = language.model.get_input_embeddings(), language.model.get_output_embeddings()
    dtype = embedding.weight.dtype
    for module in (embedding, head):
        module.requires_grad_(True).float()
    embedding.register_forward_hook(lambda module, inputs, embedded: embedded.to(dtype))
