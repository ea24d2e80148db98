"""The trace task on a table: words, and a point for each, of narrations."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from pixelllm.evaluation import narrations
from pixelllm.evaluation.meteor import score_meteor, unavailable_reason
from pixelllm.evaluation.narrations import Narration, narrative_line
from pixelllm.evaluation.objects import Mentions, ObjectTruth, score_forced, score_generated
from pixelllm.evaluation.report import Evaluation, Limits, Scores
from pixelllm.pretrained import PixelLLM
from pixelllm.tables import Table


def evaluate_trace(
    model: PixelLLM,
    table: Table,
    limits: Limits,
    captions: Sequence[str],
    known: Mapping[str, ObjectTruth] | None,
    mentions: Mentions,
) -> Evaluation:
    """Score a table of narrations.

    Args:
        captions: of the training data, for the baseline; without any, those of the table.
        known: what the images show, by image id; None where nobody knows.
        mentions: finds the objects that a caption names.
    """
    search = {"batch_size": limits.batch_size, "num_beams": limits.beams}
    found = list(narrations.predict_narrations(model, table, limit=limits.limit, **search))
    captions = captions or [n.phrase.caption for n in found]
    metrics = narrations.score_narrations(found) | meteor(found)
    baselines = narrations.score_baselines(found, captions)
    if known is not None:
        truths = truths_of(found, known)
        metrics |= object_scores(found, truths, mentions)
        unseen = [pair for pair in zip(found, truths, strict=True) if pair[1].is_held_out]
        if unseen:
            scores = object_scores(*zip(*unseen, strict=True), mentions)
            metrics |= {f"held_out_{name}": score for name, score in scores.items()}
        middle = [np.full_like(n.word_boxes, 0.5) for n in found]
        baselines |= score_forced(found, truths, middle)
        drawn = narrations.random_captions(len(found), captions)
        baselines |= score_generated(drawn, truths, mentions)
    lines = (json.dumps(narrative_line(narration)) + "\n" for narration in found)
    return Evaluation(
        metrics,
        baselines,
        len(found),
        trivial="a point in the image centre, a random training caption",
        predictions={"trace_predictions.jsonl": "".join(lines)},
    )


def meteor(found: Sequence[Narration]) -> Scores:
    reason = unavailable_reason()
    if reason is not None:
        print(f"METEOR is left out: {reason}", file=sys.stderr)
        return {}
    hypotheses = {n.phrase.id: n.generated.text for n in found}
    return {"meteor": score_meteor(hypotheses, {n.phrase.id: [n.phrase.caption] for n in found})}


def truths_of(found: Sequence[Narration], known: Mapping[str, ObjectTruth]) -> list[ObjectTruth]:
    """The truth of every narration's image. Raises ValueError where there is none."""
    names = [narration.record.id.rpartition("/")[2] for narration in found]
    absent = [name for name in names if name not in known]
    if absent:
        raise ValueError(f"the truth says nothing of image {absent[0]}; is it of the same scenes?")
    return [known[name] for name in names]


def object_scores(
    found: Sequence[Narration], truths: Sequence[ObjectTruth], mentions: Mentions
) -> Scores:
    forced = score_forced(found, truths, [n.word_boxes for n in found])
    return forced | score_generated([n.generated for n in found], truths, mentions)
