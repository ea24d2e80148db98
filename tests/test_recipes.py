"""The named recipes: the paper's at full size on the meta device, the small ones coherent."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from pixelllm.config import Config
from pixelllm.contexts import CAPTION_CONTEXTS, NARRATION_CONTEXTS, default_contexts
from pixelllm.pretrained import PixelLLM, is_referenced
from pixelllm.recipes import RECIPES
from pixelllm.tokenizer import train_tokenizer
from pixelllm.training.optimizer import build_optimizer, freeze

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


@pytest.fixture(scope="module")
def paper() -> PixelLLM:
    with torch.device("meta"):
        model = PixelLLM(RECIPES["ln-coco-t5xl"](), TOKENIZER)
    freeze(model, model.config.train.frozen)
    return model


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


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
    config = RECIPES[name]()
    assert config.name == name
    with torch.device("meta"):
        model = PixelLLM(config, TOKENIZER)
    freeze(model, config.train.frozen)
    assert any(p.requires_grad for p in model.parameters())


def test_the_context_of_a_user_is_the_one_of_training():
    whole, region = default_contexts(RECIPES["ln-coco-t5xl"]())
    assert whole == NARRATION_CONTEXTS[0] and region == "an object of "
