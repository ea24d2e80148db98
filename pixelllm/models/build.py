"""The parts of PixelLLM from their configuration, with random or published weights."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from pixelllm.config import Eva02Config, LanguageConfig, ModelConfig, SamConfig
from pixelllm.models import eva02 as eva02_module
from pixelllm.models import sam as sam_module
from pixelllm.models.centernet import CenterNetHead, SimplePyramid
from pixelllm.models.detector import Detector
from pixelllm.models.eva02 import Eva02Encoder, eva02, eva02_from_timm, load_eva02_file
from pixelllm.models.git import GitDecoder
from pixelllm.models.language import Language, add_lora, build_t5, build_trunk, load_trunk
from pixelllm.models.masks import MaskAdapter, MaskHead
from pixelllm.models.pixelllm import ImageBranch
from pixelllm.models.points import PointHead
from pixelllm.models.prompt import PromptFeatureExtractor
from pixelllm.models.roi_heads import RoiHeads
from pixelllm.models.sam import MaskDecoder, PromptEncoder, SamEncoder
from pixelllm.models.stem import ConvStem
from pixelllm.weights import load_sam_checkpoint


class SpecialIds(NamedTuple):
    """Token ids of padding, the begin and the end of a caption."""

    pad_id: int
    bos_id: int
    eos_id: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> SpecialIds:
        """Captions begin with padding, as T5's do, where the tokenizer has no begin token."""
        begin = tokenizer.pad_token_id if tokenizer.bos_token is None else tokenizer.bos_token_id
        return cls(tokenizer.pad_token_id, begin, tokenizer.eos_token_id)


NOMINAL_STRIDES = (8, 16, 32, 64, 128)  # the release's, whatever the maps


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
    mask_head = build_mask_head(config, language)
    if "sam" in published and config.sam.weights is not None:
        decoder = None if mask_head is None else mask_head.decoder
        load_sam_checkpoint(config.sam.weights, sam.encoder, prompt_encoder, decoder)
    return {
        "eva02": build_eva02_branch(config.eva02, config.frame, "eva02" in published),
        "sam": sam,
        "prompt_encoder": prompt_encoder,
        "extractor": build_extractor(config),
        "projection": build_projection(config, language),
        "language": language,
        "point_head": PointHead(language.width, config.points.hidden, config.points.depth),
        "prompt_frame": config.frame,
        "mask_head": mask_head,
        "detector": build_detector(config),
    }


def build_projection(config: ModelConfig, language: Language) -> nn.Module:
    if isinstance(language, GitDecoder):
        return nn.Identity()  # it projects visual tokens itself
    return nn.Sequential(
        nn.Linear(config.prompt.output_width, language.width), nn.LayerNorm(language.width)
    )


def build_mask_head(config: ModelConfig, language: Language) -> MaskHead | None:
    masks, width = config.masks, config.sam.out_channels
    if masks is None:
        return None
    is_git = isinstance(language, GitDecoder)
    prefix_width = config.prompt.output_width if is_git else language.width
    transformer = (masks.num_heads, masks.mlp_width)
    return MaskHead(
        MaskAdapter(prefix_width, language.width, width, masks.adapter_layers, *transformer),
        MaskDecoder(width, masks.num_layers, *transformer),
    )


def build_detector(config: ModelConfig) -> Detector | None:
    sizes = config.detector
    if sizes is None:
        return None
    in_channels = config.eva02.width + config.sam.out_channels
    return Detector(
        SimplePyramid(in_channels, sizes.width, sizes.up_channels),
        CenterNetHead(sizes.width, sizes.width, sizes.tower_layers),
        RoiHeads(sizes.width, (sizes.roi_width, sizes.roi_width)),
        config.frame,
        strides=NOMINAL_STRIDES if sizes.nominal_strides else None,
        num_samples=sizes.num_sampled,
    )


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
        hold_in_bfloat16(encoder)
    return ImageBranch(encoder, mean, std, frame, config.half_features)


def build_eva02_encoder(config: Eva02Config, pretrained: bool = False) -> Eva02Encoder:
    """Of the given sizes, or timm's of the name `structure` or `weights`.

    Raises ValueError where they differ, OSError and ValueError as `load_eva02_file`.
    """
    is_file = config.weights is not None and Path(config.weights).is_file()
    name = config.structure or (None if is_file else config.weights)
    if config.structure is not None and config.weights is not None and not is_file:
        raise FileNotFoundError(f"model.eva02.weights: {config.weights}: no such file")
    if name is None:
        encoder = _eva02_of_sizes(config)
    else:
        encoder = _timm_eva02(config, name, pretrained and not is_file)
    if is_file and pretrained:
        load_eva02_file(config.weights, encoder)
    return encoder


def _eva02_of_sizes(config: Eva02Config) -> Eva02Encoder:
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


def _timm_eva02(config: Eva02Config, name: str, pretrained: bool) -> Eva02Encoder:
    stem = name.split(".")[0]
    if not timm.is_model(stem):
        near = ", ".join(difflib.get_close_matches(stem, timm.list_models("eva02*")))
        raise ValueError(
            f"model.eva02.weights: {name!r} is neither a file nor a model of timm; nearest: {near}"
        )
    encoder = eva02_from_timm(name, pretrained, config.drop_path, config.interpolate_rope)
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
        raise ValueError(f"model.eva02: in {name} the {'; the '.join(wrong)}")
    return encoder


def build_eva02_branch(config: Eva02Config, frame: int, pretrained: bool = False) -> ImageBranch:
    mean, std = eva02_module.PIXEL_MEAN, eva02_module.PIXEL_STD
    encoder = build_eva02_encoder(config, pretrained)
    if config.bfloat16:
        hold_in_bfloat16(encoder)
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
        box_octaves=prompt.box_octaves,
    )


def build_language(
    config: LanguageConfig,
    prefix_width: int,
    ids: SpecialIds,
    pretrained: bool,
    structure: PretrainedConfig | None = None,
) -> Language:
    """The trunk, with LoRA where its rank is positive.

    Args:
        prefix_width: of the visual tokens, for a trunk that projects them itself.
        ids: the end of captions, and all of them for random weights without a structure.
        pretrained: take the weights of `config.trunk`.
        structure: of a trunk with random weights; None takes the sizes of `config`.
    """
    if pretrained and config.trunk is not None:
        dtype = torch.bfloat16 if config.bfloat16 else torch.float32
        language = load_trunk(config.trunk, dtype)
    elif structure is not None:
        language = build_trunk(structure)
    elif config.architecture == "git":
        sizes = (config.width, config.num_decoder_layers, config.num_heads, config.ff_width)
        language = GitDecoder(
            config.vocab_size, prefix_width, *sizes, dropout=config.dropout, **ids._asdict()
        )
    elif config.architecture == "llama":
        language = build_trunk(_llama(config, ids))
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
    language.eos_id = ids.eos_id  # what captions end with; a trunk's file may list several
    if config.bfloat16 and not isinstance(language, GitDecoder):
        hold_in_bfloat16(language.model)
    if config.lora_rank:
        factors = (config.lora_rank, config.lora_alpha, lora_targets(language), config.lora_dropout)
        add_lora(language, *factors)
        for name, parameter in language.named_parameters():
            if "lora_" in name:  # it learns, so it is float32 beside any trunk
                parameter.data = parameter.data.float()
    return language


def lora_targets(language: Language) -> Sequence[str]:
    """The linear layers that LoRA changes: queries and values, or the layer that makes both."""
    name = language.model.config.model_type
    if any(path.endswith("q_proj") for path, _ in language.model.named_modules()):
        return ("q_proj", "v_proj")
    if name in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:  # ("q", "v") of T5
        return TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[name]
    raise ValueError(f"LoRA on {name}: no layers called q_proj; train it whole (lora_rank 0)")


@torch.no_grad()
def hold_in_bfloat16(module: nn.Module) -> None:
    """Cast the parameters but those of batch norms; buffers are frequencies and statistics."""
    for part in module.modules():
        if not isinstance(part, nn.BatchNorm2d):
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.bfloat16()


def _llama(config: LanguageConfig, ids: SpecialIds) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.ff_width,
        num_hidden_layers=config.num_decoder_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        # At the usual 0.02 a narrow model begins by attending to everything alike.
        initializer_range=config.width**-0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},  # hundreds of visual tokens
        tie_word_embeddings=config.tied,  # what is seen and its name then meet in one space
        pad_token_id=ids.pad_id,
        bos_token_id=ids.bos_id,
        eos_token_id=ids.eos_id,
    )
