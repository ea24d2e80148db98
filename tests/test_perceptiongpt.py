"""PerceptionGPT's network: the official forward pass and its gradients, and what goes together."""

from __future__ import annotations

import pytest
import torch
from conftest import PERCEPTION_TOLERANCE, load_perception, part_of, perception_names
from official_perception import official_network, our_name
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from pixelllm.markers import MarkerIds
from pixelllm.models.clip import PIXEL_MEAN, PIXEL_STD, FusedClip
from pixelllm.models.language import build_t5, build_trunk
from pixelllm.models.mask_encoder import MaskEncoder
from pixelllm.models.perceptiongpt import (
    Objects,
    PerceptionGPTNetwork,
    Tokens,
    draw_by_mask,
)
from pixelllm.models.vis_boxes import BoxDecoder, BoxEncoder
from pixelllm.models.vis_masks import VisMaskDecoder, VisMaskHead, resize_logits
from pixelllm.vis_losses import perception_losses


def pixels_of(images: Tensor) -> Tensor:
    """Official images are normalised; ours are in 0..255."""
    return images * torch.tensor(PIXEL_STD).view(3, 1, 1) + torch.tensor(PIXEL_MEAN).view(3, 1, 1)


@pytest.mark.parametrize("name", perception_names("forward"))
def test_golden_forward(name: str):
    case = load_perception(name)
    network = official_network(case)
    ids, labels, valid = (case[f"in.{k}"] for k in ("input_ids", "labels", "attention_mask"))
    tokens = Tokens(ids, valid == 0, labels != -100)
    every = torch.ones(len(case["in.boxes"]), dtype=torch.bool)
    objects = Objects(case["in.boxes"], case["in.masks"], every, ~every)
    images = pixels_of(case["in.images"])
    found = network(images, tokens, objects)
    inputs = network.embed(ids, network.view(images), objects)
    losses = perception_losses(found, tokens, objects, centre_reading=True, whole_batch=True)
    total = sum(losses.values())
    masks = resize_logits(found.masks, case["in.masks"].shape[1:]).sigmoid()
    seen = valid.bool()
    row, place = case["out.loc_positions"].unbind(1)
    for value, key in (
        (inputs, "inputs_embeds"),
        (found.hidden[row, place - 1], "loc_hidden"),
        (losses["text"], "loss_lm"),
        (losses["l1"] + losses["giou"], "loss_bbox"),
        (losses["bce"] + losses["dice"], "loss_mask"),
        (total, "loss"),
        (found.boxes, "pred_boxes"),
        (masks[:, None], "pred_masks"),
    ):
        assert_close(value, case[f"out.{key}"], **PERCEPTION_TOLERANCE, msg=lambda m, k=key: k + m)
    assert_close(found.hidden[seen], case["out.hidden"][seen], **PERCEPTION_TOLERANCE)
    logits = network.language.logits(found.hidden)
    assert_close(logits[seen], case["out.logits"][seen], **PERCEPTION_TOLERANCE)
    assert torch.equal(found.is_target, case["in.box_owner"][:, 1].bool())
    total.backward()
    gradients = part_of(case, "out.grad.")
    assert gradients
    for key, expected in gradients.items():
        gradient = network.get_parameter(our_name(key)).grad
        assert_close(gradient, expected, **PERCEPTION_TOLERANCE, msg=lambda m, k=key: k + m)


PAD, BOS, EOS = 0, 1, 2
MARKS = MarkerIds(*range(30, 38))
IMAGE = [MARKS.image_start, *[MARKS.image] * 4, MARKS.image_end]


def tiny_network(seed: int = 0, width: int = 16, **sizes: int) -> PerceptionGPTNetwork:
    """A whole PerceptionGPT that runs in milliseconds; its boxes depend on what it reads."""
    torch.manual_seed(seed)
    vit = {"hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 3}
    vit |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    llama = {"vocab_size": 38, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    llama |= {"num_attention_heads": 2, "pad_token_id": PAD, "bos_token_id": BOS}
    trunk = build_trunk(LlamaConfig(**(llama | sizes), eos_token_id=EOS, initializer_range=0.3))
    network = PerceptionGPTNetwork(
        FusedClip(CLIPVisionModel(CLIPVisionConfig(**vit)), fine_patch=8),
        nn.Linear(width, 24),
        trunk,
        BoxEncoder(24, 16),
        BoxDecoder(24, 16),
        MaskEncoder(24, size=32, bottleneck=8),
        VisMaskHead(24, VisMaskDecoder(width, num_heads=2, mlp_width=24)),
        MARKS,
    )
    for layer in (*network.box_encoder.layers, *network.box_decoder.layers):
        nn.init.normal_(layer.weight, std=0.5)
        nn.init.uniform_(layer.bias, -0.3, 0.3)
    return network.eval()


@pytest.fixture
def network() -> PerceptionGPTNetwork:
    return tiny_network()


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (3, 3, 32, 32), generator=generator, dtype=torch.uint8)


def batch_of(rows: list[tuple[list[int], list[int]]]) -> Tokens:
    """Questions and answers, padded on the right."""
    length = max(len(question) + len(answer) for question, answer in rows)
    token_ids = torch.full((len(rows), length), PAD)
    padding = torch.ones(len(rows), length, dtype=torch.bool)
    is_answer = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, (question, answer) in enumerate(rows):
        end = len(question) + len(answer)
        token_ids[row, :end] = torch.tensor(question + answer)
        padding[row, :end] = False
        is_answer[row, len(question) : end] = True
    return Tokens(token_ids, padding, is_answer)


WORDS = ([BOS, *IMAGE, 5, 6], [7, 8, EOS])
LOCATE = ([BOS, *IMAGE, 9], [MARKS.vis_start, MARKS.vis, MARKS.vis, MARKS.vis_end, EOS])
DESCRIBE = ([BOS, *IMAGE, MARKS.vis, 10], [11, EOS])
ROUND = ([BOS, *IMAGE, MARKS.vis, 12], [13, MARKS.vis, EOS])


def objects_of(num: int, generator: torch.Generator, has_mask: list[bool] | None = None) -> Objects:
    has = torch.tensor([True] * num if has_mask is None else has_mask)
    masks = (torch.rand(int(has.sum()), 32, 32, generator=generator) > 0.5).float()
    boxes = torch.rand(num, 4, generator=generator)
    return Objects(boxes, masks, has, torch.zeros_like(has))


def test_objects_keep_their_image_beside_texts_without_any(
    network: PerceptionGPTNetwork, images: Tensor, generator: torch.Generator
):
    """The release takes the first images of the batch for those that have objects."""
    rows = [WORDS, DESCRIBE, LOCATE]
    objects = objects_of(3, generator)
    found = network(images, batch_of(rows), objects)
    assert found.is_target.tolist() == [False, True, True]
    alone = Objects(objects.boxes[1:], objects.masks[1:], *[part[1:] for part in objects[2:]])
    expected = network(images[2:], batch_of([LOCATE]), alone)
    assert_close(found.boxes, expected.boxes)
    assert_close(found.masks, expected.masks)
    other = network(images[:1], batch_of([LOCATE]), alone)
    assert not torch.allclose(found.masks, other.masks, atol=1e-3)


def test_texts_of_one_image_share_it(
    network: PerceptionGPTNetwork, images: Tensor, generator: torch.Generator
):
    rows, objects = [LOCATE, WORDS, ROUND, DESCRIBE], objects_of(5, generator)
    together = network(images[:2], batch_of(rows), objects)
    repeated = network(images[[0, 0, 1, 1]], batch_of(rows), objects)
    for found, expected in zip(together, repeated, strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_branches_are_read_as_texts_of_their_own(
    network: PerceptionGPTNetwork, images: Tensor, generator: torch.Generator, attention: str
):
    """Beside a text without any, and with padding on either side."""
    network.language.model.set_attn_implementation(attention)
    objects, shared = objects_of(5, generator), [BOS, *IMAGE]
    rows = [LOCATE, WORDS, DESCRIBE, ROUND]
    rests = [(question[len(shared) :], answer) for question, answer in rows]
    apart = network(images[[0, 0, 0, 1]], batch_of(rows), objects)
    tokens = batch_of(
        [(shared, [t for question, answer in rests[:3] for t in question + answer]), rows[3]]
    )
    is_answer, branches = torch.zeros_like(tokens.is_answer), torch.zeros_like(tokens.token_ids)
    place = len(shared)
    for branch, (question, answer) in enumerate(rests[:3], start=1):
        end = place + len(question) + len(answer)
        branches[0, place:end], is_answer[0, end - len(answer) : end] = branch, True
        place = end
    is_answer[1] = tokens.is_answer[1]
    branched = tokens._replace(is_answer=is_answer, branches=branches)
    for pad in ((0, 0), (0, 2), (2, 0)):
        padded = Tokens(
            nn.functional.pad(tokens.token_ids, pad, value=PAD),
            nn.functional.pad(tokens.padding, pad, value=True),
            *(nn.functional.pad(part, pad) for part in branched[2:]),
        )
        found = network(images[:2], padded, objects)
        for part in ("logits", "boxes", "masks"):
            assert_close(getattr(found, part), getattr(apart, part))


def test_padding_changes_nothing(
    network: PerceptionGPTNetwork, images: Tensor, generator: torch.Generator
):
    """On either side: positions count from the first token."""
    objects = objects_of(2, generator)
    tokens = batch_of([LOCATE])
    plain = network(images[:1], tokens, objects)
    for pad in ((0, 3), (3, 0)):
        padded = Tokens(
            nn.functional.pad(tokens.token_ids, pad, value=PAD),
            nn.functional.pad(tokens.padding, pad, value=True),
            nn.functional.pad(tokens.is_answer, pad, value=False),
        )
        found = network(images[:1], padded, objects)
        for part in ("logits", "boxes", "masks"):
            assert_close(getattr(found, part), getattr(plain, part))


def test_a_box_is_read_after_it_is_written(
    network: PerceptionGPTNetwork, images: Tensor, generator: torch.Generator
):
    """The state that predicts an object must not know its box, all later ones must."""
    objects = objects_of(2, generator)
    found = network(images[:1], batch_of([LOCATE]), objects)
    boxes = objects.boxes.clone()
    boxes[0] = 1 - boxes[0]
    moved = network(images[:1], batch_of([LOCATE]), objects._replace(boxes=boxes))
    assert_close(moved.boxes[0], found.boxes[0])
    assert_close(moved.masks[0], found.masks[0])
    assert (moved.boxes[1] - found.boxes[1]).abs().max() > 1e-4


def test_masks_are_predicted_where_there_is_one_to_compare_with(
    network: PerceptionGPTNetwork, images: Tensor, generator: torch.Generator
):
    rows = batch_of([LOCATE, ROUND])
    every, some = objects_of(4, generator), [False, True, True, False]
    found = network(images[:2], rows, every)
    fewer = every._replace(masks=every.masks[1:3], has_mask=torch.tensor(some))
    part = network(images[:2], rows, fewer)
    assert_close(part.masks, found.masks[1:2])
    losses = perception_losses(part, rows, fewer)
    alone = perception_losses(
        part._replace(masks=found.masks[1:2]), rows, fewer._replace(masks=every.masks[1:3])
    )
    assert_close(losses, alone)


def test_an_object_can_be_read_as_its_mask(
    network: PerceptionGPTNetwork, images: Tensor, generator: torch.Generator
):
    objects = objects_of(2, generator, [False, True])
    as_mask = objects._replace(by_mask=torch.tensor([False, True]))
    seen = network.embed_objects(as_mask)
    assert_close(seen[0], network.embed_objects(objects)[0])
    assert_close(seen[1], network.mask_encoder(objects.masks)[0])


def test_the_switch_of_inputs():
    torch.manual_seed(0)
    has_mask = torch.arange(200) < 150
    assert not draw_by_mask("box", has_mask).any()
    assert torch.equal(draw_by_mask("mask", has_mask), has_mask)
    drawn = draw_by_mask("random", has_mask)
    assert 50 < drawn.sum() < 100 and not drawn[150:].any()


def test_every_parameter_learns(
    network: PerceptionGPTNetwork, images: Tensor, generator: torch.Generator
):
    objects = objects_of(3, generator)._replace(by_mask=torch.tensor([True, False, False]))
    tokens = batch_of([DESCRIBE, LOCATE])
    sum(
        perception_losses(network(images[:2], tokens, objects), tokens, objects).values()
    ).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_a_batch_of_words_alone_trains(network: PerceptionGPTNetwork, images: Tensor):
    tokens, objects = batch_of([WORDS, WORDS]), Objects.of_boxes(torch.zeros(0, 4))
    losses = perception_losses(network(images[:2], tokens, objects), tokens, objects)
    assert losses.pop("text") > 1 and all(loss == 0 for loss in losses.values())


def test_texts_without_an_image_are_read(network: PerceptionGPTNetwork, images: Tensor):
    """They must not take the visual tokens of the next image."""
    objects = Objects.of_boxes(torch.zeros(0, 4))
    blind = ([BOS, 5], [6, EOS])
    found = network(images[:2], batch_of([blind, WORDS]), objects)
    alone = network(images[1:2], batch_of([WORDS]), objects)
    assert_close(found.logits[2:], alone.logits)


@pytest.mark.parametrize("num_boxes", [1, 3])
def test_another_number_of_boxes_is_refused(
    network: PerceptionGPTNetwork, images: Tensor, num_boxes: int
):
    objects = Objects.of_boxes(torch.zeros(num_boxes, 4))
    with pytest.raises(ValueError, match=f"2 <vis> in the texts, but {num_boxes} boxes"):
        network(images[:1], batch_of([LOCATE]), objects)


def test_an_image_cut_short_is_refused(network: PerceptionGPTNetwork, images: Tensor):
    objects = Objects.of_boxes(torch.zeros(0, 4))
    cut = ([BOS, MARKS.image_start, MARKS.image, MARKS.image], [EOS])
    with pytest.raises(ValueError, match="text 1 has 2 image markers, but .* 4 visual tokens"):
        network(images[:2], batch_of([WORDS, cut]), objects)


def test_a_trunk_without_the_markers_is_refused():
    with pytest.raises(ValueError, match="embeddings for 36 tokens, but the markers end at .* 37"):
        tiny_network(vocab_size=36)


def test_a_trunk_with_an_encoder_is_refused(network: PerceptionGPTNetwork):
    network.language = build_t5(38, 24, 1, 1, 2, 32)
    parts = {name: part for name, part in network.named_children()}
    with pytest.raises(ValueError, match="causal language model, not with EncoderDecoder"):
        PerceptionGPTNetwork(**parts, markers=MARKS)
