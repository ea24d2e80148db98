"""Batches: places of tokens, rows of padding, and that padding changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny_config
from PIL import Image

from pixelllm.batches import (
    WHOLE_IMAGE,
    Batch,
    Prompted,
    TextLimits,
    collate_text,
    encode_caption,
    encode_context,
    frame_images,
)
from pixelllm.config import Source
from pixelllm.mixture import assemble
from pixelllm.pretrained import PixelLLM
from pixelllm.records import Phrase, Piece, Record
from pixelllm.tokenizer import train_tokenizer
from pixelllm.training.objectives import places_loss, weighted_losses

TEXTS = ["a red car", "a red car and a very small blue ball", "a ball", "blue", "an object of "]
LIMITS = TextLimits(begin_id=0, max_tokens=48, max_context=8)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 3, 120)


def phrase(caption: str, number: int = 0, **fields) -> Phrase:
    left = 0.1 * number
    piece = Piece(0, len(caption), (left + 0.1, 0.3), (left, 0.2, left + 0.2, 0.4))
    return Phrase(f"p{number}-{caption}", "narration", caption, **{"pieces": (piece,), **fields})


def record(tmp_path, number: int, size=(32, 48)) -> Record:
    rng = np.random.default_rng(number)
    path = tmp_path / f"{number}.png"
    Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return Record(f"r{number}", size, (), path=str(path))


def prompted(item: Record, *phrases: Phrase, context: str = "") -> Prompted:
    return Prompted(item, phrases, (context,) * len(phrases))


def batch_of(tokenizer, *chosen: Prompted, source=None, frame: int = 48) -> Batch:
    source = source or Source("narration")
    return assemble(chosen, tokenizer, LIMITS, frame=frame, source=source, cache=None)


def test_captions_begin_and_end(tokenizer):
    ids, boxes = encode_caption(phrase("a red car"), tokenizer, LIMITS)
    assert ids[0] == LIMITS.begin_id and ids[-1] == tokenizer.eos_token_id
    assert np.isnan(boxes[[0, -1]]).all() and not np.isnan(boxes[1:-1]).any()


def test_a_long_caption_loses_its_end(tokenizer):
    """Reference, section 4.4: what is cut has no end token, so that the model goes on."""
    limits = replace(LIMITS, max_tokens=4)
    ids, boxes = encode_caption(phrase(TEXTS[1]), tokenizer, limits)
    whole, _ = encode_caption(phrase(TEXTS[1]), tokenizer, LIMITS)
    assert ids == whole[:4] and len(boxes) == 4
    assert tokenizer.eos_token_id not in ids


def test_a_target_box_is_the_place_of_every_word_without_trace(tokenizer):
    box = (0.1, 0.2, 0.3, 0.4)
    ids, boxes = encode_caption(phrase("a ball", pieces=(), target_box=box), tokenizer, LIMITS)
    assert np.allclose(boxes[1:-1], box) and np.isnan(boxes[[0, -1]]).all()


def test_an_expression_is_located_by_its_last_word_or_by_every_one(tokenizer, tmp_path):
    box = (0.1, 0.2, 0.3, 0.4)
    red = replace(phrase("a red car", pieces=(), target_box=box), task="referring")
    item = prompted(record(tmp_path, 0), red)
    last = batch_of(tokenizer, item, source=Source("referring")).with_points[0]
    every = batch_of(tokenizer, item, source=Source("referring", every_word=True)).with_points[0]
    assert last.tolist() == [False] * (len(last) - 2) + [True, False]
    assert every.tolist() == [False] + [True] * (len(last) - 2) + [False]


def test_a_mask_is_that_of_one_word():
    with pytest.raises(ValueError, match=r"'referring': every_word, mask_weight 1.0"):
        Source("referring", every_word=True, mask_weight=1.0)


def test_a_caption_without_place_has_no_points(tokenizer, tmp_path):
    batch = batch_of(tokenizer, prompted(record(tmp_path, 0), phrase("a ball", pieces=())))
    assert not batch.with_points.any() and torch.isfinite(batch.points).all()


def test_contexts_end_and_are_cut(tokenizer):
    ids, padding = encode_context(["a ball", "", TEXTS[1]], tokenizer, 4)
    end = tokenizer.eos_token_id
    first = ids[0][~padding[0]].tolist()
    assert first[-1] == end and tokenizer.decode(first[:-1]) == "a ball"
    assert padding[1].all()
    assert (~padding[2]).sum() == 4 and end not in ids[2].tolist()


def test_rows_keep_image_major_order_and_pad_missing_phrases(tokenizer, tmp_path):
    first, second = record(tmp_path, 0), record(tmp_path, 1, size=(48, 20))
    box = (0.5, 0.5, 0.75, 1.0)
    phrases = [phrase("a red car", 1), phrase("blue", 2, prompt_box=box), phrase("a ball", 3)]
    batch = batch_of(
        tokenizer,
        prompted(first, phrases[0]),
        prompted(second, *phrases[1:], context="an object of "),
    )
    assert batch.ids == ("p1-a red car", "", "p2-blue", "p3-a ball")
    assert batch.row_padding.tolist() == [False, True, False, False]
    assert batch.boxes.shape == (2, 2, 4)
    assert batch.boxes[1, 0].tolist() == list(box)
    assert batch.boxes[0].tolist() == [list(WHOLE_IMAGE)] * 2
    assert batch.sizes.tolist() == [[32, 48], [48, 20]]
    assert batch.text.context_padding.all(1).tolist() == [True, True, False, False]
    assert batch.text.token_padding[1].tolist() == [False] + [True] * (
        batch.text.token_ids.shape[1] - 1
    )
    row = batch.text.token_ids[2][~batch.text.token_padding[2]]
    assert tokenizer.decode(row[1:-1]) == "blue"
    assert not batch.with_points[1].any()
    x0 = batch.points[2][batch.with_points[2]][:, 0, 0]
    torch.testing.assert_close(x0, torch.full_like(x0, 0.2))


def test_corners_are_top_left_then_bottom_right(tokenizer):
    rows = collate_text([prompted(None, phrase("a ball", 1))], tokenizer, LIMITS)
    points = rows["points"][rows["with_points"]]
    expected = torch.tensor([[0.1, 0.2], [0.3, 0.4]]).expand_as(points)
    torch.testing.assert_close(points, expected)


def test_a_missing_image_names_its_record(tmp_path):
    lost = Record("corpus/7", (4, 4), (), path=str(tmp_path / "lost.jpg"))
    with pytest.raises(FileNotFoundError, match=r"record corpus/7: .*lost.jpg"):
        frame_images([lost], 48)


def test_a_truncated_image_names_its_record(tmp_path):
    item = record(tmp_path, 0)
    data = Path(item.path).read_bytes()
    cut = Record("corpus/8", item.size, (), data=data[: len(data) // 2])
    with pytest.raises(ValueError, match="record corpus/8: "):
        frame_images([cut], 48)


def test_rows_follow_the_phrases_that_new_prompts_ask_for(tokenizer, tmp_path):
    """An index into the wrong image would write the phrase of another picture."""
    batch = batch_of(
        tokenizer,
        prompted(record(tmp_path, 0), *(phrase(t, n) for n, t in enumerate(TEXTS[:3]))),
        prompted(record(tmp_path, 1), phrase("blue", 3), phrase("a ball", 4)),
    )
    boxes = torch.rand(2, 2, 4)
    asked = batch.with_prompts(
        boxes, torch.tensor([[2, 0], [1, 2]]), torch.tensor([[True, True], [False, True]])
    )
    assert asked.ids == ("p2-a ball", "p0-a red car", "p4-a ball", "")
    assert asked.row_padding.tolist() == [False, False, True, True]  # nothing there; no phrase
    assert asked.num_prompts == 2 and asked.boxes is boxes
    for name in ("points", "with_points"):
        assert torch.equal(getattr(asked, name), getattr(batch, name)[[2, 0, 4, 5]])
    for ours, theirs in zip(asked.text, batch.text, strict=True):
        assert torch.equal(ours, theirs[[2, 0, 4, 5]])
    assert torch.equal(asked.images, batch.images) and asked.source is batch.source


# --- the model on padded batches ---


@pytest.fixture(scope="module")
def model(tokenizer) -> PixelLLM:
    torch.manual_seed(0)
    config = make_tiny_config()
    language = replace(config.model.language, vocab_size=len(tokenizer))
    config = replace(config, model=replace(config.model, language=language))
    return PixelLLM(config, tokenizer).eval()


def forward(model: PixelLLM, batch: Batch):
    with torch.no_grad():
        features = model.encode(batch.images, batch.sizes, batch.features)
        prediction = model.read(features, batch.sizes, batch.boxes, batch.text)
        return prediction, weighted_losses(model, batch, model.config.loss)


def test_padding_changes_nothing(model, tokenizer, tmp_path):
    """A row alone, beside longer rows and beside rows of padding: same points, same losses."""
    first, second = record(tmp_path, 0), record(tmp_path, 1, size=(48, 20))
    own = prompted(first, phrase("a red car", 1), context="blue")
    alone = batch_of(tokenizer, own)
    longer = prompted(second, *(phrase(t, 2) for t in TEXTS[1:4]), context="a red car a ball")
    together = batch_of(tokenizer, own, longer)
    length = alone.text.token_ids.shape[1]
    assert together.text.token_ids.shape[1] > length
    assert together.text.context_ids.shape[1] > alone.text.context_ids.shape[1]
    assert together.row_padding.tolist() == [False, True, True, False, False, False]

    expected, losses = forward(model, alone)
    found, _ = forward(model, together)
    torch.testing.assert_close(found.points[0, :length], expected.points[0], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(found.logits[0, :length], expected.logits[0], atol=2e-5, rtol=1e-5)

    keep = torch.arange(6) != 0  # the losses of the row alone, out of the padded batch
    masked = replace(together, row_padding=together.row_padding | keep)
    _, again = forward(model, masked)
    for name, value in losses.items():
        torch.testing.assert_close(again[name], value, atol=2e-6, rtol=1e-5)


def test_padding_rows_carry_no_loss(model, tokenizer, tmp_path):
    """Whatever stands in a padding row, the losses stay."""
    first, second = record(tmp_path, 0), record(tmp_path, 1)
    batch = batch_of(
        tokenizer,
        prompted(first, phrase("a red car", 1)),
        prompted(second, phrase("blue", 2), phrase("a ball", 3)),
    )
    _, losses = forward(model, batch)
    assert batch.row_padding.tolist() == [False, True, False, False]
    filled = batch.text.token_ids.clone()
    filled[1] = 5
    no_padding = batch.text.token_padding.clone()
    no_padding[1] = False
    text = batch.text._replace(token_ids=filled, token_padding=no_padding)
    with_points = batch.with_points.clone()
    with_points[1] = True
    _, again = forward(model, replace(batch, text=text, with_points=with_points))
    for name, value in losses.items():
        torch.testing.assert_close(again[name], value)


def test_a_source_without_points_gives_the_point_head_no_gradient(model, tokenizer, tmp_path):
    chosen = [prompted(record(tmp_path, 0), phrase("a red car", 1))]
    for source, silent, speaking in (
        (Source("narration", point_weight=0.0), "point_head", "language"),
        (Source("narration", text_weight=0.0), "language.model.lm_head", "point_head"),
    ):
        model.zero_grad()
        batch = batch_of(tokenizer, *chosen, source=source)
        sum(weighted_losses(model, batch, model.config.loss).values()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert all(not g.any() for n, g in gradients.items() if n.startswith(silent))
        assert any(g.any() for n, g in gradients.items() if n.startswith(speaking))
    model.zero_grad()


def test_points_are_compared_in_units_of_the_frame(model, tokenizer, tmp_path):
    """An error in the short direction of an image is fewer pixels, hence a smaller loss."""
    batch = batch_of(tokenizer, prompted(record(tmp_path, 0, size=(24, 48)), phrase("blue", 1)))
    prediction, _ = forward(model, batch)
    losses = []
    for axis in (0, 1):
        points = batch.points.clone()
        points[..., axis] += 0.1
        moved = prediction._replace(points=points)
        losses.append(places_loss(moved, batch, model.config.model.frame))
    torch.testing.assert_close(losses[0], torch.tensor(0.1 / 2))
    torch.testing.assert_close(losses[1], losses[0] / 2)
