"""The named recipes: the paper's at full size on the meta device, the small ones coherent."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch

from pixelllm.config import Config
from pixelllm.contexts import (
    CAPTION_CONTEXTS,
    NARRATION_CONTEXTS,
    QUESTION_CONTEXT,
    REFERRING_CONTEXT,
    REGION_CONTEXT,
    default_contexts,
)
from pixelllm.pretrained import PixelLLM, is_referenced
from pixelllm.recipes import RECIPES
from pixelllm.tokenizer import train_tokenizer
from pixelllm.training.optimizer import build_optimizer, freeze
from pixelllm.training.schedule import learning_rate

# Reference, section 0. The release's adapter has a dense output that nothing reads.
UNUSED_DENSE_OUTPUT = 525_312
TOKENIZER = train_tokenizer(["a caption"], 100)
COUNTS = {
    "eva02": 303_268_800,
    "sam": 637_026_048,
    "extractor": 44_030_720 - UNUSED_DENSE_OUTPUT,
    "projection": 2_103_296,
    "language": 2_868_631_552,
    "point_head": 1_582_600,
}
BERT_COUNTS = {"projection": 0, "language": 91_016_250, "point_head": 924_680}
PART_COUNTS = {"detector": 21_948_560, "mask_head.decoder": 4_058_340}
ADAPTER_COUNTS = {"t5xl": 4_349_568, "bert": 3_755_136}
LEARNED = {
    "ln-coco-t5xl": 369_859_784,
    "ref-t5xl": 369_859_784,
    "refseg-t5xl": 5_932_168,
    "densecap-t5xl": 390_225_744,
    "joint-t5xl": 391_808_344,
    "joint-refseg-t5xl": 4_349_568,
    "ln-coco-bert": 439_240_450,
    "ref-bert": 439_240_450,
    "refseg-bert": 4_679_816,
    "densecap-bert": 460_264_330,
    "joint-bert": 461_189_010,
    "joint-refseg-bert": 3_755_136,
}
FROZEN = {
    **dict.fromkeys(["ln-coco-t5xl", "ref-t5xl", "densecap-t5xl"], 3_486_785_024),
    **dict.fromkeys(["ln-coco-bert", "ref-bert", "densecap-bert"], 637_027_840),
    "refseg-t5xl": 3_859_120_548,
    "refseg-bert": 1_079_401_950,
}
# SAM's prompt encoder has a branch for mask prompts, which the release never makes; its random
# frequencies are no parameters of ours.
PROMPT_ENCODER_EXCESS = 4_684 - 256
# Reference, section 9.2: steps, batch, learning rate, warmup, decay, words, context.
SCHEDULES = {
    "ln-coco": (10_000, 256, 5e-5, 250, 0.0, 128, 8),
    "ref": (120_000, 64, 5e-5, 1000, 0.0, 40, 40),
    "refseg": (60_000, 64, 5e-5, 500, 0.0, 40, 40),
    "densecap": (40_000, 64, 1e-4, 1000, 0.05, 40, 8),
    "joint": (240_000, 128, 1e-4, 2000, 0.05, 128, 32),
    "joint-refseg": (30_000, 128, 1e-4, 250, 0.0, 128, 32),
}
CORPORA = {"*flickr*": 1, "*coco*": 5, "*vg*": 1}


@cache
def build(name: str) -> PixelLLM:
    """A recipe's model without memory for its weights, frozen as in training."""
    config = RECIPES[name]()
    with torch.device("meta"):
        model = PixelLLM(config, TOKENIZER)
    freeze(model, config.train.frozen)
    return model


@pytest.fixture(scope="module")
def paper() -> PixelLLM:
    return build("ln-coco-t5xl")


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def split_counts(model: PixelLLM) -> tuple[int, int]:
    """Learned and frozen parameters."""
    return tuple(
        count(p for p in model.parameters() if p.requires_grad is learned)
        for learned in (True, False)
    )


def test_the_paper_recipe_has_the_published_parameter_counts(paper):
    assert {name: count(getattr(paper, name).parameters()) for name in COUNTS} == COUNTS


def test_lora_adapts_queries_and_values_of_the_three_attentions(paper):
    """A target name too wide would also adapt the feed-forward layers; too narrow, no decoder."""
    factors = {n: p for n, p in paper.language.named_parameters() if "lora_" in n}
    assert len(factors) == 288 and count(factors.values()) == 18_874_368
    places = Counter()
    for name in factors:
        path = name.split(".")
        stack = next(part for part in path if part in ("encoder", "decoder"))
        attention = next(part for part in path if part.endswith("Attention"))
        places[stack, attention, path[path.index(attention) + 1]] += 1
    assert places == {
        (stack, attention, projection): 48  # two factors in each of 24 layers
        for stack, attention in (
            ("encoder", "SelfAttention"),
            ("decoder", "SelfAttention"),
            ("decoder", "EncDecAttention"),
        )
        for projection in ("q", "v")
    }


def test_the_head_of_the_paper_trunk_is_its_own(paper):
    t5 = paper.language.model
    assert t5.lm_head.weight is not t5.shared.weight
    assert t5.config.d_kv == 64


def test_the_paper_recipe_trains_what_the_release_trains(paper):
    """Reference, section 9.2 `trace`: EVA, adapter, projection, LoRA and point MLP learn."""
    trained = {n for n, p in paper.named_parameters() if p.requires_grad}
    parts = Counter(name.split(".")[0] for name in trained)
    assert set(parts) == {"eva02", "extractor", "projection", "language", "point_head"}
    assert all("lora_" in name for name in trained if name.startswith("language."))
    for part in ("eva02", "extractor", "projection", "point_head"):
        assert parts[part] == len(list(getattr(paper, part).parameters())), part
    assert count(p for p in paper.parameters() if p.requires_grad) == (
        369_859_784 - UNUSED_DENSE_OUTPUT
    )


def test_the_paper_optimizer_has_the_published_settings(paper):
    config = paper.config.train
    assert (config.lr, config.warmup, config.steps, config.batch_size) == (5e-5, 250, 10_000, 256)
    assert config.clip == 0  # the release does not clip
    optimizer = build_optimizer(paper, config)
    assert optimizer.defaults["betas"] == (0.9, 0.999) and optimizer.defaults["eps"] == 1e-8
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)


def test_the_paper_recipe_mixes_and_weighs_as_published():
    config = RECIPES["ln-coco-t5xl"]()
    assert (config.max_tokens, config.max_context) == (128, 8)
    assert {s.task: s.weight for s in config.sources} == {"caption": 1, "narration": 2}
    assert {s.task: s.point_weight for s in config.sources} == {"caption": 0.0, "narration": 1.0}
    assert {s.task: s.contexts for s in config.sources} == {
        "caption": CAPTION_CONTEXTS,
        "narration": NARRATION_CONTEXTS,
    }
    assert (config.loss.text, config.loss.smoothing) == (1.0, 0.1)
    assert config.loss.point == pytest.approx(0.1 * 384) and config.model.frame == 384


def test_a_saved_paper_model_carries_what_was_trained(paper):
    """With the frozen trunk in the file it would be 11 GB; without LoRA it would be useless."""
    carried = {n for n, _ in paper.named_parameters() if not is_referenced(n, paper.config)}
    trained = {n for n, p in paper.named_parameters() if p.requires_grad}
    assert trained <= carried
    assert {n for n in carried if n.startswith("language.")} == {
        n for n in trained if n.startswith("language.")
    }


@pytest.mark.parametrize("name", [n for n in RECIPES if isinstance(RECIPES[n](), Config)])
def test_every_recipe_builds_and_freezes(name: str):
    model = build(name)
    assert model.config.name == name
    assert any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", LEARNED)
def test_a_paper_stage_learns_the_published_number_of_parameters(name: str):
    learned, frozen = split_counts(build(name))
    extractor_learns = "refseg" not in name
    assert learned == LEARNED[name] - UNUSED_DENSE_OUTPUT * extractor_learns
    if name not in FROZEN:
        return
    expected = FROZEN[name] + PROMPT_ENCODER_EXCESS - UNUSED_DENSE_OUTPUT * (not extractor_learns)
    if name.startswith("densecap"):  # the release has no point head there; ours waits
        expected += count(build(name).point_head.parameters())
    assert frozen == expected


@pytest.mark.parametrize("trunk", ["t5xl", "bert"])
def test_the_parts_of_later_stages_have_the_published_counts(trunk: str):
    model = build(f"joint-refseg-{trunk}")
    for name, number in PART_COUNTS.items():
        assert count(model.get_submodule(name).parameters()) == number, name
    assert count(model.mask_head.adapter.parameters()) == ADAPTER_COUNTS[trunk]
    expected = {**COUNTS, **(BERT_COUNTS if trunk == "bert" else {})}
    assert {name: count(getattr(model, name).parameters()) for name in COUNTS} == expected


@pytest.mark.parametrize("name", LEARNED)
def test_a_paper_stage_has_the_published_schedule(name: str):
    stage, trunk = name.rsplit("-", 1)
    config = RECIPES[name]()
    train = config.train
    found = (train.steps, train.batch_size, train.lr, train.warmup, train.weight_decay)
    assert (*found, config.max_tokens, config.max_context) == SCHEDULES[stage]
    assert train.clip == 0 and config.model.frame == 384
    assert (config.model.language.trunk is None) == (trunk == "bert")
    start = {"ref": "ln-coco", "refseg": "ref", "densecap": "ln-coco", "joint-refseg": "joint"}
    run = f"runs/{start[stage]}-{trunk}" if stage in start else None
    assert config.start.run == run


@pytest.mark.parametrize("name", ["densecap-t5xl", "densecap-bert", "joint-t5xl", "joint-bert"])
def test_early_blocks_of_eva02_learn_slowly(name: str):
    """Layer decay 0.8; a prefix that fits nothing would leave a block at the full rate."""
    model = build(name)
    optimizer = build_optimizer(model, model.config.train)
    scales = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    found = {n: scales[id(p)] for n, p in model.named_parameters() if p.requires_grad}
    expected = {f"blocks.{block}": 0.8 ** (24 - block) for block in (0, 1, 10, 23)}
    for part, scale in {**expected, "patch_embed": 0.8**25, "pos_embed": 0.8**25}.items():
        start = f"eva02.encoder.vit.{part}"
        mine = {s for n, s in found.items() if n == start or n.startswith(start + ".")}
        assert list(mine) == pytest.approx([scale]), part
    assert {s for n, s in found.items() if not n.startswith("eva02.")} == {1.0}


def test_only_the_mask_adapter_learns_faster():
    for trunk in ("t5xl", "bert"):
        assert RECIPES[f"refseg-{trunk}"]().train.lr_scales == {"mask_head.adapter": 10.0}
        assert RECIPES[f"joint-refseg-{trunk}"]().train.lr_scales == {}


def test_a_schedule_warms_up_then_follows_a_cosine():
    train = RECIPES["ref-t5xl"]().train
    rates = [learning_rate(s, train.lr, train.warmup, train.steps) for s in (0, 500, 1000, 60_500)]
    assert rates == pytest.approx([0.0, 2.5e-5, 5e-5, 2.5e-5])


def test_referring_stages_mix_and_weigh_as_published():
    for name in ("ref-t5xl", "ref-bert"):
        sources = RECIPES[name]().sources
        assert {s.tables: s.weight for s in sources} == CORPORA
        for source in sources:
            assert (source.task, source.contexts) == ("referring", (REFERRING_CONTEXT,))
            assert (source.phrases_per_image, source.scale, source.mirror) == (16, (0.75, 1.25), 0)
            weights = (source.text_weight, source.point_weight, source.mask_weight)
            assert weights == (0.0, 1.0, 0.0)
    (masks,) = RECIPES["refseg-t5xl"]().sources
    assert (masks.text_weight, masks.point_weight, masks.mask_weight) == (0.0, 1.0, 1.0)
    (masks,) = RECIPES["joint-refseg-t5xl"]().sources
    assert (masks.text_weight, masks.point_weight, masks.mask_weight) == (0.0, 0.0, 1.0)


def test_dense_captions_mix_and_weigh_as_published():
    for trunk, proposals in (("t5xl", 32), ("bert", 64)):
        (source,) = RECIPES[f"densecap-{trunk}"]().sources
        assert (source.task, source.contexts) == ("region", (REGION_CONTEXT,))
        assert (source.phrases_per_image, source.proposals_per_image) == (100, proposals)
        assert (source.scale, source.mirror) == ((0.1, 2.0), 0.5)
        weights = (source.text_weight, source.point_weight, source.detection_weight)
        assert weights == (1.0, 0.0, 1.0)


def test_the_joint_stage_mixes_as_published():
    for name in ("joint-t5xl", "joint-bert"):
        sources = RECIPES[name]().sources
        referring = {s.tables: s.weight for s in sources if s.task == "referring"}
        others = {s.task: s.weight for s in sources if s.task != "referring"}
        assert referring == CORPORA
        assert others == {"caption": 3, "narration": 1, "region": 5, "question": 5}
        regions, questions = sources[-2:]
        assert (regions.phrases_per_image, regions.proposals_per_image) == (16, 16)
        assert questions.contexts == (QUESTION_CONTEXT,)
        assert (questions.text_weight, questions.point_weight) == (1.0, 0.0)


def test_the_context_of_a_user_is_the_one_of_training():
    whole, region = default_contexts(RECIPES["ln-coco-t5xl"]())
    assert whole == NARRATION_CONTEXTS[0] and region == "an object of "


def test_scenes_teach_perceptiongpt_names_before_relations():
    """Else it answers "left" and "smallest", and does not look for a "red car", or "car"."""
    recipe = RECIPES["scenes-perceptiongpt"]()
    first = [source for source in recipe.sources if source.window[0] == 0]
    later = [source for source in recipe.sources if source.window[1] == 1]
    assert {(s.task, s.tables, s.mask_weight) for s in first} == {
        ("region", "*named*", 0.0),
        ("referring", "*named*", 0.0),
        ("referring", "*kinds*", 0.0),
    }
    assert {s.task for s in later} == {"region", "grounded", "question", "referring"}
    assert [s.tables for s in later if s.mask_weight] == ["*referring*"]
    assert {s.window[1] for s in first} == {s.window[0] for s in later}


@pytest.mark.parametrize("recipe", ["scenes-joint", "scenes-joint-long"])
def test_kinds_are_located_and_not_described(recipe: str):
    """Their regions are called "red boat" where the others are "a small red boat"."""
    sources = RECIPES[recipe]().sources
    tables = {(source.task, source.tables) for source in sources}
    assert tables == {
        ("narration", "*"),
        ("region", "*regions*"),
        ("referring", "*referring*"),
        ("referring", "*kinds*"),
        ("referring", "*attributes*"),
    }


def test_the_long_recipe_goes_on_with_all_sources_at_once():
    joint, long = RECIPES["scenes-joint"](), RECIPES["scenes-joint-long"]()
    assert long.start.run == "runs/joint" and long.model == joint.model
    assert {source.window for source in long.sources} == {(0.0, 1.0)}
    assert {source.window for source in joint.sources} != {(0.0, 1.0)}
    masks = RECIPES["scenes-joint-long-refseg"]()
    assert masks.name == "scenes-joint-long-refseg" and masks.start.run == "runs/joint-long"
