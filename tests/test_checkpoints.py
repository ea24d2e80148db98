"""Saved configurations and weights come back as they were, and what does not fit is named."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pixelllm import checkpoints
from pixelllm.checkpoints import (
    CONFIG_FILE,
    find_file,
    from_fields,
    load_config,
    load_weights,
    own_tensors,
    save_config,
    save_weights,
    write_tensors,
)
from pixelllm.config import Config, SamPretraining
from pixelllm.pretrained import PixelLLM
from pixelllm.recipes import RECIPES


def small_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name: str, tmp_path: Path):
    """Tuples become lists in JSON, and a configuration with lists is not the same any more."""
    config = RECIPES[name]()
    save_config(config, tmp_path)
    assert load_config(type(config), tmp_path) == config


def test_learning_rate_scales_survive_json(tmp_path: Path):
    config = from_fields(Config, {"name": "x", "train": {"lr_scales": {"eva02": 0.1}}}, "here")
    save_config(config, tmp_path)
    assert load_config(Config, tmp_path).train.lr_scales == {"eva02": 0.1}


def test_an_unknown_field_is_named_with_the_nearest(tmp_path: Path):
    save_config(RECIPES["scenes-tiny"](), tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    fields["model"]["prompt"]["num_token"] = 3
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"config.json: PromptConfig.*'num_token'.*num_tokens"):
        load_config(Config, tmp_path)


def test_a_run_of_another_kind_is_refused(tmp_path: Path):
    save_config(RECIPES["scenes-tiny"](), tmp_path)
    with pytest.raises(ValueError, match="holds a Config, expected a SamPretraining"):
        load_config(SamPretraining, tmp_path)


def test_damaged_json_is_named(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"name": ')
    with pytest.raises(ValueError, match=r"config.json.*JSON"):
        load_config(Config, tmp_path)


def test_an_unfinished_run_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="not a finished run: config.json"):
        load_config(Config, tmp_path)


def test_weights_and_buffers_come_back(tmp_path: Path):
    saved, other = small_module(), small_module()
    saved(torch.randn(5, 3))  # moves the running mean
    save_weights(saved, tmp_path)
    with torch.no_grad():
        other[0].weight.zero_()
    load_weights(other, tmp_path)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_left_out_tensors_are_neither_written_nor_read(tmp_path: Path):
    saved, other = small_module(), small_module()
    save_weights(saved, tmp_path, lambda name: name.startswith("0."))
    assert set(load_file(tmp_path / "model.safetensors")) == {
        name for name in own_tensors(saved) if name.startswith("1.")
    }
    with torch.no_grad():
        other[0].weight.fill_(7)
    load_weights(other, tmp_path, lambda name: name.startswith("0."))
    assert (other[0].weight == 7).all()


def test_every_key_that_does_not_fit_is_listed(tmp_path: Path):
    model = small_module()
    save_weights(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["0.bias"]
    tensors |= {"2.extra": torch.zeros(1), "0.weight": torch.zeros(4, 9)}
    save_file(tensors, tmp_path / "model.safetensors")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_weights(model, tmp_path)
    for part in ("missing 0.bias", "unexpected 2.extra", r"0.weight is (4, 9), expected (4, 3)"):
        assert part in str(caught.value)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_from_pretrained_lists_keys_that_do_not_fit(tiny_run, tmp_path: Path):
    for file in tiny_run.main.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["extractor.output_tokens"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="missing extractor.output_tokens"):
        PixelLLM.from_pretrained(tmp_path)


def test_truncated_weights_are_named(tmp_path: Path):
    save_weights(small_module(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="model.safetensors"):
        load_weights(small_module(), tmp_path)


def test_a_full_disk_leaves_the_weights_of_before(tmp_path: Path, monkeypatch):
    model = small_module()
    save_weights(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fill_disk(_tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", fill_disk)
    with pytest.raises(OSError, match=r"model.safetensors could not be written.*No space left"):
        save_weights(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_mistyped_run_is_not_looked_for_on_the_hub(tmp_path, monkeypatch) -> None:
    """Catches half a minute of network retries for a folder that is not there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/nope", "runs/deep/nope", str(tmp_path / "nope")):
        with pytest.raises(FileNotFoundError, match="no such run"):
            find_file(name, CONFIG_FILE)


def test_saved_tensors_have_the_permissions_of_any_new_file(tmp_path) -> None:
    """Catches weights that only their writer may read."""
    (tmp_path / "plain").touch()
    write_tensors({"a": torch.zeros(1)}, tmp_path / "tensors")
    assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
