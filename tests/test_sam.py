"""SAM's encoder, prompt encoder and mask decoder against segment_anything and the golden cases."""

from __future__ import annotations

from functools import partial

import pytest
import segment_anything.modeling as official
import torch
from conftest import GoldenCase, golden_names, load_golden
from segment_anything import sam_model_registry
from torch import nn
from torch.testing import assert_close

from pixelllm.images import resize
from pixelllm.models.sam import (
    MaskDecoder,
    PromptEncoder,
    RelativeAttention,
    SamEncoder,
    resize_table,
)
from pixelllm.models.stem import ConvStem
from pixelllm.scenic import part_state

SIZES = dict(
    image_size=64, patch_size=8, width=24, depth=3, num_heads=2, out_channels=16, window_size=3,
    global_blocks=(1,),
)  # fmt: skip


def shake(module: nn.Module) -> nn.Module:
    """Random values everywhere: SAM's tables are zero at first, which would hide their use."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


def official_encoder() -> official.ImageEncoderViT:
    return official.ImageEncoderViT(
        img_size=64, patch_size=8, embed_dim=24, depth=3, num_heads=2, out_chans=16,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=3,
        global_attn_indexes=(1,),
    )  # fmt: skip


def test_encoder_equals_segment_anything(generator: torch.Generator):
    theirs, ours = shake(official_encoder()), SamEncoder(**SIZES)
    with torch.no_grad():  # small activations, so that the epsilon of the norms counts
        theirs.pos_embed.mul_(0.01)
        theirs.patch_embed.proj.weight.mul_(0.001)
        theirs.patch_embed.proj.bias.zero_()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64, generator=generator)
    assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)


def test_biases_made_in_parts_give_the_same(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
):
    encoder = shake(SamEncoder(**SIZES))
    images = torch.randn(1, 3, 64, 40, generator=generator)
    together = encoder(images)
    monkeypatch.setattr("pixelllm.models.sam.BIASES_AT_ONCE", 2 * 2 * 5 * 8 * 5)  # 2 rows of 8
    assert_close(encoder(images), together, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("biases", [2**28, 1])  # of all windows at once, and of one by one
@pytest.mark.parametrize("size", [(80, 80), (64, 40), (24, 16), (96, 72)])
def test_windows_read_together_give_the_same(
    size: tuple[int, int],
    biases: int,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
):
    """What GPUs run and what CPUs run are one function, and so are its gradients."""
    encoder = SamEncoder(**SIZES | dict(window_size=4))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    images = torch.randn(2, 3, *size, generator=generator)

    def run() -> list[torch.Tensor]:
        features = encoder(images)
        return [features, *torch.autograd.grad(features.square().mean(), encoder.parameters())]

    in_parts = run()
    monkeypatch.setattr("pixelllm.models.sam.BIASES_TOGETHER", biases)
    monkeypatch.setattr(RelativeAttention, "read_in_parts", RelativeAttention.read_together)
    for together, expected in zip(run(), in_parts, strict=True):
        assert_close(together, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (24, 40), (90, 70)])
def test_table_is_resized_as_an_image_is(size: tuple[int, int], generator: torch.Generator):
    table = torch.randn(64, 64, 6, generator=generator)
    expected = resize(table.permute(2, 0, 1)[None], size, "bicubic")[0].permute(1, 2, 0)
    assert_close(resize_table(table, size), expected, atol=1e-5, rtol=1e-5)


def encoder_of(case: GoldenCase) -> SamEncoder:
    h = case.hparams
    windowed = set(h["window_block_indexes"])
    encoder = SamEncoder(
        h["img_size"],
        h["patch_size"],
        h["embed_dim"],
        h["depth"],
        h["num_heads"],
        h["out_chans"],
        h["window_size"],
        [index for index in range(h["depth"]) if index not in windowed],
        h["mlp_ratio"],
    )
    encoder.load_state_dict(part_state("sam_backbone", case.weights()))
    return encoder.eval()


@pytest.mark.parametrize("name", golden_names("sam_vit"))
def test_golden_sam_vit(name: str):
    case = load_golden(name)
    features = encoder_of(case)(case.tensor("in.images").movedim(-1, 1))
    assert_close(features.movedim(1, -1), case.tensor("out.features"), **case.tolerance)


@pytest.mark.parametrize("size", [(64, 64), (40, 40), (96, 96), (48, 72)])
def test_features_cover_an_input_of_any_size(size: tuple[int, int]):
    encoder = SamEncoder(**SIZES)
    assert encoder(torch.zeros(1, 3, *size)).shape == (1, 16, size[0] // 8, size[1] // 8)


@pytest.mark.parametrize("size", [64, 40])
def test_encoder_runs_in_its_own_dtype(size: int, generator: torch.Generator):
    """A frozen encoder of 632 M parameters is held in bfloat16; tables must follow."""
    encoder = SamEncoder(**SIZES).eval()
    images = torch.randn(1, 3, size, size, generator=generator)
    expected = encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        cast = encoder(images)
    own = encoder.bfloat16()(images.bfloat16())
    assert own.dtype == torch.bfloat16
    for features in (cast, own):
        assert_close(features.float(), expected, atol=0.1, rtol=0.1)


def test_input_that_cuts_a_patch_is_refused():
    with pytest.raises(ValueError, match="multiples of 8, not 60 x 64"):
        SamEncoder(**SIZES)(torch.zeros(1, 3, 60, 64))


def test_stem_replaces_the_patch_embedding():
    encoder = SamEncoder(**SIZES, stem=ConvStem(24, 8))
    features = encoder(torch.randn(1, 3, 64, 64))
    assert features.shape == (1, 16, 8, 8)
    features.square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    assert any(key.startswith("patch_embed.proj.layers") for key in encoder.state_dict())


@pytest.mark.parametrize("patch_size", [4, 8, 16, 32])
def test_stem_gives_one_cell_per_patch(patch_size: int):
    cells = ConvStem(32, patch_size)(torch.zeros(1, 3, 2 * patch_size, 3 * patch_size))
    assert cells.shape == (1, 32, 2, 3)


@pytest.mark.parametrize("patch_size", [2, 14, 24])
def test_stem_refuses_other_patches(patch_size: int):
    with pytest.raises(ValueError, match=f"not {patch_size}"):
        ConvStem(32, patch_size)


@pytest.mark.parametrize(
    ("name", "width", "depth", "num_heads", "global_blocks"),
    [
        ("vit_b", 768, 12, 12, (2, 5, 8, 11)),
        ("vit_l", 1024, 24, 16, (5, 11, 17, 23)),
        ("vit_h", 1280, 32, 16, (7, 15, 23, 31)),
    ],
)
def test_published_sizes_have_the_official_keys_and_shapes(
    name, width, depth, num_heads, global_blocks
):
    with torch.device("meta"):
        theirs = sam_model_registry[name]()
        ours = nn.ModuleDict(
            {
                "image_encoder": SamEncoder(
                    1024, 16, width, depth, num_heads, 256, 14, global_blocks
                ),
                "prompt_encoder": PromptEncoder(256, (64, 64), (1024, 1024)),
                "mask_decoder": MaskDecoder(256),
            }
        )
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}


# Prompts


def prompt_encoder_of(case: GoldenCase) -> PromptEncoder:
    h = case.hparams
    encoder = PromptEncoder(
        h["embed_dim"], tuple(h["image_embedding_size"]), tuple(h["input_image_size"]),
        h["mask_in_chans"],
    )  # fmt: skip
    encoder.load_state_dict(part_state("prompt_encoder", case.weights()))
    return encoder


@pytest.mark.parametrize("name", golden_names("sam_prompt_encoder"))
def test_golden_sam_prompt_encoder(name: str):
    case = load_golden(name)
    encoder = prompt_encoder_of(case)
    points = (case.tensor("in.points"), case.tensor("in.point_labels"))
    boxes, masks = case.tensor("in.boxes"), case.tensor("in.masks").movedim(-1, 1)
    sparse = {
        "points_only": encoder(points, None, None)[0],
        "points_and_boxes": encoder(points, boxes, None)[0],
        "boxes_only": encoder(None, boxes, None)[0],
        "points_boxes_masks": encoder(points, boxes, masks)[0],
        "boxes_other_image_size": encoder.encode_boxes(
            boxes, tuple(case.hparams["other_image_size"])
        )[:, :2],
    }
    for variant, tokens in sparse.items():
        assert_close(tokens, case.tensor(f"out.{variant}.sparse"), **case.tolerance)
    dense = {
        "points_only": encoder(points, None, None)[1],
        "points_boxes_masks": encoder(points, boxes, masks)[1],
    }
    for variant, maps in dense.items():
        expected = case.tensor(f"out.{variant}.dense").movedim(-1, 1)
        assert_close(maps, expected, **case.tolerance)


@pytest.mark.parametrize("name", golden_names("sam_prompt_encoder"))
def test_golden_dense_positions(name: str):
    case = load_golden(name)
    encoder = prompt_encoder_of(case)
    for key in case.arrays:
        if key.startswith("out.dense_pe"):
            h, w = case.arrays[key].shape[:2]
            ours = encoder.dense_pe(h, w)[0].movedim(0, -1)
            assert_close(ours, case.tensor(key), **case.tolerance)


def test_box_prompt_is_two_corners_and_the_no_mask_vector():
    encoder = PromptEncoder(16, (6, 6), (96, 96))
    boxes = torch.tensor([[3.0, 4.0, 50.0, 60.0], [0.0, 0.0, 96.0, 80.0]])
    tokens = encoder.encode_boxes(boxes, (96, 96))
    assert tokens.shape == (2, 5, 16)
    assert_close(tokens[:, :2], encoder(None, boxes, None)[0])
    assert torch.equal(tokens[:, 2:], encoder.no_mask.expand(2, 3, 16))


def test_padding_box_is_four_points_at_the_origin():
    """What the released model feeds for rows without a box; whole-model parity needs it."""
    encoder = PromptEncoder(16, (6, 6), (96, 96))
    points = (torch.zeros(1, 4, 2), torch.ones(1, 4))
    expected, _ = encoder(points, None, None)
    assert_close(encoder.encode_boxes(torch.zeros(1, 4), (96, 96)), expected)


def test_positions_are_float32_under_autocast():
    """Between 512 and 1024 bfloat16 steps by four pixels."""
    encoder = PromptEncoder(16, (6, 6), (96, 96))
    boxes = torch.tensor([[700.0, 701.0, 702.0, 703.0]])
    plain = encoder.encode_boxes(boxes, (1024, 1024)), encoder.dense_pe(5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        cast = encoder.encode_boxes(boxes, (1024, 1024)), encoder.dense_pe(5, 7)
    assert_close(cast, plain, atol=0, rtol=0)


# Masks


@pytest.mark.parametrize("name", golden_names("sam_mask_decoder"))
def test_golden_sam_mask_decoder(name: str):
    case = load_golden(name)
    transformer = case.hparams["two_way_transformer"]
    decoder = MaskDecoder(
        case.hparams["transformer_dim"], transformer["depth"], transformer["num_heads"],
        transformer["mlp_dim"],
    )  # fmt: skip
    decoder.load_state_dict(part_state("mask_decoder", case.weights()))
    masks, ious = decoder(
        case.tensor("in.image_embeddings").movedim(-1, 1),
        case.tensor("in.image_pe").movedim(-1, 0)[None],
        case.tensor("in.sparse_prompt_embeddings"),
        case.tensor("in.dense_prompt_embeddings")[0],
    )
    for variant, chosen in (("single", slice(0, 1)), ("multi", slice(1, None))):
        expected = case.tensor(f"out.{variant}_masks")
        assert_close(masks[:, :, chosen], expected, **case.tolerance)
        assert_close(ious[:, :, chosen], case.tensor(f"out.{variant}_iou"), **case.tolerance)


def test_mask_decoder_equals_segment_anything_image_by_image(generator: torch.Generator):
    ours = shake(MaskDecoder(16, depth=2, num_heads=2, mlp_width=20))
    theirs = official.MaskDecoder(
        transformer_dim=16,
        transformer=official.TwoWayTransformer(2, 16, 2, 20),
        iou_head_hidden_dim=16,
    )
    theirs.load_state_dict(ours.state_dict())
    features = torch.randn(2, 16, 5, 6, generator=generator)
    positions = torch.randn(1, 16, 5, 6, generator=generator)
    prompts = torch.randn(2, 3, 4, 16, generator=generator)
    dense = torch.randn(16, generator=generator)
    masks, ious = ours(features, positions, prompts, dense)
    for image in range(2):
        expected = theirs.predict_masks(
            features[image : image + 1],
            positions,
            prompts[image],
            dense.view(1, 16, 1, 1).expand(3, -1, 5, 6),
        )
        assert_close((masks[image], ious[image]), expected, atol=1e-5, rtol=1e-5)
