"""The parts of PixelLLM from their configuration, with random weights."""

from __future__ import annotations

from torch import nn

from pixelllm.config import Eva02Config, LanguageConfig, ModelConfig, SamConfig
from pixelllm.models import eva02 as eva02_module
from pixelllm.models import sam as sam_module
from pixelllm.models.eva02 import Eva02Encoder, eva02
from pixelllm.models.language import Language, add_lora, build_t5, load_trunk
from pixelllm.models.pixelllm import ImageBranch
from pixelllm.models.points import PointHead
from pixelllm.models.prompt import PromptFeatureExtractor
from pixelllm.models.sam import PromptEncoder, SamEncoder
from pixelllm.models.stem import ConvStem

LORA_TARGETS = {"t5": ("q", "v"), "mt5": ("q", "v")}  # other trunks: q_proj, v_proj


def build_parts(config: ModelConfig, language: Language) -> dict[str, object]:
    """The arguments of `PixelLLMNetwork`."""
    grid = config.frame // config.sam.patch_size
    frame = (config.frame, config.frame)
    return {
        "eva02": build_eva02_branch(config.eva02, config.frame),
        "sam": build_sam_branch(config.sam, config.frame),
        "prompt_encoder": PromptEncoder(config.sam.out_channels, (grid, grid), frame),
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
    return ImageBranch(build_sam_encoder(config), mean, std, frame, config.half_features)


def build_eva02_encoder(config: Eva02Config) -> Eva02Encoder:
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


def build_eva02_branch(config: Eva02Config, frame: int) -> ImageBranch:
    mean, std = eva02_module.PIXEL_MEAN, eva02_module.PIXEL_STD
    return ImageBranch(build_eva02_encoder(config), mean, std, frame, config.half_features)


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


def build_language(config: LanguageConfig, pretrained: bool) -> Language:
    """The trunk, with LoRA where its rank is positive.

    Args:
        pretrained: take the weights of `config.trunk`; False builds the T5 of the given sizes.
    """
    if pretrained and config.trunk is not None:
        language = load_trunk(config.trunk)
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
