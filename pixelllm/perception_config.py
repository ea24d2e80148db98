"""Configuration of PerceptionGPT; the defaults are the released 7B model (reference, 1 and 3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pixelllm.config import LanguageConfig, Source, TrainConfig

PUBLISHED = ("language", "clip")  # parts whose weights a config can name
VisInput = Literal["box", "mask", "random"]
BoxForm = Literal["vis", "numbers", "tokens"]


@dataclass(frozen=True)
class ClipConfig:
    """CLIP's image encoder; the defaults are ViT-L/14 at 224 pixels."""

    image_size: int = 224  # that the position table is stored for
    patch_size: int = 14
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    ff_width: int = 4096
    fine_patch: int = 8  # of the pass that feeds the mask decoder
    fuse_layers: bool = True  # otherwise the last state alone, the paper's baseline
    conv_stem: bool = False  # a small convolutional stem instead of the linear patch embedding
    weights: str | None = "openai/clip-vit-large-patch14"  # Hub id or local folder


@dataclass(frozen=True)
class VisConfig:
    """What `<vis>` is encoded from and decoded to."""

    form: BoxForm = "vis"  # or boxes in the text, the paper's baselines (`pixelllm.box_text`)
    read: VisInput = "box"  # what of an object the language model reads, the release's choice
    box_hidden: int = 512
    mask_size: int = 256  # side of the masks that are encoded and compared
    mask_bottleneck: int = 512
    num_layers: int = 2  # of the mask decoder's two-way transformer
    num_heads: int = 8
    ff_width: int = 2048
    release_positions: bool = False  # the release's position code in the mask decoder
    mixed_norms: bool = False  # the release's batch norms in every second block of the mask encoder


@dataclass(frozen=True)
class PerceptionModelConfig:
    """PerceptionGPT."""

    frame: int = 224  # side of the padded square that is seen
    value_position: bool = False  # add a map of every visual token's place to it
    clip: ClipConfig = field(default_factory=ClipConfig)
    vis: VisConfig = field(default_factory=VisConfig)
    language: LanguageConfig = field(
        default_factory=lambda: LanguageConfig(
            trunk="lmsys/vicuna-7b-v1.1",
            architecture="llama",
            lora_rank=16,
            lora_alpha=64,
            lora_dropout=0.1,
            width=4096,
            num_decoder_layers=32,
            num_heads=32,
            ff_width=11008,
            vocab_size=32000,
            tied=False,
        )
    )

    def __post_init__(self) -> None:
        for name in ("patch_size", "fine_patch"):
            patch = getattr(self.clip, name)
            if self.frame % patch:
                raise ValueError(f"frame {self.frame} is not a multiple of clip.{name} {patch}")


@dataclass(frozen=True)
class PerceptionLoss:
    """Weights of the terms (reference, section 4), beside those of a source."""

    text: float = 1.0
    l1: float = 1.0
    giou: float = 1.0
    bce: float = 1.0
    dice: float = 1.0
    centre_reading: bool = False  # corners read as centre and size for the IoU, as released
    whole_batch_dice: bool = False  # one Dice of all masks of a batch, as released


@dataclass(frozen=True)
class PerceptionStart:
    """Finished runs that a training run starts from."""

    clip: str | None = None  # of a `*-clip` recipe
    run: str | None = None  # of a PerceptionGPT recipe: all weights


@dataclass(frozen=True)
class PerceptionConfig:
    """One training run of PerceptionGPT.

    Of the sources, tasks, shares, wordings (`contexts`), phrases per image and the weights of text,
    boxes ("point") and masks count; the phrases of an image share it (`chats.share_image`).
    """

    name: str
    model: PerceptionModelConfig = field(default_factory=PerceptionModelConfig)
    start: PerceptionStart = field(default_factory=PerceptionStart)
    sources: tuple[Source, ...] = ()
    loss: PerceptionLoss = field(default_factory=PerceptionLoss)
    train: TrainConfig = field(default_factory=TrainConfig)
    max_tokens: int = 2048  # of a conversation, image included
    max_new_tokens: int = 128  # of an answer
    include_frozen: bool = False  # whether saved models carry their frozen pretrained parts


def named_parts(config: PerceptionConfig) -> list[str]:
    """Published parts that saved models name the source of: those that do not learn."""
    if config.include_frozen:
        return []
    language, clip = config.model.language, config.model.clip
    is_named = {
        "language": language.trunk is not None and language.lora_rank > 0,
        "clip": clip.weights is not None and "clip.vit" in config.train.frozen,
    }
    return [part for part in PUBLISHED if is_named[part]]


@dataclass(frozen=True)
class ClipPretraining:
    """One training run of a small CLIP encoder that names the object under every patch."""

    name: str
    frame: int
    clip: ClipConfig
    box_weight: float = 2.0
    train: TrainConfig = field(default_factory=TrainConfig)
