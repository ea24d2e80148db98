"""Foreign weight files: official SAM checkpoints, and what is wrong with others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from segment_anything.build_sam import _build_sam
from torch import nn
from torch.testing import assert_close

from pixelllm.models.sam import MaskDecoder, PromptEncoder, SamEncoder
from pixelllm.weights import load_exactly, load_sam_checkpoint, read_weights


def tiny_sam() -> tuple[SamEncoder, PromptEncoder, MaskDecoder]:
    encoder = SamEncoder(64, 16, 12, 2, 2, 16, window_size=3, global_blocks=(1,))
    return encoder, PromptEncoder(16, (4, 4), (64, 64)), MaskDecoder(16, 2, 2, 20)


def official_layout() -> dict[str, torch.Tensor]:
    names = ("image_encoder", "prompt_encoder", "mask_decoder")
    return nn.ModuleDict(dict(zip(names, tiny_sam(), strict=True))).state_dict()


def test_checkpoint_of_segment_anything_loads_unchanged(tmp_path: Path):
    """Written by segment_anything itself at its smallest possible size; outputs must agree."""
    theirs = _build_sam(24, 2, 2, [1])
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.1)
    torch.save(theirs.state_dict(), tmp_path / "sam.pth")
    encoder = SamEncoder(1024, 16, 24, 2, 2, 256, window_size=14, global_blocks=(1,))
    prompts, decoder = PromptEncoder(256, (64, 64), (1024, 1024)), MaskDecoder(256)
    load_sam_checkpoint(tmp_path / "sam.pth", encoder, prompts, decoder)
    loaded = nn.ModuleDict(
        {"image_encoder": encoder, "prompt_encoder": prompts, "mask_decoder": decoder}
    )
    for key, value in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    boxes = torch.tensor([[100.0, 200.0, 700.0, 900.0]])
    features = torch.randn(1, 256, 8, 8)
    sparse, _ = theirs.prompt_encoder(None, boxes, None)
    dense = theirs.prompt_encoder.no_mask_embed.weight.view(1, 256, 1, 1)
    expected = theirs.mask_decoder.predict_masks(features, prompts.dense_pe(8, 8), sparse, dense)
    ours = decoder(
        features, prompts.dense_pe(8, 8), prompts(None, boxes, None)[0][None], dense[0, :, 0, 0]
    )
    assert_close((ours[0][0], ours[1][0]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_every_file_format_is_read(tmp_path: Path, form: str):
    state, path = official_layout(), tmp_path / "weights"
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    encoder, prompts, decoder = tiny_sam()
    load_sam_checkpoint(path, encoder, prompts)  # the decoder's weights may stay out
    assert torch.equal(encoder.pos_embed, state["image_encoder.pos_embed"])
    load_sam_checkpoint(path, encoder, prompts, decoder)
    assert torch.equal(decoder.iou_token.weight, state["mask_decoder.iou_token.weight"])


def test_error_lists_missing_extra_and_misshapen_keys(tmp_path: Path):
    state = official_layout()
    del state["image_encoder.neck.0.weight"]
    state["text_encoder.table"] = torch.zeros(2)
    state["prompt_encoder.no_mask_embed.weight"] = torch.zeros(1, 7)
    torch.save(state, tmp_path / "odd.pth")
    modules = tiny_sam()
    before = modules[0].pos_embed.clone()
    with pytest.raises(ValueError) as error:
        load_sam_checkpoint(tmp_path / "odd.pth", *modules)
    message = str(error.value)
    assert "odd.pth" in message
    assert "missing image_encoder.neck.0.weight" in message
    assert "unexpected text_encoder.table" in message
    assert "no_mask_embed.weight is (1, 7), expected (1, 16)" in message
    assert torch.equal(modules[0].pos_embed, before)  # nothing half-loaded


def test_long_lists_are_cut():
    with pytest.raises(ValueError, match=r"file: .*\n  unexpected a; .*; unexpected h and 12 more"):
        load_exactly(nn.Module(), dict.fromkeys("abcdefghijklmnopqrst", torch.zeros(1)), "file")


class Trap:
    def __reduce__(self):
        return (Path("trap").write_text, ("sprung",))


@pytest.mark.parametrize("content", ["pickle", "noise", "cut", "number", "nested"])
def test_other_files_are_refused_and_never_run(tmp_path: Path, content: str, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pth"
    if content == "noise":
        path.write_bytes(b"these are not weights")
    else:
        odd = {"pickle": {"a": Trap()}, "number": 3, "nested": {"model": {"a": torch.zeros(1)}}}
        torch.save(odd.get(content, official_layout()), path)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ValueError, match="file.pth: "):
        read_weights(path)
    assert not Path("trap").exists()


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        load_sam_checkpoint(tmp_path / "absent.pth", *tiny_sam())
