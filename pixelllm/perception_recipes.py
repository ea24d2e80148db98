"""Recipes of PerceptionGPT: the released run, one behind SmolLM2, and one for procedural scenes.

Reference of PerceptionGPT, section 6.1. Differences of the released run: Vicuna is where it starts,
not LLaVA, and the learning rate falls as PixelLLM's does.
"""

from __future__ import annotations

from dataclasses import replace

from pixelllm import templates
from pixelllm.config import LanguageConfig, Source, TrainConfig
from pixelllm.perception_config import (
    ClipConfig,
    ClipPretraining,
    PerceptionConfig,
    PerceptionLoss,
    PerceptionModelConfig,
    PerceptionStart,
    VisConfig,
)
from pixelllm.scene_recipes import SMOLLM2, TINY_PRETRAINING

TINY_CLIP = ClipConfig(
    image_size=160,
    patch_size=16,
    width=128,
    depth=5,  # the last block is not read
    num_heads=4,
    ff_width=384,
    fine_patch=8,
    conv_stem=True,
    weights=None,
)
DESCRIBED = Source("region", phrases_per_image=8, contexts=templates.DESCRIBE)
GROUNDED = Source("grounded", contexts=templates.GROUND)
ASKED = Source("question", weight=4, phrases_per_image=8, contexts=templates.SHORT_ANSWER)
LOCATED = Source("referring", weight=2, phrases_per_image=8, contexts=templates.LOCATE)
# A mask takes as long to learn from as all the rest of a conversation: fewer are asked for.
SEGMENTED = Source(
    "referring",
    tables="*referring*",
    phrases_per_image=2,
    contexts=templates.SEGMENT,
    mask_weight=2.0,
)

POINTED = Source("pointed", phrases_per_image=8, contexts=templates.POINT)
CAPTIONED = Source("caption", contexts=templates.CAPTION)
# A question may be about what was said before: rounds of one conversation.
DISCUSSED = Source(
    "question",
    tables="*talks*",
    phrases_per_image=16,
    contexts=(*templates.CONVERSE, templates.SHORT_ANSWER[0]),
    in_turn=True,
)


def names_first(share: float) -> tuple[Source, ...]:
    """Regions and their names, both ways, until `share` of the training, then all tasks.

    What "left" and "smallest" mean is sooner learnt than what a name does, and where both are asked
    for from the start, names are not. Of a name, the colour is learnt and mostly enough: hence
    kinds alone as well. The table of the regions (`data.visual_genome --expressions`) has "named"
    in its name, that of kinds (`data.coco --expressions supercategory`) "kinds", and that of
    expressions with masks "referring".
    """
    described = replace(DESCRIBED, tables="*named*")  # the kinds have regions as well
    names = (
        described,
        replace(LOCATED, tables="*named*", weight=1),
        replace(LOCATED, tables="*kinds*"),
    )
    tasks = (replace(described, weight=2), GROUNDED, ASKED, LOCATED, SEGMENTED)
    return (
        *(replace(source, window=(0.0, share)) for source in names),
        *(replace(source, window=(share, 1.0)) for source in tasks),
    )


def perceptiongpt_7b() -> PerceptionConfig:
    """PerceptionGPT as released: Vicuna-7B on the merged RefCOCO expressions."""
    model = PerceptionModelConfig()
    return PerceptionConfig(
        name="perceptiongpt-7b",
        model=replace(model, language=replace(model.language, bfloat16=True)),
        sources=(Source("referring", contexts=templates.SEGMENT, mask_weight=1.0),),
        train=TrainConfig(
            steps=50_200,  # 10 epochs of 321,327 expressions
            batch_size=64,
            lr=2e-5,
            warmup=100,
            betas=(0.9, 0.95),
            clip=1.0,
            bfloat16=True,
            recompute=True,
            frozen=("clip.vit",),  # the projector, there LLaVA's and frozen, starts anew here
            seed=42,
        ),
    )


def perceptiongpt_7b_all() -> PerceptionConfig:
    """Every task at once, from the released run: captions and talks too."""
    released = perceptiongpt_7b()
    return replace(
        released,
        name="perceptiongpt-7b-all",
        start=PerceptionStart(run="runs/perceptiongpt-7b"),
        sources=(
            *(replace(source, weight=3) for source in released.sources),
            replace(DESCRIBED, phrases_per_image=16),
            GROUNDED,
            CAPTIONED,
            POINTED,
            replace(DISCUSSED, tables="*", weight=2),
        ),
    )


def perceptiongpt_smollm2() -> PerceptionConfig:
    """PerceptionGPT with SmolLM2-135M behind the eyes of scenes-clip."""
    tiny = scenes_perceptiongpt()
    language = replace(SMOLLM2, lora_alpha=64, lora_dropout=0.1)
    return replace(
        tiny,
        name="perceptiongpt-smollm2",
        model=replace(tiny.model, language=language),
        train=replace(tiny.train, batch_size=8, lr=1e-3, bfloat16=True),
        max_tokens=768,
    )


def scenes_clip() -> ClipPretraining:
    """A small CLIP that names objects: the eyes of scenes-perceptiongpt."""
    train = replace(TINY_PRETRAINING, steps=6000)
    return ClipPretraining(name="scenes-clip", frame=160, clip=TINY_CLIP, train=train)


def scenes_perceptiongpt() -> PerceptionConfig:
    """PerceptionGPT on scenes, its trunk from random weights."""
    return PerceptionConfig(
        name="scenes-perceptiongpt",
        model=PerceptionModelConfig(
            frame=160,
            value_position=True,
            clip=TINY_CLIP,
            vis=VisConfig(
                box_hidden=128, mask_size=160, mask_bottleneck=64, num_heads=4, ff_width=256
            ),
            language=LanguageConfig(
                trunk=None,
                architecture="llama",
                lora_rank=0,
                width=128,
                num_decoder_layers=4,
                num_heads=4,
                ff_width=384,
                dropout=0.0,
                vocab_size=512,
            ),
        ),
        start=PerceptionStart(clip="runs/scenes-clip"),
        sources=names_first(0.12),
        loss=PerceptionLoss(l1=10.0),
        train=TrainConfig(
            steps=20_000,
            batch_size=16,
            lr=5e-4,
            warmup=100,
            weight_decay=0.01,
            betas=(0.9, 0.98),
            clip=1.0,
            frozen=("clip.vit",),  # it comes trained
            eval_every=500,
            eval_batches=4,
            save_every=500,
        ),
        max_tokens=512,
        max_new_tokens=96,
        include_frozen=True,
    )


def scenes_perceptiongpt_all() -> PerceptionConfig:
    """Captions and conversations besides; the tables of these are *talks*."""
    base = scenes_perceptiongpt()
    return replace(
        base,
        name="scenes-perceptiongpt-all",
        start=PerceptionStart(run="runs/scenes-perceptiongpt"),
        sources=(
            replace(DESCRIBED, tables="*named*"),
            GROUNDED,
            replace(ASKED, tables="*questions*", weight=2),
            LOCATED,
            SEGMENTED,
            CAPTIONED,
            replace(DISCUSSED, weight=2),
            replace(POINTED, weight=6),
        ),
        train=replace(base.train, steps=7500),
    )
