"""The caption task on a table: one caption an image, against all that people wrote of it.

The protocol of COCO captions. For each image the model writes what it writes of a whole image in a
short caption's words (`pixelllm.contexts`, `pixelllm.templates`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch
from PIL.Image import Image
from tqdm import tqdm

from pixelllm.evaluation.captions import score_captions
from pixelllm.evaluation.meteor import score_meteor, unavailable_reason
from pixelllm.evaluation.narrations import random_captions
from pixelllm.evaluation.report import Evaluation, Limits, Scores
from pixelllm.evaluation.results import image_number
from pixelllm.perceiving import PerceptionGPT
from pixelllm.pretrained import PixelLLM
from pixelllm.tables import Table
from pixelllm.views import open_record_image

TASK = "caption"


@torch.no_grad()
def evaluate_captions(
    model: PixelLLM | PerceptionGPT, table: Table, limits: Limits, captions: Sequence[str]
) -> Evaluation:
    """Caption every image of a table that has captions, with a progress bar.

    Args:
        captions: of the training data, for the baseline; without any, those of the table.

    Raises ValueError where the table has no captions.
    """
    rows = table.positions(TASK)[: limits.limit]
    if not len(rows):
        raise ValueError(f"{table.path}: no {TASK!r} phrases; make the table with data.coco")
    references: dict[str, list[str]] = {}
    hypotheses: dict[str, str] = {}
    for start in tqdm(range(0, len(rows), limits.batch_size), desc="images", unit="batch"):
        records = [table[int(row)] for row in rows[start : start + limits.batch_size]]
        images = [open_record_image(record) for record in records]
        written = caption_images(model, images, limits.beams)
        for record, text in zip(records, written, strict=True):
            texts = [phrase.caption for phrase in record.phrases if phrase.task == TASK]
            references.setdefault(record.id, []).extend(texts)
            hypotheses[record.id] = text
    if reason := unavailable_reason():
        print(f"METEOR is left out: {reason}", file=sys.stderr)
    captions = captions or [text for texts in references.values() for text in texts]
    drawn = dict(zip(references, random_captions(len(references), captions), strict=True))
    results = [{"image_id": image_number(n), "caption": text} for n, text in hypotheses.items()]
    return Evaluation(
        metrics=scores_of(hypotheses, references),
        baselines=scores_of(drawn, references),
        num_examples=len(hypotheses),
        trivial="a random training caption",
        predictions={"caption_results.json": json.dumps(results)},
    )


def caption_images(
    model: PixelLLM | PerceptionGPT, images: Sequence[Image], num_beams: int
) -> list[str]:
    """A short caption of every image."""
    if isinstance(model, PerceptionGPT):
        return [caption.text for caption in model.caption_images(images, num_beams)]
    own = [source.contexts[0] for source in model.config.sources if source.task == TASK]
    inputs = model.processor()(images, None, own[0] if own else None)
    inputs = inputs.to(next(model.parameters()).device)
    return [caption.text for caption in model.generate(**inputs, num_beams=num_beams)]


def scores_of(hypotheses: dict[str, str], references: dict[str, list[str]]) -> Scores:
    """With METEOR where its tables are installed."""
    scores = score_captions(hypotheses, references)
    if unavailable_reason() is None:
        scores["meteor"] = score_meteor(hypotheses, references)
    return scores
