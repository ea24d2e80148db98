"""The prompt feature extractor, its start from SAM, and feature fusion."""

from __future__ import annotations

import pytest
import torch
from conftest import golden_names, load_golden
from torch.testing import assert_close

from pixelllm.models.prompt import (
    PromptFeatureExtractor,
    box_waves,
    cells_at_once,
    fuse_features,
    init_from_sam,
)
from pixelllm.models.sam import MaskDecoder, PromptEncoder
from pixelllm.scenic import part_state

WIDTH = 16


def tiny_extractor(**changes) -> PromptFeatureExtractor:
    sizes = dict(
        in_channels=24, prompt_width=WIDTH, width=WIDTH, depth=2, num_outputs=6, output_width=10,
        num_heads=2, mlp_width=20,
    )  # fmt: skip
    return PromptFeatureExtractor(**sizes | changes)


def tiny_inputs(K: int = 3, prompt_width: int = WIDTH) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 24, 4, 5), (2, K, 5, prompt_width), (prompt_width,), (1, prompt_width, 4, 5)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("name", golden_names("prompt_adapter"))
def test_golden_prompt_adapter(name: str):
    case = load_golden(name)
    h = case.hparams
    extractor = PromptFeatureExtractor(
        h["image_channels"],
        h["input_embedding_dim"],
        h["transformer_dim"],
        h["depth"],
        h["num_outputs"],
        h["output_dim"],
        h["num_heads"],
        h["mlp_dim"],
    )
    extractor.load_state_dict(part_state("prompt_adapter", case.weights()))
    dense = case.tensor("in.dense_prompt_embeddings")
    outputs = extractor(
        case.tensor("in.image_embeddings").movedim(-1, 1),
        case.tensor("in.sparse_prompt_embeddings"),
        dense[0] if dense.ndim == 2 else dense.flatten(2, 3),
        case.tensor("in.image_pe").movedim(-1, 0)[None],
    )
    assert_close(outputs, case.tensor("out.sparse"), **case.tolerance)


def test_prompts_do_not_see_each_other():
    extractor = tiny_extractor()
    features, prompts, dense, positions = tiny_inputs()
    together = extractor(features, prompts, dense, positions)
    order = torch.tensor([2, 0, 1])
    permuted = extractor(features, prompts[:, order], dense, positions)
    alone = extractor(features, prompts[:, :1], dense, positions)
    assert_close(permuted, together[:, order], atol=1e-5, rtol=1e-5)
    assert_close(alone, together[:, :1], atol=1e-5, rtol=1e-5)


def test_prompts_read_in_parts_give_the_same(monkeypatch: pytest.MonkeyPatch):
    """300 prompts must fit; a part that is forgotten or turned round would show here."""
    extractor, inputs = tiny_extractor(), tiny_inputs(K=5)
    together = extractor(*inputs)
    monkeypatch.setattr("pixelllm.models.prompt.CELLS_AT_ONCE", 2 * 2 * 4 * 5)  # two at a time
    assert_close(extractor(*inputs), together, atol=1e-5, rtol=1e-5)


def test_a_gpu_reads_more_prompts_together():
    at_once = {kind: cells_at_once(torch.device(kind)) // 27**2 for kind in ("cpu", "cuda")}
    assert at_once["cpu"] < 20 and at_once["cuda"] >= 150


@pytest.mark.parametrize("prompt_width", [WIDTH, 12])
def test_every_parameter_learns(prompt_width: int):
    own = {"value_position": True, "box_octaves": 3}
    extractor = tiny_extractor(prompt_width=prompt_width, **own)
    outputs = extractor(*tiny_inputs(prompt_width=prompt_width), torch.rand(2, 3, 4))
    assert outputs.shape == (2, 3, 6, 10)
    outputs.square().sum().backward()
    unused = [n for n, p in extractor.named_parameters() if p.grad is None or not p.grad.any()]
    # A softmax does not see a constant added to all its keys.
    assert all(name.endswith("k_proj.bias") for name in unused), unused


def test_published_extractor_has_the_published_parameter_count():
    """44,030,720 in the release, less its dense output 512 -> 1024, which nothing reads."""
    with torch.device("meta"):
        extractor = PromptFeatureExtractor(1280, 256, 512, 6, 32, 1024)
    unused_dense_output = 512 * 1024 + 1024
    count = sum(p.numel() for p in extractor.parameters())
    assert count + unused_dense_output == 44_030_720


def test_value_position_lets_tokens_read_where_without_keys():
    """With uniform attention only values carry position: constant features must differ then."""
    features, prompts, dense, positions = tiny_inputs()
    features = torch.ones_like(features)
    mirrored = positions.flip(-1)
    for value_position in (False, True):
        extractor = tiny_extractor(value_position=value_position)
        for layer in [*extractor.transformer.layers]:
            torch.nn.init.zeros_(layer.cross_attn_token_to_image.k_proj.weight)
            torch.nn.init.zeros_(layer.cross_attn_image_to_token.out_proj.weight)
        torch.nn.init.zeros_(extractor.transformer.final_attn_token_to_image.k_proj.weight)
        torch.nn.init.zeros_(extractor.image_projection.weight)
        moved = extractor(features, prompts, dense, positions * 2 + mirrored)
        still = extractor(features, prompts, dense, positions)
        assert torch.allclose(moved, still, atol=1e-5) is not value_position


def test_box_waves_tell_prompts_of_equal_tokens_apart():
    features, prompts, dense, positions = tiny_inputs(K=2)
    prompts[:, 1] = prompts[:, 0]
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.1, 0.2, 0.5, 0.7]]).expand(2, -1, -1)
    for box_octaves in (0, 2):
        first, second = tiny_extractor(box_octaves=box_octaves)(
            features, prompts, dense, positions, boxes
        ).unbind(1)
        assert torch.allclose(first, second, atol=1e-5) is (box_octaves == 0)


def test_box_waves_of_centre_and_size():
    """Of a box with centre (0.5, 0.25), width 1 and height 0.5; sines first."""
    half = 0.5**0.5
    sines = [1.0, 0.0, half, 1.0, 0.0, 0.0, 1.0, 0.0]  # of x, y, w, h at half a wave and a whole
    cosines = [0.0, -1.0, half, 0.0, -1.0, 1.0, 0.0, -1.0]
    waves = box_waves(torch.tensor([[0.0, 0.0, 1.0, 0.5]]), octaves=2)
    assert_close(waves, torch.tensor([sines + cosines]), atol=1e-6, rtol=0)


def test_a_size_stands_out_in_box_waves():
    """A hundredth of the frame more turns the shortest of five waves by 29 degrees."""
    boxes = torch.tensor([[0.2, 0.2, 0.5, 0.5], [0.2, 0.2, 0.5, 0.51]])
    first, second = box_waves(boxes, octaves=5)
    assert (first - second).norm() > 0.5


# Start from SAM


def tiny_sam() -> tuple[MaskDecoder, PromptEncoder]:
    return MaskDecoder(WIDTH, 2, 2, 20), PromptEncoder(WIDTH, (4, 5), (64, 80))


def test_extractor_from_sam_computes_what_its_mask_decoder_does():
    """Its tokens, before the heads, are those of SAM's transformer asked by the mask token."""
    decoder, encoder = tiny_sam()
    extractor = tiny_extractor(
        num_outputs=1, output_width=WIDTH, value_position=True, box_octaves=3
    )
    init_from_sam(extractor, decoder, encoder, sam_channels=slice(8, 24))
    with torch.no_grad():
        extractor.output_tokens.copy_(decoder.mask_tokens.weight[:1])
        extractor.head_weight.copy_(torch.eye(WIDTH)[None])
    features, _, _, _ = tiny_inputs()
    boxes = torch.tensor([[4.0, 4.0, 30.0, 40.0], [0.0, 0.0, 80.0, 64.0]])
    prompts = encoder.encode_boxes(boxes, (64, 80))
    positions = encoder.dense_pe(4, 5)
    boxes = torch.rand(2, 1, 4)  # add nothing at the start
    ours = extractor(features, prompts[:, None], encoder.no_mask, positions, boxes)
    keys = features[:, 8:] + encoder.no_mask[:, None, None]
    tokens = torch.cat([decoder.mask_tokens.weight[:1].expand(2, 1, -1), prompts], dim=1)
    expected, _ = decoder.transformer(keys, positions.expand_as(keys), tokens)
    assert_close(ours[:, 0, 0], expected[:, 0], atol=1e-5, rtol=1e-5)


def test_grid_queries_start_as_points_of_a_regular_grid():
    decoder, encoder = tiny_sam()
    extractor = tiny_extractor()
    init_from_sam(extractor, decoder, encoder, slice(0, WIDTH), points_per_side=2)
    centres = torch.tensor([[20.0, 16.0], [60.0, 16.0], [20.0, 48.0], [60.0, 48.0]]) - 0.5
    points, _ = encoder((centres[None], torch.ones(1, 4)), torch.zeros(1, 4), None)
    expected = points[0, :4] + decoder.mask_tokens.weight[:1]
    assert_close(extractor.output_tokens[:4], expected, atol=0.2, rtol=0)
    plain = decoder.mask_tokens.weight[:1].expand(2, -1)
    assert_close(extractor.output_tokens[4:], plain, atol=0.2, rtol=0)
    assert not torch.equal(extractor.output_tokens[4], extractor.output_tokens[5])


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (dict(depth=3), {}, "depth 3"),
        (dict(mlp_width=24), {}, "mlp_dim 24"),
        (dict(num_heads=4), {}, "num_heads 4"),  # the shapes alone would fit
        ({}, dict(sam_channels=slice(16, None)), "not 16 channels"),
        ({}, dict(points_per_side=3), "9 grid points but 6 tokens"),
    ],
)
def test_start_from_another_size_is_refused(changes: dict, options: dict, message: str):
    decoder, encoder = tiny_sam()
    options = dict(sam_channels=slice(0, WIDTH)) | options
    with pytest.raises(ValueError, match=message):
        init_from_sam(tiny_extractor(**changes), decoder, encoder, **options)


# Fusion


@pytest.mark.parametrize("name", golden_names("feature_fusion"))
def test_golden_feature_fusion(name: str):
    case = load_golden(name)
    keys = case.hparams["feature_keys"]
    separator = "+" if "+" in keys else ","
    maps = [case.tensor(f"in.{key}").movedim(-1, 1) for key in keys.split(separator)]
    size = None if separator == "+" else maps[0].shape[-2:]
    fused = fuse_features(maps, size)
    assert_close(fused.movedim(1, -1), case.tensor("out.features"), **case.tolerance)
