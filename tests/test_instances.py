"""Batches for the pretraining stages, and what those stages make of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY_EVA02, TINY_SAM, short_training
from PIL import Image
from pycocotools import mask as coco_mask

from pixelllm.checkpoints import save_config, save_weights
from pixelllm.config import Eva02Pretraining, SamPretraining
from pixelllm.records import Phrase, Record
from pixelllm.tables import Table, write_table
from pixelllm.training.instances import InstanceBatch, Instances, small_masks, words_of_regions
from pixelllm.training.naming import build_stage as naming_stage
from pixelllm.training.naming import load_eva02_run, patch_labels
from pixelllm.training.promptable import PromptableSam, load_sam_run, sample_points_px
from pixelllm.training.promptable import build_stage as promptable_stage

CPU = torch.device("cpu")


def region(number: int, box_px: tuple[int, int, int, int], size=(40, 80), **fields) -> Phrase:
    """A rectangle of an image, with mask and box."""
    x0, y0, x1, y1 = box_px
    mask = np.zeros(size, np.uint8, order="F")
    mask[y0:y1, x0:x1] = 1
    encoded = coco_mask.encode(mask)
    height, width = size
    box = (x0 / width, y0 / height, x1 / width, y1 / height)
    rle = {"size": list(size), "counts": encoded["counts"].decode()}
    defaults = {"prompt_box": box, "target_box": box, "mask": rle}
    return Phrase(f"region/{number}", "region", f"red thing{number}", **{**defaults, **fields})


@pytest.fixture
def table(tmp_path) -> Table:
    Image.new("RGB", (80, 40)).save(tmp_path / "image.png")
    phrases = (
        (region(0, (0, 0, 40, 40)), region(1, (57, 9, 71, 31))),
        (region(2, (16, 16, 48, 32)),),
        (region(3, (0, 0, 40, 40), mask=None), Phrase("c", "caption", "no name at all")),
    )
    records = (
        Record(f"r{i}", (40, 80), group, path=str(tmp_path / "image.png"))
        for i, group in enumerate(phrases)
    )
    write_table(records, tmp_path / "table", {})
    return Table(tmp_path / "table")


def instances(table: Table, **changes) -> Instances:
    facts = {"frame": 80, "batch_size": 3, "num_steps": 4, "objects_per_image": None, "seed": 0}
    return Instances([table], words_of_regions([table]), **{**facts, **changes})


def test_names_of_regions_alone_are_the_vocabulary(table):
    assert words_of_regions([table]) == ["red", "thing0", "thing1", "thing2", "thing3"]


def test_masks_lie_in_their_boxes(table):
    """In the padded frame at a quarter of its resolution; the image has twice its height below."""
    masks = small_masks(table[0].phrases, (40, 80), 80)
    assert masks.shape == (2, 20, 20) and masks.dtype == torch.bool
    expected = torch.zeros(2, 20, 20, dtype=torch.bool)
    expected[0, 0:10, 0:10] = True
    expected[1, 2:8, 14:18] = True
    assert torch.equal(masks, expected)


def test_images_with_fewer_objects_are_padded(table):
    batch = instances(table)[0]
    counts = {name.split("/")[1] for name in batch.ids}
    assert counts == {"0", "1", "2"} and batch.valid.sum() == 3
    assert batch.masks.shape == (3, 2, 20, 20) and batch.boxes.shape == (3, 2, 4)
    named = batch.words[batch.valid]
    assert named.sum(1).tolist() == [2, 2, 2] and not batch.words[~batch.valid].any()
    for boxes, masks, valid in zip(batch.boxes, batch.masks, batch.valid, strict=True):
        for box, mask in zip(boxes[valid], masks[valid], strict=True):
            rows, columns = mask.nonzero().unbind(1)
            assert box[0] * 20 <= columns.min() + 0.5 and columns.max() < box[2] * 20
            assert box[1] * 10 <= rows.min() + 0.5 and rows.max() < box[3] * 10


def test_a_batch_without_masks_has_no_loss_and_no_error(table, tmp_path):
    write_table([table[2]], tmp_path / "bare", {})
    bare = Table(tmp_path / "bare")
    batch = instances(bare, batch_size=2)[0]
    assert not batch.valid.any()
    sam = SamPretraining("x", 48, TINY_SAM, num_layers=1, mlp_width=16, train=short_training())
    eva02 = Eva02Pretraining("x", 48, TINY_EVA02, train=short_training())
    for build, config in ((promptable_stage, sam), (naming_stage, eva02)):
        terms = build(config, [bare], [bare], CPU).loss(instances(bare, frame=48)[0])
        assert all(term.item() == 0 for term in terms.values())


def test_batches_depend_on_seed_and_step(table):
    first, second = instances(table, objects_per_image=1), instances(table, objects_per_image=1)
    for step in (3, 0, 2):
        assert first[step].ids == second[step].ids
        assert torch.equal(first[step].masks, second[step].masks)
    assert {name for step in range(12) for name in first[step].ids} >= {"region/0", "region/1"}


def masks_batch(masks: torch.Tensor) -> InstanceBatch:
    B, K = masks.shape[:2]
    return InstanceBatch(
        images=torch.zeros(B, 3, 4, 4, dtype=torch.uint8),
        sizes=torch.full((B, 2), 4),
        boxes=torch.zeros(B, K, 4),
        masks=masks,
        words=torch.zeros(B, K, 1),
        valid=masks.flatten(2).any(2),
        ids=("a",) * K,
    )


def test_a_patch_belongs_to_the_object_that_covers_most_of_it():
    masks = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    masks[0, 0, :4, :3] = True  # 3/4 of the top left patch
    masks[0, 1, :4, 3:8] = True  # the rest of it, and the top right one
    masks[0, 1, 4, 0] = True  # 1/16 of the bottom left patch: too little
    index, is_object = patch_labels(masks_batch(masks), 2)
    assert index[0, 0].tolist() == [0, 1]
    assert is_object.tolist() == [[[True, True], [False, False]]]


def test_prompt_points_lie_on_their_object():
    torch.manual_seed(0)
    masks = torch.zeros(2, 3, 10, 10, dtype=torch.bool)
    masks[..., 2:4, 5:9] = True
    for _ in range(20):
        points = sample_points_px(masks, stride=4)
        assert points.shape == (2, 3, 2)
        x, y = points.unbind(-1)
        assert ((x > 20) & (x < 36) & (y > 8) & (y < 16)).all()


def test_both_prompts_reach_the_masks(table):
    """A box and a point must give other masks, and a box must not see the point beside it."""
    torch.manual_seed(0)
    config = SamPretraining("x", 48, TINY_SAM, num_layers=1, mlp_width=16)
    model = PromptableSam(config).eval()
    images, sizes = (
        torch.randint(0, 255, (1, 3, 48, 48), dtype=torch.uint8),
        torch.tensor([[48, 48]]),
    )
    points = torch.tensor([[[10.0, 20.0], [30.0, 5.0]]])
    boxes = torch.tensor([[[4.0, 4.0, 20.0, 30.0]]]).expand(1, 2, 4)
    with torch.no_grad():
        by_box, ious = model(images, sizes, points, boxes, torch.ones(1, 2, dtype=torch.bool))
        by_point, _ = model(images, sizes, points, boxes, torch.zeros(1, 2, dtype=torch.bool))
    assert by_box.shape == (1, 2, 1, 12, 12) and ious.shape == (1, 2, 1)
    torch.testing.assert_close(by_box[:, 0], by_box[:, 1])
    assert not torch.allclose(by_point[:, 0], by_point[:, 1])
    assert not torch.allclose(by_point[:, 0], by_box[:, 0])


@pytest.mark.parametrize(
    ("config", "build"),
    [
        (SamPretraining("s", 48, TINY_SAM, num_layers=1, mlp_width=16), promptable_stage),
        (Eva02Pretraining("e", 48, TINY_EVA02), naming_stage),
    ],
)
def test_every_parameter_of_a_stage_learns(config, build, tiny_tables):
    config = replace(config, train=short_training())
    tables = [Table(tiny_tables.train_regions)], [Table(tiny_tables.val_regions)]
    stage = build(config, *tables, CPU)
    sum(stage.loss(stage.batches[0]).values()).backward()
    silent = {n for n, p in stage.model.named_parameters() if p.grad is None or not p.grad.any()}
    # Masks as prompts, several masks for a point and positions of tables stay as they begin.
    assert not {n for n in silent if n.startswith(("image_encoder", "word_head", "box_head"))}
    with torch.no_grad():
        scores = stage.validate()
    assert all(0 <= score <= 1.5 for score in scores.values())


def test_runs_of_the_stages_come_back(tiny_run):
    config, sam = load_sam_run(tiny_run.sam)
    assert config.name == "tiny-sam" and not sam.training
    config, branch = load_eva02_run(tiny_run.eva02)
    assert config.name == "tiny-eva02" and branch.is_frozen is False and not branch.training


def test_a_run_of_the_other_stage_is_refused(tmp_path):
    config = Eva02Pretraining("e", 48, TINY_EVA02)
    save_config(config, tmp_path)
    save_weights(torch.nn.Linear(1, 1), tmp_path)
    with pytest.raises(ValueError, match="holds a Eva02Pretraining, expected a SamPretraining"):
        load_sam_run(tmp_path)
