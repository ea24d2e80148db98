"""`eval.py` on boxes and expressions: contracted files, every example, other tools' formats."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Tables
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import eval as command
from pixelllm.evaluation import boxes
from pixelllm.evaluation.meteor import unavailable_reason
from pixelllm.tables import Table, write_table

needs_meteor = pytest.mark.skipif(unavailable_reason() is not None, reason="no METEOR tables")


def run(folder: Path, task: str, table: Path, out: Path, **changes) -> dict:
    options = {"run": folder, "task": task, "data": table, "out": out, "device": "cpu", **changes}
    command.evaluate(command.Options(**options))
    return json.loads((out / f"{task}.json").read_text())


def phrases_of(table: Path, task: str) -> list:
    rows = Table(table)
    found = [rows[int(row)] for row in rows.positions(task)]
    return [(record, p) for record in found for p in record.phrases if p.task == task]


@pytest.mark.parametrize("task", ["region", "dense"])
def test_a_missing_meteor_is_found_before_the_model_works(
    task, tiny_joint, tiny_tables: Tables, tmp_path, monkeypatch
):
    monkeypatch.setattr(command, "unavailable_reason", lambda: "no tables; pip install them")
    with pytest.raises(ValueError, match=f"--task {task} needs METEOR: no tables; pip install"):
        run(tiny_joint, task, tiny_tables.val_described, tmp_path)


@pytest.mark.parametrize("task", ["referring", "segmentation"])
def test_every_expression_is_scored(
    task, tiny_joint, tiny_tables: Tables, tiny_scenes, tmp_path
) -> None:
    """Catches the official cut at 16, and images whose rows are filled up with padding."""
    known = phrases_of(tiny_tables.val_referring, "referring")
    result = run(tiny_joint, task, tiny_tables.val_referring, tmp_path, batch_size=4)
    assert result["num_examples"] == len(known) > 20
    assert {"box_precision", "box_iou", "plain_box_iou", "relational_box_iou"} <= set(
        result["metrics"]
    )
    assert ("mask_ciou" in result["metrics"]) == (task == "segmentation")
    trivial = {"box_precision", "box_iou"}
    if task == "segmentation":
        trivial |= {"mask_ciou", "mask_giou", "mask_precision"}
    assert set(result["baselines"]) >= trivial
    assert set(result["baselines"]) <= set(result["metrics"])
    entries = json.loads((tmp_path / f"{task}_results.json").read_text())
    assert Counter(e["id"] for e in entries) == Counter(p.id for _, p in known)
    captions = {p.id: p.caption for _, p in known}
    assert all(entry["expression"] == captions[entry["id"]] for entry in entries)
    assert all(("segmentation" in entry) == (task == "segmentation") for entry in entries)
    rescore(tiny_scenes, tmp_path / f"{task}_results.json", "segm" if len(task) > 9 else "bbox")


def test_expressions_without_masks_have_no_masks_to_score(tiny_joint, tiny_tables, tmp_path):
    bare = (
        replace(record, phrases=tuple(replace(p, mask=None) for p in record.phrases))
        for record in Table(tiny_tables.val_referring)
    )
    write_table(bare, tmp_path / "bare", {})
    with pytest.raises(ValueError, match="bare: its expressions have no masks; score their boxes"):
        run(tiny_joint, "segmentation", tmp_path / "bare", tmp_path)


def rescore(scenes: Path, results: Path, kind: str) -> None:
    """As others do; what has captions is no detection for pycocotools."""
    truth = COCO(scenes / "annotations" / "instances_val.json")
    scored = COCOeval(truth, truth.loadRes(str(results)), kind)
    scored.evaluate()
    scored.accumulate()
    scored.summarize()
    assert 0 <= scored.stats[0] <= 1


def test_batches_change_no_location(tiny_joint, tiny_tables: Tables, tmp_path) -> None:
    files = []
    for size in (1, 50):
        run(tiny_joint, "referring", tiny_tables.val_referring, tmp_path, batch_size=size)
        files.append(json.loads((tmp_path / "referring_results.json").read_text()))
    for one, many in zip(*files, strict=True):
        assert one["id"] == many["id"] and one["bbox"] == pytest.approx(many["bbox"], abs=1e-3)


def test_the_limit_counts_expressions(tiny_joint, tiny_tables: Tables, tmp_path) -> None:
    result = run(tiny_joint, "referring", tiny_tables.val_referring, tmp_path, limit=3)
    assert result["num_examples"] == 3


@needs_meteor
def test_every_region_is_captioned(tiny_joint, tiny_tables: Tables, tmp_path) -> None:
    known = phrases_of(tiny_tables.val_described, "region")
    result = run(tiny_joint, "region", tiny_tables.val_described, tmp_path)
    assert result["num_examples"] == len(known)
    names = {"all_attributes_right", "meteor", "cider_d", "rouge_l", "bleu_4", "grouped_meteor"}
    assert names <= set(result["metrics"])
    written = json.loads((tmp_path / "region_results.json").read_text())
    assert [entry["id"] for entry in written] == [phrase.id for _, phrase in known]
    assert len({entry["image_id"] for entry in written}) == len(known)


@needs_meteor
def test_dense_captions_are_written_for_other_tools(
    tiny_joint, tiny_tables: Tables, tiny_scenes, tmp_path
) -> None:
    """pycocotools finds the images of the annotation file in our results."""
    result = run(tiny_joint, "dense", tiny_tables.val_described, tmp_path, max_detections=5)
    assert result["num_examples"] == len(Table(tiny_tables.val_described))
    assert {"map", "map_detection"} <= set(result["metrics"]) & set(result["baselines"])
    entries = json.loads((tmp_path / "dense_results.json").read_text())
    assert entries and max(Counter(e["image_id"] for e in entries).values()) <= 5
    truth = COCO(tiny_scenes / "annotations" / "instances_val.json")
    assert {entry["image_id"] for entry in entries} <= set(truth.getImgIds())
    assert all({"bbox", "score", "caption"} <= entry.keys() for entry in entries)
    rescore(tiny_scenes, tmp_path / "dense_boxes.json", "bbox")


@needs_meteor
def test_a_run_without_captions_of_regions_has_a_baseline(tiny_run, tiny_tables, tmp_path) -> None:
    result = run(tiny_run.main, "region", tiny_tables.val_described, tmp_path)
    assert 0 <= result["baselines"]["all_attributes_right"] <= 1


@needs_meteor
def test_attributes_count_as_right_only_together() -> None:
    """Catches a share of single attributes, and references of unknown form that count."""
    references = {"a": ["a red car"], "b": ["a red car"], "c": ["sky"]}
    hypotheses = {"a": "a red car", "b": "a blue car", "c": "sky"}

    def attributes(text: str) -> tuple[str, ...] | None:
        return tuple(text.split()[1:]) or None

    scores = boxes.score_captions_of_boxes(hypotheses, references, attributes)
    assert scores["all_attributes_right"] == 0.5


@pytest.mark.parametrize("task", ["referring", "segmentation", "region", "dense"])
def test_a_table_of_another_task_is_named(task, tiny_joint, tiny_tables: Tables, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"{tiny_tables.val}: no '(referring|region)' phrases"):
        run(tiny_joint, task, tiny_tables.val, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("task", "part"), [("segmentation", "mask head"), ("dense", "detector")])
def test_a_model_without_the_part_is_named(task, part, tiny_run, tiny_tables, tmp_path) -> None:
    table = tiny_tables.val_referring if task == "segmentation" else tiny_tables.val_described
    with pytest.raises(ValueError, match=f"this model has no {part}"):
        run(tiny_run.main, task, table, tmp_path)
