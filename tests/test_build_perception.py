"""PerceptionGPT from a configuration: what learns, and what new tokens start from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from pixelllm.config import LanguageConfig
from pixelllm.markers import MarkerIds
from pixelllm.models.build import SpecialIds
from pixelllm.models.build_perception import build_clip, build_perception, grow_vocabulary
from pixelllm.models.language import build_trunk
from pixelllm.models.perceptiongpt import Objects, PerceptionGPTNetwork, Tokens, Views
from pixelllm.perception_config import ClipConfig, PerceptionModelConfig, VisConfig
from pixelllm.vis_losses import perception_losses

TINY = PerceptionModelConfig(
    frame=32,
    clip=ClipConfig(32, 16, 16, depth=3, num_heads=2, ff_width=24, fine_patch=8, weights=None),
    vis=VisConfig(
        box_hidden=16, mask_size=32, mask_bottleneck=8, num_layers=1, num_heads=2, ff_width=24
    ),
    language=LanguageConfig(
        trunk=None,
        architecture="llama",
        lora_rank=2,
        width=24,
        num_decoder_layers=1,
        num_heads=2,
        ff_width=32,
        vocab_size=30,
    ),
)
MARKS, IDS = MarkerIds(*range(30, 38)), SpecialIds(0, 1, 2)


def test_what_learns_is_what_the_release_trains():
    network = PerceptionGPTNetwork(**build_perception(TINY, MARKS, IDS, ()))
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    inside = "language.model.model.layers.0."
    assert {f"{inside}mlp.up_proj.weight", "language.model.model.norm.weight"} <= frozen
    assert all(name.startswith("language.model.model.") for name in frozen)
    assert not any("lora" in name or "embed_tokens" in name for name in frozen)
    adapted = {name.split(".")[-4] for name, _ in network.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "v_proj"}


def test_what_the_release_does_otherwise_are_options():
    vis = replace(TINY.vis, release_positions=True, mixed_norms=True)
    network = PerceptionGPTNetwork(**build_perception(replace(TINY, vis=vis), MARKS, IDS, ()))
    assert network.mask_head.decoder.release_positions
    assert any(isinstance(part, torch.nn.BatchNorm2d) for part in network.mask_encoder.modules())


def test_visual_tokens_are_told_their_places_on_demand():
    """Of an image without any content; the paper's model has no such map."""
    assert PerceptionGPTNetwork(**build_perception(TINY, MARKS, IDS, ())).place_map is None
    placed = replace(TINY, value_position=True)
    network = PerceptionGPTNetwork(**build_perception(placed, MARKS, IDS, ()))
    token_ids = torch.full((1, 4), MARKS.image)
    views = Views(torch.zeros(1, 4, 16), None)
    seen = network.embed(token_ids, views, Objects.of_boxes(torch.zeros(0, 4)))[0]
    assert torch.pdist(seen.detach()).min() > 0.1
    network.place_map = None
    assert (
        torch.pdist(network.embed(token_ids, views, Objects.of_boxes(torch.zeros(0, 4)))[0]).max()
        == 0
    )


def test_a_trunk_in_bfloat16_learns_in_float32():
    """Steps of 2e-5 are lost on embeddings of 0.02 in bfloat16."""
    language = replace(TINY.language, bfloat16=True, lora_dropout=0.5)
    config = replace(TINY, language=language)
    network = PerceptionGPTNetwork(**build_perception(config, MARKS, IDS, ()))
    trained = {p.dtype for p in network.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    q_proj = network.language.model.model.layers[0].self_attn.q_proj
    assert q_proj.lora_dropout["default"].p == 0.5
    ids = torch.tensor([[1, 5, MARKS.vis, 2]])
    tokens = Tokens(ids, ids < 0, ids == MARKS.vis)
    objects = Objects.of_boxes(torch.rand(1, 4))
    found = network(torch.zeros(1, 3, 32, 32), tokens, objects)
    assert found.hidden.dtype == torch.bfloat16 and found.logits.dtype == torch.float32
    sum(perception_losses(found, tokens, objects).values()).backward()
    assert network.language.model.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_start_at_the_mean_of_the_known_ones(tied: bool):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    sizes |= {"num_attention_heads": 2, "tie_word_embeddings": tied}
    language = build_trunk(LlamaConfig(**sizes))
    model = language.model
    before = [
        m().weight.detach() for m in (model.get_input_embeddings, model.get_output_embeddings)
    ]
    grow_vocabulary(language, 12)
    after = [m().weight for m in (model.get_input_embeddings, model.get_output_embeddings)]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[:9], old)
        assert_close(new[9:], old.mean(0).expand(3, -1))
    assert (after[0] is after[1]) == tied and language.vocab_size == 12
    grow_vocabulary(language, 10)
    assert language.vocab_size == 12


def test_published_weights_are_read_from_a_folder(tmp_path: Path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    CLIPVisionModel(CLIPVisionConfig(**sizes)).save_pretrained(tmp_path)
    config = replace(TINY.clip, weights=str(tmp_path))
    first, second, other = (build_clip(config, pretrained) for pretrained in (True, True, False))
    images = torch.rand(1, 3, 32, 32)
    assert_close(first.fine(images), second.fine(images))
    assert not torch.allclose(first.fine(images), other.fine(images), atol=1e-3)
    with pytest.raises(ValueError, match="model.clip: in .* num_hidden_layers is 3, not 4"):
        build_clip(replace(config, depth=4), True)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if "layers.0.mlp.fc1.weight" in name)
    kept = {name: tensor.half() for name, tensor in weights.items() if name != gone}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="do not fit the model.*\n.*missing .*mlp.fc1.weight"):
        build_clip(config, True)
    save_file(kept | {gone: weights[gone]}, tmp_path / "model.safetensors", {"format": "pt"})
    assert {p.dtype for p in build_clip(config, True).parameters()} == {torch.float32}


def test_a_frame_that_patches_do_not_fill_is_refused():
    with pytest.raises(ValueError, match="frame 40 is not a multiple of clip.patch_size 16"):
        replace(TINY, frame=40)
