"""The named configurations: functions that change a base by a few lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pixelllm.config import (
    Config,
    Eva02Config,
    Eva02Pretraining,
    LanguageConfig,
    LossConfig,
    ModelConfig,
    PointConfig,
    PromptConfig,
    SamConfig,
    SamPretraining,
    Source,
    TrainConfig,
)

# The prompts of the official release (reference, section 7.4), with its spelling.
NARRATION_CONTEXTS = (
    "A long image caption: ",
    "A long image description: ",
    "Write a long description for the image. ",
    "Write a long description for the photo. ",
    "Provide a long description of what is presented in the photo. ",
    "Describe the content of the image in detail. ",
    "Can you in detail explain what you see in the image? ",
    "Could you use a few sentences to describe what you perceive in the photo? ",
    "Please provide a long depiction of the picture. ",
    "Using language, provide a long account of the image. ",
    "Use a few senetences to illustrate what is happening in the picture. ",
)
CAPTION_CONTEXTS = (
    "A short image caption: ",
    "A short image description: ",
    "A photo of ",
    "An image that shows ",
    "Write a short description for the image. ",
    "Write a description for the photo. ",
    "Provide a description of what is presented in the photo. ",
    "Briefly describe the content of the image. ",
    "Can you briefly explain what you see in the image? ",
    "Could you use a few words to describe what you perceive in the photo? ",
    "Please provide a short depiction of the picture. ",
    "Using language, provide a short account of the image. ",
    "Use a few words to illustrate what is happening in the picture. ",
)
REGION_CONTEXT = "an object of "

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
    """A small EVA02 that knows what and where the objects of scenes are: the other half."""
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


def ln_coco_t5xl() -> Config:
    """The paper's: Flan-T5-XL with LoRA on Localized Narratives and COCO captions."""
    return Config(
        name="ln-coco-t5xl",
        sources=(
            Source(
                "caption",
                weight=1,
                contexts=CAPTION_CONTEXTS,
                scale=(0.75, 1.25),
                point_weight=0.0,
            ),
            Source("narration", weight=2, contexts=NARRATION_CONTEXTS),
        ),
    )


RECIPES: dict[str, Callable[[], Config | SamPretraining | Eva02Pretraining]] = {
    "scenes-sam": scenes_sam,
    "scenes-eva02": scenes_eva02,
    "scenes-tiny": scenes_tiny,
    "scenes-small": scenes_small,
    "ln-coco-t5xl": ln_coco_t5xl,
}


def default_contexts(config: Config) -> tuple[str, str]:
    """Contexts for the whole image and for a box, where a user gives none."""
    whole = [source.contexts[0] for source in config.sources if source.task == "narration"]
    regions = [source.contexts[0] for source in config.sources if source.task == "region"]
    return (whole or [""])[0], (regions or [REGION_CONTEXT])[0]
