"""Every kind of trunk trains, is saved and comes back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import joint_tables, make_tiny_joint_config, run_stage, short_training

from pixelllm.models.build import SpecialIds, build_language
from pixelllm.models.git import GitDecoder
from pixelllm.models.language import DecoderOnlyLanguage, EncoderDecoderLanguage
from pixelllm.pretrained import PixelLLM

TRUNKS = {"t5": EncoderDecoderLanguage, "git": GitDecoder, "llama": DecoderOnlyLanguage}


@pytest.mark.parametrize("architecture", TRUNKS)
def test_a_trunk_of_random_weights_learns_all_tasks(architecture, tiny_tables, tmp_path: Path):
    """Its width feeds projection, points and masks; the word ids are those of the tokenizer."""
    config = make_tiny_joint_config(train=short_training(6, frozen=("sam", "prompt_encoder")))
    language = replace(config.model.language, architecture=architecture, width=24)
    config = replace(config, model=replace(config.model, language=language))
    run_stage(config, *joint_tables(tiny_tables), tmp_path / "run")
    model = PixelLLM.from_pretrained(tmp_path / "run")
    assert isinstance(model.language, TRUNKS[architecture])
    tokenizer = model.tokenizer
    ids = (model.language.pad_id, model.language.eos_id, model.language.vocab_size)
    assert ids == (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer))

    image = next(tiny_tables.train.parent.glob("scenes/val/*.*"))
    captions = model.generate(**model.processor()(image), max_new_tokens=6)
    located = model.locate(**model.processor().locating([image], [["red"]]), with_masks=True)
    model.save_pretrained(tmp_path / "again")
    loaded = PixelLLM.from_pretrained(tmp_path / "again")
    assert loaded.config == model.config
    assert loaded.generate(**loaded.processor()(image), max_new_tokens=6) == captions
    again = loaded.locate(**loaded.processor().locating([image], [["red"]]), with_masks=True)
    assert again == located


@pytest.mark.parametrize("architecture", TRUNKS)
def test_a_trunk_has_the_sizes_of_its_config(architecture: str):
    sizes = {"width": 24, "num_encoder_layers": 1, "num_decoder_layers": 2, "num_heads": 2}
    language = replace(
        make_tiny_joint_config().model.language, architecture=architecture, **sizes, vocab_size=40
    )
    trunk = build_language(language, 16, SpecialIds(3, 4, 5), pretrained=False)
    assert (trunk.width, trunk.vocab_size) == (24, 40)
    if architecture != "t5":  # whose ids are always 0, 0 and 1
        assert (trunk.pad_id, trunk.bos_id, trunk.eos_id) == (3, 4, 5)
    width = 16 if architecture == "git" else 24  # it projects visual tokens itself
    hidden = trunk(
        torch.rand(2, 3, width),
        torch.empty(2, 0, dtype=torch.long),
        torch.empty(2, 0, dtype=torch.bool),
        torch.tensor([[3, 7, 8], [3, 9, 5]]),
        torch.zeros(2, 3, dtype=torch.bool),
    )
    assert hidden.shape == (2, 3, 24) and trunk.logits(hidden).shape == (2, 3, 40)
