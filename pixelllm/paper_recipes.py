"""The stages of the published models, with Flan-T5-XL and with the BERT-size decoder.

Reference, section 9. `ln-coco` is the release's `trace`; a stage starts from the run named in its
`start`, by default in `runs/`. Where a stage draws from several corpora of one task, their tables
are told apart by their names: *flickr*, *vg*, *coco*.
"""

from __future__ import annotations

from dataclasses import replace

from pixelllm.config import (
    Config,
    DetectorConfig,
    LanguageConfig,
    MaskConfig,
    Source,
    StartConfig,
    TrainConfig,
)
from pixelllm.contexts import (
    CAPTION_CONTEXTS,
    NARRATION_CONTEXTS,
    QUESTION_CONTEXT,
    REFERRING_CONTEXT,
    REGION_CONTEXT,
)

BERT_TRUNK = LanguageConfig(
    trunk=None,
    architecture="git",
    tokenizer="google-bert/bert-base-uncased",
    lora_rank=0,
    width=768,
    num_decoder_layers=6,
    num_heads=12,
    ff_width=3072,
    vocab_size=30522,
)
CAPTIONS = Source("caption", contexts=CAPTION_CONTEXTS, scale=(0.75, 1.25), point_weight=0.0)
NARRATIONS = Source("narration", weight=2, contexts=NARRATION_CONTEXTS)
EXPRESSIONS = Source(
    "referring",
    contexts=(REFERRING_CONTEXT,),
    phrases_per_image=16,
    scale=(0.75, 1.25),
    text_weight=0.0,
)
REGIONS = Source(
    "region",
    contexts=(REGION_CONTEXT,),
    phrases_per_image=100,
    scale=(0.1, 2.0),
    mirror=0.5,
    point_weight=0.0,
    detection_weight=1.0,
)
QUESTIONS = Source(
    "question", weight=5, contexts=(QUESTION_CONTEXT,), phrases_per_image=16, point_weight=0.0
)
REFERRING_MIXTURE = (  # "mixed" boxes of Flickr30k, COCO and Visual Genome
    replace(EXPRESSIONS, tables="*flickr*"),
    replace(EXPRESSIONS, tables="*coco*", weight=5),
    replace(EXPRESSIONS, tables="*vg*"),
)
# Layer decay 0.8 of EVA02: block l of 24 learns at 0.8 ** (24 - l).
EVA02_DECAY = {
    **{f"eva02.encoder.vit.blocks.{block}": 0.8 ** (24 - block) for block in range(24)},
    "eva02.encoder.vit.patch_embed": 0.8**25,
    "eva02.encoder.vit.pos_embed": 0.8**25,
}
FROZEN = ("sam", "prompt_encoder")
READING = ("eva02", "extractor", "projection", "language")  # what segmentation leaves as it is


def ln_coco_t5xl() -> Config:
    """Flan-T5-XL with LoRA on Localized Narratives and COCO captions."""
    return Config(name="ln-coco-t5xl", sources=(CAPTIONS, NARRATIONS))


def ln_coco_bert() -> Config:
    """The BERT-size decoder on Localized Narratives and COCO captions."""
    return with_bert(ln_coco_t5xl())


def with_bert(config: Config) -> Config:
    """The same stage with the BERT-size decoder."""
    name = config.name.replace("t5xl", "bert")
    # This trunk projects the visual tokens itself.
    frozen = tuple(part for part in config.train.frozen if part != "projection")
    start, model = config.start, replace(config.model, language=BERT_TRUNK)
    if start.run is not None:
        start = replace(start, run=start.run.replace("t5xl", "bert"))
    train = replace(config.train, frozen=frozen)
    return replace(config, name=name, model=model, start=start, train=train)


def ref_t5xl() -> Config:
    """Referring localization, from ln-coco."""
    return replace(
        ln_coco_t5xl(),
        name="ref-t5xl",
        start=StartConfig(run="runs/ln-coco-t5xl"),
        sources=REFERRING_MIXTURE,
        train=TrainConfig(steps=120_000, batch_size=64, warmup=1000),
        max_tokens=40,
        max_context=40,
    )


def ref_bert() -> Config:
    """Referring localization with the BERT-size decoder."""
    return with_bert(ref_t5xl())


def refseg_t5xl() -> Config:
    """Referring segmentation, from ref: mask adapter and point head learn."""
    ref = ref_t5xl()
    return replace(
        ref,
        name="refseg-t5xl",
        model=replace(ref.model, masks=MaskConfig()),
        start=StartConfig(run="runs/ref-t5xl"),
        sources=(replace(EXPRESSIONS, mask_weight=1.0),),
        train=TrainConfig(
            steps=60_000,
            batch_size=64,
            warmup=500,
            frozen=(*FROZEN, "mask_head.decoder", *READING),
            lr_scales={"mask_head.adapter": 10.0},
        ),
    )


def refseg_bert() -> Config:
    """Referring segmentation with the BERT-size decoder."""
    return with_bert(refseg_t5xl())


def densecap_t5xl() -> Config:
    """Dense object captioning on Visual Genome, from ln-coco."""
    base = ln_coco_t5xl()
    return replace(
        base,
        name="densecap-t5xl",
        model=replace(base.model, detector=DetectorConfig()),
        start=StartConfig(run="runs/ln-coco-t5xl"),
        sources=(REGIONS,),
        train=TrainConfig(
            steps=40_000,
            batch_size=64,
            lr=1e-4,
            warmup=1000,
            weight_decay=0.05,
            frozen=(*FROZEN, "point_head"),
            lr_scales=EVA02_DECAY,
        ),
        max_tokens=40,
    )


def densecap_bert() -> Config:
    """Dense object captioning with the BERT-size decoder."""
    return replace(with_bert(densecap_t5xl()), sources=(replace(REGIONS, proposals_per_image=64),))


def joint_t5xl() -> Config:
    """One model for all tasks, conversations included."""
    base = ln_coco_t5xl()
    return replace(
        base,
        name="joint-t5xl",
        model=replace(base.model, detector=DetectorConfig()),
        sources=(
            replace(CAPTIONS, weight=3),
            replace(NARRATIONS, weight=1, phrases_per_image=16),
            *REFERRING_MIXTURE,
            replace(REGIONS, weight=5, phrases_per_image=16, proposals_per_image=16),
            QUESTIONS,
        ),
        train=TrainConfig(
            steps=240_000,
            batch_size=128,
            lr=1e-4,
            warmup=2000,
            weight_decay=0.05,
            lr_scales=EVA02_DECAY,
        ),
        max_context=32,
    )


def joint_bert() -> Config:
    """One model for all tasks with the BERT-size decoder."""
    return with_bert(joint_t5xl())


def joint_refseg_t5xl() -> Config:
    """The masks of joint: only the adapter before SAM's decoder learns."""
    joint = joint_t5xl()
    return replace(
        joint,
        name="joint-refseg-t5xl",
        model=replace(joint.model, masks=MaskConfig()),
        start=StartConfig(run="runs/joint-t5xl"),
        sources=(replace(EXPRESSIONS, point_weight=0.0, mask_weight=1.0),),
        train=TrainConfig(
            steps=30_000,
            batch_size=128,
            lr=1e-4,
            warmup=250,
            frozen=(*FROZEN, "mask_head.decoder", *READING, "point_head", "detector"),
        ),
    )


def joint_refseg_bert() -> Config:
    """The masks of joint with the BERT-size decoder."""
    return with_bert(joint_refseg_t5xl())
