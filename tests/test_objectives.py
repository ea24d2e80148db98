"""Each source computes its own terms, on the rows and parameters they are meant for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import JOINT_SOURCES, joint_tables, make_tiny_joint_config
from torchvision.ops import box_iou

from pixelllm.batches import Batch
from pixelllm.config import LossConfig
from pixelllm.mixture import Mixture
from pixelllm.models.pixelllm import Prediction
from pixelllm.pretrained import PixelLLM
from pixelllm.tables import Table
from pixelllm.training.captioning import build_stage, text_limits
from pixelllm.training.objectives import (
    located_mask_loss,
    places_loss,
    propose,
    weighted_losses,
    words_loss,
)

TERMS = {
    "narration": {"text", "point"},
    "region": {"detection", "text"},
    "referring": {"point", "mask"},
}


@pytest.fixture(scope="module")
def tables(tiny_tables) -> list[Table]:
    return [Table(path) for path in joint_tables(tiny_tables)[0]]


@pytest.fixture(scope="module")
def model(tables) -> PixelLLM:
    """Untrained, but for the gate of the masks, which is open."""
    torch.manual_seed(0)
    config = make_tiny_joint_config()
    model = build_stage(config, tables, tables, torch.device("cpu")).model.eval()
    torch.nn.init.constant_(model.mask_head.adapter.alpha, 0.5)
    return model


def draw(model: PixelLLM, tables: list[Table], task: str, **changes) -> Batch:
    """A batch of the tiny joint recipe's source of this task."""
    source = next(source for source in JOINT_SOURCES if source.task == task)
    facts = {"frame": 48, "batch_size": 4, "num_steps": 1, "seed": 0}
    limits = text_limits(model.config, model)
    return Mixture(tables, [replace(source, **changes)], model.tokenizer, limits, **facts)[0]


def read(model: PixelLLM, batch: Batch) -> Prediction:
    features = model.encode(batch.images, batch.sizes, {})
    return model.read(features, batch.sizes, batch.boxes, batch.text)


def gradients(model: PixelLLM, loss: torch.Tensor) -> set[str]:
    """Parameters that the loss moves."""
    model.zero_grad()
    loss.backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    return moved


@pytest.mark.parametrize("task", TERMS)
def test_a_source_computes_its_own_terms_alone(task: str, model, tables, monkeypatch):
    """The detector or the masks of a batch that has no use for them would cost a third of it."""

    def refuse(*_):
        raise AssertionError("computed without a weight")

    if "detection" not in TERMS[task]:
        monkeypatch.setattr(model.detector, "forward", refuse)
    if "mask" not in TERMS[task]:
        monkeypatch.setattr(model, "segment", refuse)
    terms = weighted_losses(model, draw(model, tables, task), model.config.loss)
    assert terms.keys() == TERMS[task]
    assert all(term > 0 for term in terms.values())


def test_terms_weigh_what_recipe_and_source_say(model, tables):
    plain = draw(model, tables, "referring")
    source = replace(plain.source, text_weight=2.0, point_weight=0.5, mask_weight=3.0)
    recipe = LossConfig(text=3.0, point=8.0, mask=2.0, smoothing=0.0)
    with torch.no_grad():
        found = weighted_losses(model, replace(plain, source=source), recipe)
        prediction = read(model, plain)
        features = model.encode(plain.images, plain.sizes, {})
        expected = {
            "text": 6 * words_loss(prediction, plain, model.language.eos_id, 0.0),
            "point": 4 * places_loss(prediction, plain, 48),
            "mask": 6 * located_mask_loss(model, features, prediction, plain),
        }
    torch.testing.assert_close(found, expected)


def test_an_expression_learns_the_point_of_its_last_word_alone(model, tables):
    batch = draw(model, tables, "referring")
    prediction = read(model, batch)
    prediction.points.retain_grad()
    places_loss(prediction, batch, 48).backward()
    moved = prediction.points.grad.flatten(2).any(-1)
    last = (~batch.text.token_padding).sum(1) - 2  # the end token comes after it
    rows = (~batch.row_padding).nonzero()[:, 0]
    assert len(rows) > 4
    assert moved.nonzero().tolist() == [[row, last[row]] for row in rows]


def test_expressions_that_learn_at_every_word_count_alike_however_long(model, tables):
    batch = draw(model, tables, "referring", mask_weight=0.0, every_word=True)
    prediction = read(model, batch)
    rows = [
        places_loss(prediction, replace(batch, row_padding=alone.logical_not()), 48)
        for alone in torch.eye(len(batch.row_padding), dtype=torch.bool)[~batch.row_padding]
    ]
    lengths = batch.with_points[~batch.row_padding].sum(1)
    assert len(rows) > 4 and lengths.min() > 1 and lengths.min() < lengths.max()
    torch.testing.assert_close(places_loss(prediction, batch, 48), torch.stack(rows).mean())


def test_narrations_learn_the_points_of_many_words(model, tables):
    batch = draw(model, tables, "narration")
    prediction = read(model, batch)
    prediction.points.retain_grad()
    places_loss(prediction, batch, 48).backward()
    assert (prediction.points.grad.flatten(2).any(-1).sum(1) > 5).all()


def test_masks_teach_the_adapter_but_neither_boxes_nor_the_frozen_decoder(model, tables):
    batch = draw(model, tables, "referring", point_weight=0.0)
    loss = weighted_losses(model, batch, model.config.loss)["mask"]
    moved = {name for name in gradients(model, loss) if not name.startswith("language.")}
    adapter = {n for n in moved if n.startswith("mask_head.adapter.")}
    assert {"alpha", "output_tokens", "prefix_projection.1.weight"} <= {
        name.removeprefix("mask_head.adapter.") for name in adapter
    }
    others = {name.split(".")[0] for name in moved - adapter}
    assert others == {"extractor", "projection"}  # no point head, no encoder, no decoder


def test_masks_are_learnt_where_an_expression_has_one(model, tables):
    """A phrase whose mask left the view, or a row of padding, would teach empty masks."""
    batch = draw(model, tables, "referring")
    features = model.encode(batch.images, batch.sizes, {})
    prediction = read(model, batch)
    masks = batch.masks.clone()
    masks[0] = False
    with torch.no_grad():
        some = located_mask_loss(model, features, prediction, replace(batch, masks=masks))
        padding = batch.row_padding.clone().view(len(batch), -1)
        padding[0] = True
        padded = replace(batch, row_padding=padding.flatten())
        torch.testing.assert_close(
            some, located_mask_loss(model, features, prediction, padded), rtol=1e-6, atol=1e-6
        )
        assert some != located_mask_loss(model, features, prediction, batch)


def test_proposals_take_the_place_of_the_prompts(model, tables):
    """Each asks for the phrase of the object it lies on; one on no object asks for nothing."""
    batch = draw(model, tables, "region", proposals_per_image=8)
    torch.manual_seed(0)
    _, asked = propose(model, model.encode(batch.images, batch.sizes, {}), batch)
    assert asked.boxes.shape == (4, 8, 4) and asked.num_prompts == 8
    assert asked.boxes.min() >= 0 and asked.boxes.max() <= 1
    truth = dict(zip(batch.ids, batch.boxes.flatten(0, 1), strict=True))
    captions = dict(zip(batch.ids, batch.text.token_ids.tolist(), strict=True))
    kept = (~asked.row_padding).nonzero()[:, 0].tolist()
    assert 4 <= len(kept) < 32
    for row in kept:
        name, box = asked.ids[row], asked.boxes.flatten(0, 1)[row]
        assert box_iou(box[None], truth[name][None]) >= 0.6
        assert asked.text.token_ids[row].tolist() == captions[name]


def test_proposals_on_nothing_carry_no_words(model, tables):
    batch = draw(model, tables, "region", proposals_per_image=8)
    torch.manual_seed(0)
    _, asked = propose(model, model.encode(batch.images, batch.sizes, {}), batch)
    with torch.no_grad():
        prediction = read(model, asked)
    found = words_loss(prediction, asked, model.language.eos_id, 0.0)
    targets = asked.text.token_ids[:, 1:]
    chances = prediction.logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    counted = ~asked.text.token_padding[:, 1:] & ~asked.row_padding[:, None]
    torch.testing.assert_close(found, -chances[counted].mean())


def test_rows_that_share_the_whole_image_are_rows_that_repeat_it(model, tables):
    """Visual tokens of the whole image are computed once for all phrases of an image."""
    batch = draw(model, tables, "referring", text_weight=1.0)
    assert batch.boxes.shape == (4, 1, 4) and batch.num_prompts == 3
    apart = replace(batch, boxes=batch.boxes.expand(-1, 3, -1))
    with torch.no_grad():
        shared = weighted_losses(model, batch, model.config.loss)
        repeated = weighted_losses(model, apart, model.config.loss)
    assert shared.keys() == {"text", "point", "mask"}
    torch.testing.assert_close(shared, repeated)
