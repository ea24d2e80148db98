"""Scores where the truth is known: which objects are named, and do their words point at them.

Works on any corpus with named boxes; scenes write such a truth file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pixelllm.alignment import words_of
from pixelllm.evaluation.narrations import Narration
from pixelllm.generation import Caption
from pixelllm.tables import REPORT_FILE, Table

KINDS = ("relation_needed", "unseen", "heldout_pair")  # of expressions, beside plain, relational
Mentions = Callable[[str], list[tuple[int, int, str, str]]]  # start, end, colour, kind


@dataclass(frozen=True)
class ObjectTruth:
    """What an image shows; coordinates in [0, 1] of it."""

    names: list[tuple[str, str]]  # colour, kind
    boxes: np.ndarray  # float[O, 4]
    centers: np.ndarray  # float[O, 2]
    mentions: list[tuple[int, int, int]]  # start, end (characters of the reference), object
    is_held_out: bool  # has an object whose colour and kind never met in training
    # What kind the referring expressions are, by phrase id.
    expressions: dict[str, frozenset[str]] = field(default_factory=dict)


def load_truth(path: Path) -> dict[str, ObjectTruth]:
    """Truth by image id, from JSON lines. Raises ValueError naming the line that is none."""
    truth = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            entry = json.loads(line)
            truth[entry["image_id"]] = _read_truth(entry)
        except (ValueError, KeyError, TypeError) as error:
            wanted = "objects, mentions and expressions as data.scenes writes them"
            raise ValueError(f"{path}:{number}: not {wanted} ({error!r})") from error
    return truth


def _read_truth(entry: dict[str, Any]) -> ObjectTruth:
    objects = entry["objects"]
    return ObjectTruth(
        names=[(o["colour"], o["kind"]) for o in objects],
        boxes=np.array([o["box"] for o in objects]),
        centers=np.array([o["center"] for o in objects]),
        mentions=[(m["start"], m["end"], m["object"]) for m in entry["mentions"]],
        is_held_out=entry["heldout_pair"],
        expressions={
            f"referring/{e['sent_id']}": frozenset({e["kind"], *(k for k in KINDS if e[k])})
            for e in entry["expressions"]
        },
    )


def find_truth(table: Table) -> Path | None:
    """The truth file that data.scenes writes near the annotations a table was made from."""
    report = json.loads((table.path / REPORT_FILE).read_text())
    image_id = f'"image_id": "{table[0].id.rpartition("/")[2]}"'
    for file in map(Path, report.get("files", [])):
        for folder in (file.parent, file.parent.parent):
            for truth in sorted(folder.glob("*_truth.jsonl")):
                if image_id in truth.read_text():
                    return truth
    return None


def inside(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """bool[n], whether float[n, 2] points lie in float[n, 4] boxes."""
    return ((points >= boxes[:, :2]) & (points <= boxes[:, 2:])).all(-1)


def object_words(narration: Narration, truth: ObjectTruth) -> list[tuple[int, int]]:
    """(word, object) for the reference words that name an object, as far as tokens reach."""
    words = words_of(narration.phrase.caption)[: len(narration.word_boxes)]
    return [
        (word, index)
        for word, (start, end) in enumerate(words)
        for first, last, index in truth.mentions
        if start < last and first < end
    ]


def score_forced(
    narrations: Sequence[Narration], truths: Sequence[ObjectTruth], boxes: Sequence[np.ndarray]
) -> dict[str, float]:
    """Teacher-forced points of the words that name objects.

    Args:
        boxes: float[W, 4] per narration, of its reference words.

    Returns:
        The mean of |dx| and |dy| between a word's point and the middle of its piece of trace
        (`object_point_l1`) and the object's centre (`object_center_l1`), and the share of points
        in the object's box (`object_point_in_box`); nothing where no word names an object.
    """
    points, targets, centers, object_boxes = [], [], [], []
    for narration, truth, predicted in zip(narrations, truths, boxes, strict=True):
        for word, index in object_words(narration, truth):
            points.append(predicted[word].reshape(2, 2).mean(0))
            targets.append(narration.target_boxes[word].reshape(2, 2).mean(0))
            centers.append(truth.centers[index])
            object_boxes.append(truth.boxes[index])
    if not points:
        return {}
    points, targets, centers = np.array(points), np.array(targets), np.array(centers)
    return {
        "object_point_l1": float(np.nanmean(np.abs(points - targets))),
        "object_center_l1": float(np.abs(points - centers).mean()),
        "object_point_in_box": float(inside(points, np.array(object_boxes)).mean()),
    }


def score_generated(
    captions: Sequence[Caption | str], truths: Sequence[ObjectTruth], mentions: Mentions
) -> dict[str, float]:
    """Objects named in generated captions, and where their words point.

    Returns:
        Precision and recall of (colour, kind) pairs, each object found at most once; and the
        share of the words of rightly named objects whose point lies in that object's box (in the
        best box, where a scene has the pair twice). Plain strings have no points.
    """
    named = found = present = 0
    hits: list[bool] = []
    for caption, truth in zip(captions, truths, strict=True):
        text = caption if isinstance(caption, str) else caption.text
        mentioned = mentions(text)
        pairs = Counter((colour, kind) for _, _, colour, kind in mentioned)
        found += sum((pairs & Counter(truth.names)).values())
        named += sum(pairs.values())
        present += len(truth.names)
        if not isinstance(caption, str):
            hits += _pointing_hits(caption, truth, mentioned)
    scores = {"object_precision": found / max(named, 1), "object_recall": found / max(present, 1)}
    if hits:
        scores["generated_point_in_box"] = float(np.mean(hits))
    return scores


def _pointing_hits(
    caption: Caption, truth: ObjectTruth, mentioned: list[tuple[int, int, str, str]]
) -> list[bool]:
    hits = []
    for word, (start, end) in zip(caption.words, words_of(caption.text), strict=True):
        for first, last, colour, kind in mentioned:
            boxes = truth.boxes[[name == (colour, kind) for name in truth.names]]
            if start < last and first < end and len(boxes):
                point = np.broadcast_to(np.array(word.point), (len(boxes), 2))
                hits.append(bool(inside(point, boxes).any()))
    return hits
