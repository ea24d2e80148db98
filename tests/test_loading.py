"""Saved models come back in another precision, and what is loaded takes its memory once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_config
from PIL import Image
from torch import nn

from pixelllm.checkpoints import load_weights, save_weights
from pixelllm.loading import WithoutInitialValues, held_in
from pixelllm.models.build import hold_in_bfloat16
from pixelllm.pretrained import PixelLLM
from pixelllm.tokenizer import train_tokenizer

BFLOAT16 = {"sam", "eva02", "language"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved model of random weights, with LoRA on its trunk."""
    torch.manual_seed(0)
    config = make_tiny_config(include_frozen=True)
    language = replace(config.model.language, lora_rank=2)
    config = replace(config, model=replace(config.model, language=language))
    model = PixelLLM(config, train_tokenizer(["a red car and a blue ball"] * 3, 120))
    path = tmp_path_factory.mktemp("saved")
    model.save_pretrained(path)
    return path


def inputs_of(model: PixelLLM) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (40, 48, 3), dtype=torch.uint8, generator=generator)
    return model.processor()([Image.fromarray(pixels.numpy())])


def test_encoders_and_trunk_come_back_in_bfloat16(folder: Path):
    """In bfloat16 LoRA would stop learning, points would jump and rotary angles be others."""
    model = PixelLLM.from_pretrained(folder, dtype=torch.bfloat16)
    full = PixelLLM.from_pretrained(folder)
    for (name, parameter), other in zip(model.named_parameters(), full.parameters(), strict=True):
        is_norm = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.BatchNorm2d)
        is_half = name.split(".")[0] in BFLOAT16 and "lora_" not in name and not is_norm
        assert parameter.dtype == (torch.bfloat16 if is_half else torch.float32), name
        assert other.dtype == torch.float32, name
        torch.testing.assert_close(parameter.float(), other, rtol=2**-8, atol=0)
    for (name, buffer), other in zip(model.named_buffers(), full.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    captions = [m.generate(**inputs_of(m), max_new_tokens=6)[0] for m in (model, full)]
    assert captions[0].log_prob == pytest.approx(captions[1].log_prob, rel=0.05)


def test_a_model_in_bfloat16_is_saved_and_loaded_as_such(folder: Path, tmp_path: Path):
    model = PixelLLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = PixelLLM.from_pretrained(tmp_path)
    assert again.config == model.config != PixelLLM.from_pretrained(folder).config
    assert {n: p.dtype for n, p in again.named_parameters()} == {
        n: p.dtype for n, p in model.named_parameters()
    }
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True)
    )
    size, half = (path.joinpath("model.safetensors").stat().st_size for path in (folder, tmp_path))
    assert half < 0.7 * size


def test_another_precision_is_refused():
    with pytest.raises(ValueError, match=r"torch.float16: expected .*bfloat16"):
        held_in(make_tiny_config(), torch.float16)


def test_building_without_initial_values_keeps_buffers_and_what_was_there():
    """Were `copy_` skipped, published weights would silently not be loaded."""
    given = nn.Linear(2, 2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with WithoutInitialValues():
        norm = nn.BatchNorm1d(3)
        nn.Linear(4, 4)
        copied = nn.Linear(2, 2)
        copied.load_state_dict(given.state_dict())
        hold_in_bfloat16(copied)
    assert torch.equal(before, torch.get_rng_state())  # nothing was drawn
    assert torch.equal(norm.running_var, torch.ones(3))
    assert torch.equal(copied.weight, given.weight.bfloat16())


def test_a_tensor_that_is_placed_by_others_is_not_copied(folder: Path):
    model = PixelLLM.from_pretrained(folder)
    expected = {name: tensor.clone() for name, tensor in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    offered: dict[str, torch.Tensor] = {}

    def place(name: str, values: torch.Tensor) -> bool:
        assert name not in offered
        offered[name] = values.clone()
        return name.startswith("sam.")

    load_weights(model, folder, place=place)
    for name, parameter in model.named_parameters():
        assert torch.equal(offered[name], expected[name])
        assert bool(parameter.isnan().all()) == name.startswith("sam."), name


def peak_memory() -> float:
    """MiB that this process has held at most since `forget_peak`."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak memory of a process can be measured on Linux alone")


def test_weights_are_never_held_twice(tmp_path: Path):
    """128 MiB are read through a window of 32; a dictionary of all would be 128 more."""
    with WithoutInitialValues():
        model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(128)))
    save_weights(model, tmp_path)
    forget_peak()
    before = peak_memory()
    load_weights(model, tmp_path)
    assert peak_memory() - before < 128 + 64


def test_what_is_built_without_values_takes_no_memory():
    """Also in bfloat16: a cast of no values would write 64 MiB of them."""
    forget_peak()
    before = peak_memory()
    with WithoutInitialValues():
        layer = nn.Linear(4096, 8192)
        hold_in_bfloat16(layer)
    assert layer.weight.dtype == torch.bfloat16 and peak_memory() - before < 16
