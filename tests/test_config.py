"""Configurations: what they refuse."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from pixelllm.config import LanguageConfig, ModelConfig, TrainConfig


def test_a_frame_must_be_whole_patches():
    with pytest.raises(ValueError, match="frame 100 .* patch size 16"):
        ModelConfig(frame=100)


def test_a_batch_must_split_into_its_accumulation_steps():
    with pytest.raises(ValueError, match="batch_size 10 .* accumulate 4"):
        TrainConfig(batch_size=10, accumulate=4)


@pytest.mark.parametrize("name", ["steps", "keep", "log_every", "accumulate"])
def test_counts_are_at_least_one(name):
    with pytest.raises(ValueError, match=f"{name} is 0, expected 1 or more"):
        TrainConfig(**{name: 0})


@pytest.mark.parametrize("name", ["clip", "warmup", "workers"])
def test_other_numbers_are_not_below_zero(name):
    with pytest.raises(ValueError, match=f"{name} is -1, expected 0 or more"):
        TrainConfig(**{name: -1})


def test_the_git_decoder_has_no_lora():
    with pytest.raises(ValueError, match="model.language.lora_rank is 8, but the git decoder"):
        LanguageConfig(trunk=None, architecture="git", lora_rank=8)


def test_configurations_do_not_change(tiny_config):
    with pytest.raises(FrozenInstanceError):
        tiny_config.name = "other"
