"""Where CenterNet's cells lie, what they should say, and what they lose."""

from __future__ import annotations

import pytest
import torch
from conftest import golden_names, load_golden
from torch.testing import assert_close

from pixelllm.centers import center_losses, center_targets, pyramid_cells

OFFICIAL = (8, 16, 32, 64, 128)
SIDES = (54, 27, 13, 7, 4)  # of the release's maps at 384 px


def maps(sides: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(1, 1, side, side) for side in sides]


@pytest.mark.parametrize("name", golden_names("box_decoder"))
def test_golden_center_targets(name: str):
    case = load_golden(name)
    h = case.hparams
    levels = [
        case.tensor(f"out.heatmap_l{i}").permute(0, 3, 1, 2) for i in range(len(h["strides"]))
    ]
    cells = pyramid_cells(levels, h["strides"], [tuple(map(float, r)) for r in h["fpn_range"]])
    assert_close(cells.centers_px, case.tensor("out.grid"), **case.tolerance)
    targets = center_targets(case.tensor("in.gt_boxes"), case.tensor("in.gt_classes") > 0, cells)
    heat, ltrb = case.tensor("out.gt_heatmaps")[..., 0], case.tensor("out.gt_regs")
    assert_close(targets.heatmap, heat, **case.tolerance)
    assert torch.equal(targets.heatmap == 1, heat == 1)
    inside = ltrb.amax(-1) >= 0
    assert torch.equal(targets.is_inside, inside)
    assert_close(targets.ltrb[inside], ltrb[inside], **case.tolerance)


def official_example() -> tuple[torch.Tensor, torch.Tensor]:
    boxes = [[100, 80, 220, 200], [10, 10, 30, 40], [0, 0, 384, 288], [0, 0, 0, 0]]
    return torch.tensor([boxes], dtype=torch.float32), torch.ones(1, 4, dtype=torch.bool)


def test_the_release_s_strides_give_its_targets_and_losses():
    """Numbers of the official code at 384 px, on its default ranges of sizes."""
    cells = pyramid_cells(maps(SIDES), OFFICIAL)
    targets = center_targets(*official_example(), cells)
    assert targets.is_inside.sum() == 27
    peaks = {
        tuple(cells.centers_px[cell].tolist()): targets.ltrb[0, cell].tolist()
        for cell in (targets.heatmap[0] == 1).nonzero()[:, 0]
    }
    assert peaks == {
        (176.0, 144.0): [2.375, 2.0, 1.375, 1.75],
        (20.0, 28.0): [1.25, 2.25, 1.25, 1.5],
        (224.0, 160.0): [3.5, 2.5, 2.5, 2.0],
    }
    M = len(cells.strides)
    losses = center_losses(torch.full((1, M), -4.6), torch.full((1, M, 4), 4.0), targets)
    assert_close(
        torch.stack(losses), torch.tensor([1.129676, 0.000868, 0.745530]), atol=1e-5, rtol=0
    )


def test_a_cell_on_the_centre_of_another_level_s_object_is_no_peak():
    """Catches heat of exactly 1 where the distance happens to be 0."""
    cells = pyramid_cells(maps(SIDES), OFFICIAL)
    box = torch.tensor([[[19.0, 19, 29, 29]]])  # for level 3; its centre is that of a level 4 cell
    heatmap = center_targets(box, torch.tensor([[True]]), cells).heatmap
    assert cells.strides[heatmap[0] == 1].tolist() == [8] and (heatmap > 0.999).sum() == 2


def test_targets_decode_to_their_boxes():
    boxes, valid = official_example()
    cells = pyramid_cells(maps(SIDES), [384 / side for side in SIDES])
    targets = center_targets(boxes, valid, cells)
    decoded = cells.boxes(targets.ltrb)[targets.is_inside]
    nearest = (decoded[:, None] - boxes).abs().amax(-1).amin(1)
    assert len(decoded) >= 27 and nearest.max() < 1e-3


def test_only_true_strides_place_a_cell_on_what_it_sees():
    """Catches the release's misplacement: its last column lies beyond the image."""
    true = pyramid_cells(maps(SIDES), [384 / side for side in SIDES])
    nominal = pyramid_cells(maps(SIDES), OFFICIAL)
    row = torch.arange(54 * 54, 54 * 54 + 27)  # the first row of the 27 x 27 map
    seen = (torch.arange(27) + 0.5) * 384 / 27
    assert_close(true.centers_px[row, 0], seen)
    assert nominal.centers_px[row, 0].max() > 384
    peak = center_targets(torch.tensor([[[320.0, 320, 380, 380]]]), torch.tensor([[True]]), true)
    cell = true.centers_px[(peak.heatmap[0] == 1) & (true.strides == 384 / 27)]
    assert (cell - 350).abs().max() <= 384 / 27 / 2


def test_every_size_has_a_level():
    """Catches ranges that leave a gap where the strides are not powers of two."""
    sides = torch.arange(4.0, 160, 1.5)
    boxes = torch.stack([80 - sides / 2, 80 - sides / 2, 80 + sides / 2, 80 + sides / 2], dim=1)
    cells = pyramid_cells(maps((20, 10, 5, 3, 2)), [8, 16, 32, 160 / 3, 80])
    targets = center_targets(boxes[:, None], torch.ones(len(boxes), 1, dtype=torch.bool), cells)
    assert (targets.heatmap == 1).any(1).all()


def test_without_objects_only_the_heat_learns():
    cells = pyramid_cells(maps((4, 2)), [8, 16])
    targets = center_targets(torch.rand(1, 2, 4) * 30, torch.zeros(1, 2, dtype=torch.bool), cells)
    logits = torch.zeros(1, 20, requires_grad=True)
    positive, negative, giou = center_losses(logits, torch.ones(1, 20, 4), targets)
    assert positive == giou == 0 and negative > 0
    (positive + negative + giou).backward()
    assert (logits.grad > 0).all()
