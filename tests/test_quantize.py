"""A trunk in 8 bits says nearly the same, and what must stay exact is left alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_config
from PIL import Image

from pixelllm.pretrained import PixelLLM
from pixelllm.quantize import quantize_trunk, trunk_linears
from pixelllm.tokenizer import train_tokenizer

pytest.importorskip("torchao")


def make_model(architecture: str = "t5", rank: int = 2) -> PixelLLM:
    torch.manual_seed(0)
    config = make_tiny_config(include_frozen=True)
    rank = 0 if architecture == "git" else rank
    language = replace(config.model.language, architecture=architecture, lora_rank=rank, width=32)
    config = replace(config, model=replace(config.model, language=language))
    return PixelLLM(config, train_tokenizer(["a red car and a blue ball"] * 3, 120)).eval()


def words(language) -> torch.Tensor:
    """Logits of given words, float32[2, 5, V]."""
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randn(2, 4, 32, generator=generator)
    ids = torch.randint(3, 20, (2, 5), generator=generator)
    nothing = torch.zeros(2, 0)
    hidden = language(prefix, nothing.long(), nothing.bool(), ids, torch.zeros_like(ids).bool())
    return language.logits(hidden)


@pytest.mark.parametrize("architecture", ["t5", "llama"])
def test_a_quantised_trunk_says_nearly_the_same(architecture: str):
    model = make_model(architecture)
    with torch.no_grad():
        expected = words(model.language)
        before = {n: p.clone() for n, p in model.named_parameters()}
        quantize_trunk(model.language)
        found = words(model.language)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.03 * expected.norm()
    changed = {f"language.{name}.weight" for name in trunk_linears(model.language)}
    assert changed and not any("lora_" in name or "lm_head" in name for name in changed)
    for name, parameter in model.named_parameters():
        if name not in changed:
            assert torch.equal(parameter, before[name]), name


def test_a_model_is_loaded_in_8_bits_as_it_is_quantised_later(tmp_path: Path):
    """Quantising before a weight is read would leave random ones."""
    make_model().save_pretrained(tmp_path)
    model = PixelLLM.from_pretrained(tmp_path, dtype=torch.bfloat16, int8=True)
    other = PixelLLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    quantize_trunk(other.language)
    with torch.no_grad():
        assert torch.equal(words(model.language), words(other.language))


def test_a_model_in_8_bits_is_not_saved(tmp_path: Path):
    model = make_model()
    quantize_trunk(model.language)
    with pytest.raises(ValueError, match="8 bits"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_the_bert_size_decoder_is_not_quantised():
    """Its cache reads several layers as one matrix, which quantised weights cannot be."""
    with pytest.raises(ValueError, match="BERT-size decoder"):
        quantize_trunk(make_model("git").language)


def test_a_quantised_model_writes(tmp_path: Path):
    model = make_model()
    quantize_trunk(model.language)
    image = Image.new("RGB", (48, 40), (200, 30, 30))
    assert model.generate(**model.processor()([image]), max_new_tokens=4)[0].log_prob < 0
