"""The parts of PixelLLM from their configuration, with random or published weights."""

from __future__ import annotations

import difflib
from collections.abc import Collection

import timm
import torch
from torch import nn
from transformers import PretrainedConfig

from pixelllm.config import Eva02Config, LanguageConfig, ModelConfig, SamConfig
from pixelllm.models import eva02 as eva02_module
from pixelllm.models import sam as sam_module
from pixelllm.models.eva02 import Eva02Encoder, eva02, eva02_from_timm
from pixelllm.models.language import Language, add_lora, build_t5, build_trunk, load_trunk
from pixelllm.models.pixelllm import ImageBranch
from pixelllm.models.points import PointHead
from pixelllm.models.prompt import PromptFeatureExtractor
from pixelllm.models.sam import PromptEncoder, SamEncoder
from pixelllm.models.stem import ConvStem
from pixelllm.weights import load_sam_checkpoint

LORA_TARGETS = {"t5": ("q", "v"), "mt5": ("q", "v")}  # other trunks: q_proj, v_proj


def build_parts(
    config: ModelConfig, language: Language, published: Collection[str]
) -> dict[str, object]:
    """The arguments of `PixelLLMNetwork`.

    Args:
        published: "sam" and "eva02" where they start from the weights that `config` names.
    """
    grid = config.frame // config.sam.patch_size
    frame = (config.frame, config.frame)
    sam = build_sam_branch(config.sam, config.frame)
    prompt_encoder = PromptEncoder(config.sam.out_channels, (grid, grid), frame)
    if "sam" in published and config.sam.weights is not None:
        load_sam_checkpoint(config.sam.weights, sam.encoder, prompt_encoder)
    return {
        "eva02": build_eva02_branch(config.eva02, config.frame, "eva02" in published),
        "sam": sam,
        "prompt_encoder": prompt_encoder,
        "extractor": build_extractor(config),
        "projection": nn.Sequential(
            nn.Linear(config.prompt.output_width, language.width), nn.LayerNorm(language.width)
        ),
        "language": language,
        "point_head": PointHead(language.width, config.points.hidden, config.points.depth),
        "prompt_frame": config.frame,
    }


def build_sam_encoder(config: SamConfig) -> SamEncoder:
    stem = ConvStem(config.width, config.patch_size) if config.conv_stem else None
    return SamEncoder(
        image_size=config.table_size,
        patch_size=config.patch_size,
        width=config.width,
        depth=config.depth,
        num_heads=config.num_heads,
        out_channels=config.out_channels,
        window_size=config.window_size,
        global_blocks=config.global_blocks,
        stem=stem,
    )


def build_sam_branch(config: SamConfig, frame: int) -> ImageBranch:
    mean, std = sam_module.PIXEL_MEAN, sam_module.PIXEL_STD
    encoder = build_sam_encoder(config)
    if config.bfloat16:
        encoder.to(torch.bfloat16)
    return ImageBranch(encoder, mean, std, frame, config.half_features)


def build_eva02_encoder(config: Eva02Config, pretrained: bool = False) -> Eva02Encoder:
    """Of the given sizes, or timm's of the name `weights`. Raises ValueError where they differ."""
    if config.weights is not None:
        return _timm_eva02(config, pretrained)
    stem = ConvStem(config.width, config.patch_size) if config.conv_stem else None
    return eva02(
        image_size=config.table_size,
        patch_size=config.patch_size,
        width=config.width,
        depth=config.depth,
        num_heads=config.num_heads,
        drop_path=config.drop_path,
        interpolate_rope=config.interpolate_rope,
        stem=stem,
    )


def _timm_eva02(config: Eva02Config, pretrained: bool) -> Eva02Encoder:
    name = config.weights.split(".")[0]
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models("eva02*")))
        raise ValueError(f"model.eva02.weights: timm has no model {name!r}; nearest: {near}")
    encoder = eva02_from_timm(config.weights, pretrained, config.drop_path, config.interpolate_rope)
    vit = encoder.vit
    found = {
        "width": vit.embed_dim,
        "depth": len(vit.blocks),
        "patch_size": vit.patch_embed.patch_size[0],
    }
    wrong = [
        f"{k} is {v}, not {getattr(config, k)}" for k, v in found.items() if v != getattr(config, k)
    ]
    if wrong:
        raise ValueError(f"model.eva02: in {config.weights} the {'; the '.join(wrong)}")
    return encoder


def build_eva02_branch(config: Eva02Config, frame: int, pretrained: bool = False) -> ImageBranch:
    mean, std = eva02_module.PIXEL_MEAN, eva02_module.PIXEL_STD
    encoder = build_eva02_encoder(config, pretrained)
    return ImageBranch(encoder, mean, std, frame, config.half_features)


def build_extractor(config: ModelConfig) -> PromptFeatureExtractor:
    prompt = config.prompt
    return PromptFeatureExtractor(
        in_channels=config.eva02.width + config.sam.out_channels,
        prompt_width=config.sam.out_channels,
        width=prompt.width,
        depth=prompt.num_layers,
        num_outputs=prompt.num_tokens,
        output_width=prompt.output_width,
        num_heads=prompt.num_heads,
        mlp_width=prompt.mlp_width,
        value_position=prompt.value_position,
    )


def build_language(
    config: LanguageConfig, pretrained: bool, structure: PretrainedConfig | None = None
) -> Language:
    """The trunk, with LoRA where its rank is positive.

    Args:
        pretrained: take the weights of `config.trunk`.
        structure: of a trunk with random weights; None is a T5 of the sizes of `config`.
    """
    if pretrained and config.trunk is not None:
        language = load_trunk(config.trunk)
    elif structure is not None:
        language = build_trunk(structure)
    else:
        language = build_t5(
            vocab_size=config.vocab_size,
            width=config.width,
            num_encoder_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            num_heads=config.num_heads,
            ff=config.ff_width,
            dropout=config.dropout,
        )
    if config.lora_rank:
        targets = LORA_TARGETS.get(language.model.config.model_type, ("q_proj", "v_proj"))
        add_lora(language, config.lora_rank, config.lora_alpha, targets)
    return language
