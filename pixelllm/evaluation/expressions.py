"""The referring tasks on a table: a box, and a mask, for every expression (reference, §12.2)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from pixelllm.batches import Prompted, TextLimits, fill
from pixelllm.config import Source
from pixelllm.contexts import REFERRING_CONTEXT
from pixelllm.evaluation.dense import Detection
from pixelllm.evaluation.referring import score_referred_boxes, score_referred_masks
from pixelllm.evaluation.report import Evaluation, Limits, Scores
from pixelllm.evaluation.results import coco_results, image_number
from pixelllm.locating import Location
from pixelllm.mask_codes import encode_mask
from pixelllm.mixture import assemble
from pixelllm.perceiving import PerceptionGPT
from pixelllm.pretrained import PixelLLM
from pixelllm.records import Box, Phrase, Record
from pixelllm.tables import Table
from pixelllm.views import open_record_image

TASK = "referring"
MIDDLE: Box = (0.25, 0.25, 0.75, 0.75)
Labels = Mapping[str, frozenset[str]]  # kinds of expressions by phrase id


@dataclass(frozen=True)
class Referred:
    """An expression of an image and where the model says it is."""

    record: Record
    phrase: Phrase
    location: Location


def predict_expressions(
    model: PixelLLM | PerceptionGPT,
    table: Table,
    limits: Limits,
    with_masks: bool,
    snap: bool = False,
) -> Iterator[Referred]:
    """Every expression of the table, images in order, with a progress bar.

    Raises ValueError where the table has none, or no masks to compare with.
    """
    rows = table.positions(TASK)
    if not len(rows):
        raise ValueError(f"{table.path}: no {TASK!r} phrases; make the table with data.refcoco")
    if with_masks and not table.has_masks(TASK):
        raise ValueError(
            f"{table.path}: its expressions have no masks; score their boxes with --task referring"
        )
    left = limits.limit or float("inf")
    for start in tqdm(range(0, len(rows), limits.batch_size), desc="expressions", unit="batch"):
        records = [table[int(row)] for row in rows[start : start + limits.batch_size]]
        if isinstance(model, PerceptionGPT):
            batch = _locate_in_chats(model, records, with_masks)
        else:
            batch = _locate(model, records, with_masks, snap)
        for found in batch:
            if left == 0:
                return
            left -= 1
            yield found


def _locate(model: PixelLLM, records: list[Record], with_masks: bool, snap: bool) -> list[Referred]:
    """All expressions of the records."""
    chosen = []
    for record in records:
        phrases = tuple(p for p in record.phrases if p.task == TASK)
        contexts = tuple(fill(REFERRING_CONTEXT, phrase) for phrase in phrases)
        chosen.append(Prompted(record, phrases, contexts))
    config, device = model.config, next(model.parameters()).device
    limits = TextLimits(model.language.bos_id, config.max_tokens, config.max_context)
    batch = assemble(
        chosen,
        model.tokenizer,
        limits,
        frame=config.model.frame,
        source=Source(TASK),
        cache=None,
    ).to(device)
    image_sizes = torch.tensor([record.size for record in records])
    views = (batch.images, batch.sizes, image_sizes, batch.boxes)
    locations = iter(model.locate(*views, *batch.text, batch.with_points, with_masks, snap))
    found = []
    for item in chosen:
        of_image = [next(locations) for _ in range(batch.num_prompts)]
        pairs = zip(item.phrases, of_image, strict=False)  # further rows fill up
        found += [Referred(item.record, phrase, location) for phrase, location in pairs]
    return found


def _locate_in_chats(
    model: PerceptionGPT, records: list[Record], with_masks: bool
) -> list[Referred]:
    """All expressions of the records."""
    phrases = [[p for p in record.phrases if p.task == TASK] for record in records]
    texts = [[phrase.context for phrase in of_image] for of_image in phrases]
    images = [open_record_image(record) for record in records]
    located = model.locate(images, texts, with_masks)
    return [
        Referred(record, phrase, location)
        for record, own, found in zip(records, phrases, located, strict=True)
        for phrase, location in zip(own, found, strict=True)
    ]


def evaluate_expressions(
    model: PixelLLM | PerceptionGPT,
    table: Table,
    limits: Limits,
    labels: Labels,
    with_masks: bool = False,
    snap: bool = False,
) -> Evaluation:
    """Score a table of expressions, and each kind of them that `labels` knows."""
    found = list(predict_expressions(model, table, limits, with_masks, snap))
    metrics = score_found(found, with_masks)
    for label in sorted(set().union(*labels.values())) if labels else ():
        of_kind = [item for item in found if label in labels.get(item.phrase.id, ())]
        if of_kind:
            scores = score_found(of_kind, with_masks)
            metrics |= {f"{label}_{name}": score for name, score in scores.items()}
    trivial = [replace(item, location=middle_of(item.record)) for item in found]
    task = "segmentation" if with_masks else "referring"
    return Evaluation(
        metrics=metrics,
        baselines=score_found(trivial, with_masks),
        num_examples=len(found),
        trivial="a box of half the image's sides in its middle",
        predictions={f"{task}_results.json": json.dumps(results(found))},
    )


def middle_of(record: Record) -> Location:
    """The trivial answer: a box of half the image's sides in its middle, as a mask too."""
    height, width = record.size
    mask = np.zeros(record.size, bool)
    mask[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    return Location(MIDDLE, 0.0, encode_mask(mask))


def score_found(found: list[Referred], with_masks: bool) -> Scores:
    boxes = {item.phrase.id: item.phrase.target_box for item in found}
    scores = score_referred_boxes({i.phrase.id: i.location.box for i in found}, boxes)
    if with_masks:
        known = [item for item in found if item.phrase.mask is not None]
        scores |= score_referred_masks(
            {item.phrase.id: item.location.mask for item in known},
            {item.phrase.id: item.phrase.mask for item in known},
            {item.phrase.id: boxes[item.phrase.id] for item in known},
        )
    return scores


def results(found: list[Referred]) -> list[dict]:
    """In COCO's results format, with each expression and its id."""
    entries = []
    for item in found:
        image_id, where = image_number(item.record.id), item.location
        detection = Detection(where.box, where.score, mask=where.mask)
        (entry,) = coco_results({image_id: [detection]}, {image_id: item.record.size})
        entries.append({**entry, "expression": item.phrase.caption, "id": item.phrase.id})
    return entries
