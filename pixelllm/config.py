"""Configuration: plain nested dataclasses; the defaults are the paper's full-size model.

Sizes follow the reference of the official release (paper, section 4 and supplement). A recipe
(`pixelllm.recipes`) is a function that changes a base; every field can be set from the command
line by its dotted name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class SamConfig:
    """SAM's image encoder; the defaults are ViT-H."""

    table_size: int = 1024  # image side the position tables are stored for
    patch_size: int = 16
    width: int = 1280
    depth: int = 32
    num_heads: int = 16
    out_channels: int = 256
    window_size: int = 14
    global_blocks: tuple[int, ...] = (7, 15, 23, 31)
    conv_stem: bool = False  # a small convolutional stem instead of the linear patch embedding
    weights: str | None = None  # an official sam_vit_*.pth
    bfloat16: bool = False  # hold the frozen encoder in bfloat16
    half_features: bool = False  # round the frozen features to float16, the cache's precision


@dataclass(frozen=True)
class Eva02Config:
    """EVA02 through timm; the defaults are EVA02-L/14."""

    table_size: int = 224
    patch_size: int = 14
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    drop_path: float = 0.1
    interpolate_rope: bool = False  # the official model counts patches, whatever the image size
    conv_stem: bool = False
    weights: str | None = None  # a timm name with published weights, or a file of such
    structure: str | None = None  # of a file whose structure the sizes do not tell: a timm name
    # Hold the encoder in bfloat16, where it no longer learns. Its weights name caches, not this.
    bfloat16: bool = field(default=False, repr=False)
    half_features: bool = False


@dataclass(frozen=True)
class PromptConfig:
    """The prompt feature extractor."""

    width: int = 512
    num_layers: int = 6
    mlp_width: int = 2048
    num_heads: int = 8
    num_tokens: int = 32  # learned tokens per prompt
    output_width: int = 1024
    value_position: bool = False  # add a learned map of the positions to the image features
    box_octaves: int = 0  # add a learned map of so many octaves of waves of box centre and size
    from_sam: bool = False  # start from the two-way transformer of SAM's mask decoder
    grid_side: int = 0  # with from_sam: so many squared tokens start at the points of a grid
    eva02_share: float = 0.0  # with from_sam: how much of EVA02's features passes at the start


@dataclass(frozen=True)
class LanguageConfig:
    """The language model: published weights by `trunk`, else random ones of the given sizes."""

    trunk: str | None = "google/flan-t5-xl"  # Hub id or local folder; None: random weights
    architecture: Literal["t5", "git", "llama"] = "t5"  # of random weights
    tokenizer: str | None = None  # Hub id, for random weights; None trains one on the captions
    lora_rank: int = 32  # 0 trains the whole trunk
    lora_alpha: int = 64  # the update is scaled by alpha / rank
    lora_dropout: float = 0.0  # of what the update reads
    bfloat16: bool = False  # hold the trunk of `transformers` in bfloat16, LoRA in float32
    width: int = 2048
    num_encoder_layers: int = 24  # of a T5
    num_decoder_layers: int = 24
    num_heads: int = 32
    num_kv_heads: int | None = None  # of a llama whose heads share keys and values
    ff_width: int = 5120
    dropout: float = 0.1
    vocab_size: int = 32128  # upper bound where a tokenizer is trained
    tied: bool = True  # of a llama: words are read and written by one matrix

    def __post_init__(self) -> None:
        if self.trunk is None and self.architecture == "git" and self.lora_rank:
            whole = "the git decoder learns whole; leave it 0"
            raise ValueError(f"model.language.lora_rank is {self.lora_rank}, but {whole}")


@dataclass(frozen=True)
class PointConfig:
    """The MLP that regresses a pair of points for every token."""

    hidden: int = 512
    depth: int = 4


@dataclass(frozen=True)
class MaskConfig:
    """Segmentation: the gated adapter and SAM's mask decoder; the defaults are SAM's."""

    adapter_layers: int = 2
    num_layers: int = 2  # of the decoder's two-way transformer
    num_heads: int = 8
    mlp_width: int = 2048


@dataclass(frozen=True)
class DetectorConfig:
    """CenterNet2 on the fused features; the defaults are the release's but for the strides."""

    width: int = 256
    tower_layers: int = 4
    roi_width: int = 1024
    nominal_strides: bool = False  # as the release: 8, 16, ... whatever the size of the maps
    up_channels: int = 384  # of the finest level before its width
    num_sampled: int = 512  # proposals that train the second stage, per image


@dataclass(frozen=True)
class ModelConfig:
    """PixelLLM."""

    frame: int = 384  # images are resized to a longer side of `frame` and padded to a square
    sam: SamConfig = field(default_factory=SamConfig)
    eva02: Eva02Config = field(default_factory=Eva02Config)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    points: PointConfig = field(default_factory=PointConfig)
    masks: MaskConfig | None = None  # segments what it locates
    detector: DetectorConfig | None = None  # finds objects to caption itself

    def __post_init__(self) -> None:
        if self.frame % self.sam.patch_size:
            raise ValueError(
                f"frame {self.frame} is not a multiple of SAM's patch size {self.sam.patch_size}"
            )


@dataclass(frozen=True)
class Source:
    """Phrases of one task in the training mixture, with the losses they take part in."""

    task: str
    tables: str = "*"  # names of the tables it draws from, a glob
    weight: float = 1.0  # share of the batches, relative to the other sources
    window: tuple[float, float] = (0.0, 1.0)  # part of the training that draws the source
    batch_size: int | None = None  # images of a step; None is the recipe's
    phrases_per_image: int = 1  # drawn at random in training
    contexts: tuple[str, ...] = ("",)  # drawn at random in training; "{}" is the phrase's own
    in_turn: bool = False  # of PerceptionGPT: phrases are rounds of one conversation, in order
    every_word: bool = False  # an expression's box is asked of all its words, not only the last
    scale: tuple[float, float] | None = None  # random resize range, then a random crop
    mirror: float = 0.0  # with a scale: chance of left and right changing places
    text_weight: float = 1.0
    point_weight: float = 1.0
    mask_weight: float = 0.0
    detection_weight: float = 0.0  # above 0, phrases are asked at the detector's proposals
    proposals_per_image: int = 32  # of those

    def __post_init__(self) -> None:
        if self.mask_weight and self.detection_weight:
            weights = f"mask_weight {self.mask_weight}, detection_weight {self.detection_weight}"
            raise ValueError(
                f"source {self.task!r}: {weights}; proposals have no masks, so one must be 0"
            )
        if self.every_word and self.mask_weight:
            weights = f"every_word, mask_weight {self.mask_weight}"
            raise ValueError(
                f"source {self.task!r}: {weights}; a mask is that of the last word's box, "
                "so every_word must be off or the weight 0"
            )


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms. The official point weight is 0.1 on pixels of a 384 px frame."""

    text: float = 1.0
    point: float = 38.4  # on coordinates in units of the frame
    smoothing: float = 0.1
    mask: float = 1.0
    detection: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation; used by every stage."""

    steps: int = 10_000
    batch_size: int = 256  # images per step, over all accumulation steps
    accumulate: int = 1
    lr: float = 5e-5
    warmup: int = 250
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 0.0  # largest gradient norm; 0 does not clip
    bfloat16: bool = False
    recompute: bool = False  # activations of EVA02 and the trunk in the backward pass, not kept
    frozen: tuple[str, ...] = ("sam", "prompt_encoder")  # parameter name prefixes
    lr_scales: dict[str, float] = field(default_factory=dict)  # by parameter name prefix
    seed: int = 0
    workers: int = 0
    threads: int = 0  # CPU threads of torch; 0 leaves torch's choice
    log_every: int = 20
    eval_every: int = 500
    eval_batches: int = 8
    save_every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "eval_every",
                     "eval_batches", "save_every", "keep"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        for name in ("lr", "warmup", "weight_decay", "clip", "workers", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}"
            )


@dataclass(frozen=True)
class StartConfig:
    """Finished runs that a training run starts from."""

    sam: str | None = None  # of a `*-sam` recipe
    eva02: str | None = None  # of a `*-eva02` recipe
    run: str | None = None  # of a PixelLLM recipe: all weights
    eyes: str | None = None  # of one with another trunk: its encoders and extractor


@dataclass(frozen=True)
class Config:
    """One training run of PixelLLM."""

    name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    start: StartConfig = field(default_factory=StartConfig)
    sources: tuple[Source, ...] = ()
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    max_tokens: int = 128  # of the caption, begin and end included
    max_context: int = 8
    include_frozen: bool = False  # whether saved models carry their frozen pretrained parts

    def __post_init__(self) -> None:
        if rounds := [source.task for source in self.sources if source.in_turn]:
            raise ValueError(f"sources {rounds}: PixelLLM answers no phrases in turn (in_turn)")


@dataclass(frozen=True)
class SamPretraining:
    """One training run of a small SAM on promptable segmentation (SAM's own task)."""

    name: str
    frame: int
    sam: SamConfig
    num_layers: int = 2  # of the mask decoder's two-way transformer
    num_heads: int = 8
    mlp_width: int = 512
    prompts_per_image: int = 6
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Eva02Pretraining:
    """One training run of a small EVA02 that names the object under every patch."""

    name: str
    frame: int
    eva02: Eva02Config
    box_weight: float = 2.0
    train: TrainConfig = field(default_factory=TrainConfig)
