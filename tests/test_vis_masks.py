"""PerceptionGPT's mask decoder: the official numbers, then our position code."""

from __future__ import annotations

import pytest
import torch
from conftest import PERCEPTION_TOLERANCE, load_perception, part_of, perception_names
from official_perception import official_mask_head, our_state
from torch.testing import assert_close

from pixelllm.models.vis_masks import VisMaskDecoder, VisMaskHead, sine_positions


@pytest.mark.parametrize("name", perception_names("mask_decoder"))
def test_golden_mask_decoder(name: str):
    case = load_perception(name)
    weights = part_of(case, "w.")
    mlp_width, width = weights["transformer.layers.0.mlp.lin1.weight"].shape
    depth = sum(key.endswith("norm4.bias") for key in weights)
    num_heads = int(case["in.num_heads"])
    decoder = VisMaskDecoder(width, depth, num_heads, mlp_width, release_positions=True)
    decoder.load_state_dict(our_state(weights))
    features, queries = (
        case["in.image_embeddings"].permute(0, 3, 1, 2),
        case["in.prompt_embeddings"],
    )
    h, w = features.shape[-2:]
    positions = decoder.positions(h, w, features.device)
    tokens, cells = decoder.transformer(features, positions.expand_as(features), queries[:, None])
    upscaled = decoder.output_upscaling(cells.mT.unflatten(2, (h, w)))
    for found, key in (
        (positions[None], "pos_nchw"),
        (positions.permute(2, 1, 0), "pos2d_raw"),
        (tokens, "tokens"),
        (cells, "src"),
        (upscaled, "upscaled"),
        (decoder.output_hypernetworks_mlp(tokens), "hyper"),
        (decoder(features, queries)[:, None], "masks"),
    ):
        assert_close(found, case[f"out.{key}"], **PERCEPTION_TOLERANCE, msg=lambda m, k=key: k + m)


@pytest.mark.parametrize("name", perception_names("predict_mask"))
def test_golden_predict_mask(name: str):
    case = load_perception(name)
    head = official_mask_head(part_of(case, "w."), int(case["in.num_heads"]))
    features, states = case["in.image_features"], case["in.loc_hidden"]
    assert_close(head.adapter(features), case["out.adapted"], **PERCEPTION_TOLERANCE)
    assert_close(head.query(states), case["out.prompt"], **PERCEPTION_TOLERANCE)
    side = int(features.shape[1] ** 0.5)
    masks = head(states, features.mT.unflatten(2, (side, side)), torch.arange(len(states)))
    assert_close(masks[:, None], case["out.masks"], **PERCEPTION_TOLERANCE)


def new_head() -> VisMaskHead:
    torch.manual_seed(0)
    return VisMaskHead(12, VisMaskDecoder(16, num_heads=2, mlp_width=24))


def test_every_cell_has_a_place_of_its_own():
    """The release's code gives the same to all rows of the left half."""
    code = sine_positions(6, 8, 16, torch.device("cpu")).flatten(1).T
    assert torch.cdist(code, code).fill_diagonal_(1).min() > 0.1


def test_masks_are_of_the_image_they_are_asked_of(generator: torch.Generator):
    head = new_head()
    states = torch.randn(3, 12, generator=generator)
    features = torch.randn(2, 16, 4, 4, generator=generator)
    together = head(states, features, torch.tensor([1, 0, 1]))
    for n, image in enumerate((1, 0, 1)):
        alone = head(states[n, None], features[image, None], torch.tensor([0]))
        assert_close(together[n, None], alone)


def test_no_states_give_no_masks(generator: torch.Generator):
    """A batch of questions alone has none."""
    features = torch.randn(2, 16, 4, 4, generator=generator)
    masks = new_head()(torch.zeros(0, 12), features, torch.zeros(0, dtype=torch.int64))
    assert masks.shape == (0, 32, 32)


def test_masks_leave_autocast_in_float32(generator: torch.Generator):
    head, features = new_head(), torch.randn(1, 16, 4, 4, generator=generator)
    inputs = torch.randn(1, 12, generator=generator), features, torch.tensor([0])
    with torch.autocast("cpu", torch.bfloat16):
        cast = head(*inputs)
    assert cast.dtype == torch.float32
    assert_close(cast, head(*inputs), rtol=0.1, atol=0.1)
