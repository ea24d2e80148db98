"""The box tasks on a table: captions of given boxes, and of boxes that the model finds itself.

Reference, §12.3 and §12.4; the scores are those of `regions` and `dense`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from tqdm import tqdm

from pixelllm.batches import frame_images
from pixelllm.evaluation.dense import Detection, Region, score_dense_captions
from pixelllm.evaluation.meteor import meteor_scores
from pixelllm.evaluation.narrations import random_captions
from pixelllm.evaluation.regions import grouped_references, score_region_captions
from pixelllm.evaluation.report import Evaluation, Limits, Scores
from pixelllm.evaluation.results import coco_results, image_number
from pixelllm.perceiving import PerceptionGPT
from pixelllm.pretrained import PixelLLM
from pixelllm.records import Box, Phrase, Record
from pixelllm.tables import Table
from pixelllm.views import open_record_image

TASK = "region"
MIDDLE: Box = (0.25, 0.25, 0.75, 0.75)
# The attributes that a caption names, None where it is not of a known form.
Attributes = Callable[[str], tuple[str, ...] | None]


def region_records(table: Table) -> Iterator[tuple[Record, list[Phrase]]]:
    """Records with their regions, in order. Raises ValueError where the table has none."""
    rows = table.positions(TASK)
    if not len(rows):
        raise ValueError(
            f"{table.path}: no {TASK!r} phrases; make the table with data.visual_genome"
        )
    for row in map(int, rows):
        record = table[row]
        yield record, [phrase for phrase in record.phrases if phrase.task == TASK]


@torch.no_grad()
def evaluate_regions(
    model: PixelLLM | PerceptionGPT,
    table: Table,
    limits: Limits,
    captions: Sequence[str],
    attributes: Attributes,
) -> Evaluation:
    """Caption every region of a table, with a progress bar.

    Args:
        captions: of the training data, for the baseline; without any, those of the table.
        attributes: of the captions; where it knows those of references, the share of captions
            that name the same is a score.
    """
    regions: dict[str, Region] = {}
    hypotheses: dict[str, str] = {}
    by_image, results = [], []
    images = tqdm(region_records(table), "regions", unit="image")
    for record, phrases in images:
        phrases = phrases[: (limits.limit or 10**9) - len(hypotheses)]
        if not phrases:
            break
        own = {p.id: Region(p.target_box or p.prompt_box, p.caption) for p in phrases}
        found = caption_regions(model, record, phrases, limits.beams)
        hypotheses |= {p.id: text for p, text in zip(phrases, found, strict=True)}
        regions |= own
        by_image.append(own)
        results += [
            {"image_id": _number(p.id), "id": p.id, "caption": hypotheses[p.id]} for p in phrases
        ]
    references = {name: [region.caption] for name, region in regions.items()}
    captions = captions or [region.caption for region in regions.values()]
    drawn = dict(zip(regions, random_captions(len(regions), captions), strict=True))
    groups = grouped_references(by_image)

    def scores_of(found: dict[str, str]) -> Scores:
        grouped = score_region_captions(found, groups)
        alone = score_captions_of_boxes(found, references, attributes)
        return alone | {f"grouped_{name}": score for name, score in grouped.items()}

    return Evaluation(
        metrics=scores_of(hypotheses),
        baselines=scores_of(drawn),
        num_examples=len(regions),
        trivial="a random training caption",
        predictions={"region_results.json": json.dumps(results)},
    )


def _number(phrase_id: str) -> int | str:
    """The image id of a region, which is an image of its own for COCO's tools."""
    name = phrase_id.removeprefix(f"{TASK}/")
    return int(name) if name.isdecimal() else name


def caption_regions(
    model: PixelLLM | PerceptionGPT, record: Record, phrases: Sequence[Phrase], num_beams: int
) -> list[str]:
    """A caption for the box, or mask, of every phrase of one image."""
    boxes = [phrase.prompt_box for phrase in phrases]
    if isinstance(model, PerceptionGPT):
        reads_masks = model.config.model.vis.read == "mask"
        masks = [[phrase.mask for phrase in phrases]] if reads_masks else None
        image = open_record_image(record)
        described = model.describe_boxes([image], [boxes], num_beams, masks)
        return [caption.text for caption in described[0]]
    device = next(model.parameters()).device
    images, sizes = (part.to(device) for part in frame_images([record], model.config.model.frame))
    features = model.encode(images, sizes, {})
    prompts = torch.tensor([boxes], device=device)
    context = model.region_context(len(boxes))
    found = model.caption_boxes(features, sizes, prompts, *context, num_beams=num_beams)
    return [caption.text for caption in found]


def score_captions_of_boxes(
    hypotheses: dict[str, str], references: dict[str, list[str]], attributes: Attributes
) -> Scores:
    """Scores of captions; `all_attributes_right` where references are of a known form."""
    scores = score_region_captions(hypotheses, references)
    known = {name: attributes(texts[0]) for name, texts in references.items()}
    right = [attributes(hypotheses[name]) == truth for name, truth in known.items() if truth]
    return {"all_attributes_right": sum(right) / len(right), **scores} if right else scores


def evaluate_dense(
    model: PixelLLM,
    table: Table,
    limits: Limits,
    captions: Sequence[str],
    max_detections: int = 100,
) -> Evaluation:
    """Find and caption the objects of every image with regions, with a progress bar."""
    chosen = list(islice(region_records(table), limits.limit))
    found: dict[str, list[Detection]] = {}
    for start in tqdm(range(0, len(chosen), limits.batch_size), desc="images", unit="batch"):
        records = [record for record, _ in chosen[start : start + limits.batch_size]]
        images, sizes = frame_images(records, model.config.model.frame)
        device = next(model.parameters()).device
        described = model.describe(
            images.to(device),
            sizes.to(device),
            max_detections=max_detections,
            num_beams=limits.beams,
        )
        for record, objects in zip(records, described, strict=True):
            found[record.id] = [Detection(o.box, o.score, o.caption.text) for o in objects]
    truths = {
        record.id: [Region(p.target_box or p.prompt_box, p.caption) for p in phrases]
        for record, phrases in chosen
    }
    captions = captions or [p.caption for _, phrases in chosen for p in phrases]
    drawn = random_captions(len(chosen), captions)
    middle = {name: [Detection(MIDDLE, 1.0, c)] for name, c in zip(truths, drawn, strict=True)}
    sizes = {image_number(record.id): record.size for record, _ in chosen}
    numbered = {image_number(name): objects for name, objects in found.items()}
    boxes = {name: [o._replace(caption=None) for o in some] for name, some in numbered.items()}
    return Evaluation(
        metrics=_main(score_dense_captions(found, truths, similarity)),
        baselines=_main(score_dense_captions(middle, truths, similarity)),
        num_examples=len(chosen),
        trivial="a box of half the sides in the middle, with a random training caption",
        predictions={
            "dense_results.json": json.dumps(coco_results(numbered, sizes)),
            "dense_boxes.json": json.dumps(coco_results(boxes, sizes)),  # for pycocotools
        },
    )


def similarity(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """METEOR of every caption, on raw text as the official evaluation has it."""
    return meteor_scores(captions, references)[1]


def _main(scores: Scores) -> Scores:
    """The two means first, then the precisions of boxes alone."""
    return {name: score for name, score in scores.items() if "_meteor" not in name}
