"""The published models run here: forward, a training step, captions, within stated memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_config

from benchmarks import full_size
from benchmarks.full_size import Options, measure
from pixelllm.config import Config
from pixelllm.loading import held_in
from pixelllm.pretrained import PixelLLM

# GiB of a whole process; measured ones are in docs/full_size.md.
LIMITS = {"forward": 20, "train": 20, "save": 12, "caption": 12, "caption-int8": 7}


def tiny_recipe(model: str) -> Config:
    """The tiny recipe in place of a published one, with LoRA on the T5 and none on the other."""
    is_t5 = model == "t5xl"
    config = make_tiny_config(include_frozen=True)
    language = replace(
        config.model.language,
        architecture="t5" if is_t5 else "git",
        lora_rank=2 if is_t5 else 0,
        bfloat16=True,
    )
    train = replace(config.train, frozen=("sam", "prompt_encoder"), bfloat16=True, recompute=True)
    return replace(config, model=replace(config.model, language=language), train=train)


@pytest.mark.parametrize("model", ["t5xl", "bert"])
def test_every_part_runs_with_a_tiny_recipe(model: str, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(full_size, "recipe", tiny_recipe)
    options = Options(model=model, tokens=3, folder=tmp_path)
    assert full_size.forward(options, {})["finite"]
    facts = full_size.train(options, {})
    assert 0 < facts["learned"] < facts["parameters"]
    assert facts["learned"] == facts["with_gradient"] == facts["with_moments"]
    full_size.save(options, {})
    times: dict[str, float] = {}
    assert full_size.caption(options, False, times)["log_prob"] < 0
    assert list(times) == ["load", "encoders", "3 tokens"]


def test_drawn_weights_keep_the_variance():
    """Standard normal weights would overflow after a few of 24 blocks."""
    model = full_size.build(held_in(tiny_recipe("t5xl"), torch.bfloat16))
    assert isinstance(model, PixelLLM)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and parameter.numel() > 1000:
            spread = float(parameter.detach().float().std()) * parameter.shape[-1] ** 0.5
            assert spread == pytest.approx(1, rel=0.1), name


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bert", "t5xl"])
def test_a_published_model_fits(model: str, tmp_path: Path):
    """Every part in a fresh process, `save` before the captions that load what it wrote."""
    options = Options(model=model, tokens=4, folder=tmp_path)
    for part, limit in LIMITS.items():
        if part == "caption-int8":
            if model == "bert":  # whose trunk is small
                continue
            pytest.importorskip("torchao")
        found = measure(part, options)
        print(model, found)
        assert found["memory"] <= limit, part
        if part == "forward":
            assert found["finite"]
        if part == "train":  # frozen parts have neither gradients nor moments
            assert found["learned"] == found["with_gradient"] == found["with_moments"]
