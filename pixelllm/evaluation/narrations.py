"""The trace task: predict words and points for a table of narrations, and score them.

Teacher forced, the reference words are read by the model and only the points are predicted, so
that word and point errors do not mix (reference, section 12.1); generated, both are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pixelllm.batches import Prompted, TextLimits
from pixelllm.config import Source
from pixelllm.evaluation.captions import score_captions
from pixelllm.evaluation.lbm import trace_distance, trace_distance_given_caption
from pixelllm.evaluation.points import mean_trace_l1
from pixelllm.evaluation.report import mean_of_known
from pixelllm.generation import Caption, pointing_token
from pixelllm.mixture import assemble
from pixelllm.pretrained import PixelLLM
from pixelllm.records import Phrase, Record
from pixelllm.tables import Table
from pixelllm.tokenizer import words_of_tokens

TASK = "narration"
SECONDS_PER_WORD = 0.4  # a usual speaking rate


@dataclass(frozen=True)
class Narration:
    """A reference narration and what the model makes of its image.

    Targets are NaN where a token or a whitespace word of the reference has no place.
    """

    record: Record
    phrase: Phrase
    token_points: np.ndarray  # float32[T, 2, 2], teacher forced
    token_targets: np.ndarray  # float32[T, 2, 2]
    word_boxes: np.ndarray  # float32[W, 4], teacher forced
    target_boxes: np.ndarray  # float32[W, 4]
    generated: Caption


def chosen_narrations(table: Table, limit: int | None) -> list[tuple[int, Phrase]]:
    """Record positions and narrations of the table, in order; ValueError without any."""
    records = map(int, table.positions(TASK))
    phrases = ((index, phrase) for index in records for phrase in table[index].phrases)
    found = [(index, phrase) for index, phrase in phrases if phrase.task == TASK]
    if not found:
        raise ValueError(f"{table.path}: no {TASK!r} phrases; make the table from narratives")
    return found[:limit]


@torch.no_grad()
def predict_narrations(
    model: PixelLLM,
    table: Table,
    *,
    limit: int | None = None,
    batch_size: int = 32,
    num_beams: int = 1,
    max_new_tokens: int | None = None,
) -> Iterator[Narration]:
    """Every narration of the table (at most `limit`), with a progress bar."""
    chosen = chosen_narrations(table, limit)
    config, device = model.config, next(model.parameters()).device
    limits = TextLimits(model.language.bos_id, config.max_tokens, config.max_context)
    context = model.processor().config.context
    for start in tqdm(range(0, len(chosen), batch_size), desc="narrations", unit="batch"):
        prompted = [
            Prompted(table[index], (phrase,), (context,))
            for index, phrase in chosen[start : start + batch_size]
        ]
        frame = config.model.frame
        batch = assemble(
            prompted, model.tokenizer, limits, frame=frame, source=Source(TASK), cache=None
        ).to(device)
        maps = model.encode(batch.images, batch.sizes, {})
        prefix = model.prefix(maps, batch.sizes, batch.boxes).flatten(0, 1)
        points = model.point_head(model.language(prefix, *batch.text)).cpu().numpy()
        search = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
        captions = model.captions_from_prefix(prefix, *batch.text[:2], **search)
        is_placed = batch.with_points[..., None, None]
        targets = batch.points.masked_fill(~is_placed, torch.nan).cpu().numpy()
        for row, item in enumerate(prompted):
            ids = batch.text.token_ids[row].tolist()
            words = words_of_tokens(model.tokenizer, ids)
            pointing = [pointing_token(word, ids, model.tokenizer) for word in words]
            corners = points[row][pointing]  # (W, 2, 2)
            yield Narration(
                item.record,
                item.phrases[0],
                token_points=points[row],
                token_targets=targets[row],
                word_boxes=np.concatenate([corners.min(1), corners.max(1)], axis=1),
                target_boxes=targets[row][pointing].reshape(-1, 4),
                generated=captions[row],
            )


def score_narrations(narrations: Sequence[Narration]) -> dict[str, float]:
    """Point and caption scores that need nothing but the narrations."""
    references = {n.phrase.id: [n.phrase.caption] for n in narrations}
    return {
        "point_l1": point_l1([(n.record.id, n.token_points, n.token_targets) for n in narrations]),
        **lbm_scores([(n.word_boxes, n.target_boxes) for n in narrations]),
        "lbm_generated_k0": mean_of_known(
            trace_distance([word.box for word in n.generated.words], n.target_boxes)
            for n in narrations
        ),
        **score_captions({n.phrase.id: n.generated.text for n in narrations}, references),
    }


def point_l1(narrations: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> float:
    """Official point error over (image, points, targets), where an image's narrations are pooled.

    Images without any place do not count.
    """
    by_image = defaultdict(list)
    for image, *pair in narrations:
        by_image[image].append(pair)
    pooled = (map(np.concatenate, zip(*pairs, strict=True)) for pairs in by_image.values())
    known = [(points, targets, ~np.isnan(targets).any((-1, -2))) for points, targets in pooled]
    return mean_trace_l1([item for item in known if item[-1].any()])


def lbm_scores(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """LBM with the caption given, for windows 0 and 1, of (predicted, target) word boxes."""
    return {
        f"lbm_k{k}": mean_of_known(trace_distance_given_caption(p, t, k) for p, t in pairs)
        for k in (0, 1)
    }


def score_baselines(narrations: Sequence[Narration], captions: Sequence[str]) -> dict[str, float]:
    """What a point in the image centre and a random training caption score.

    Args:
        captions: of the training data; one is drawn for every narration, with a fixed seed.
    """
    targets = [(n.record.id, n.token_targets) for n in narrations]
    centres = [(image, np.full_like(places, 0.5), places) for image, places in targets]
    middle = [(np.full_like(n.word_boxes, 0.5), n.target_boxes) for n in narrations]
    drawn = random_captions(len(narrations), captions)
    hypotheses = {n.phrase.id: text for n, text in zip(narrations, drawn, strict=True)}
    references = {n.phrase.id: [n.phrase.caption] for n in narrations}
    scores = {"point_l1": point_l1(centres), **lbm_scores(middle)}
    return scores | score_captions(hypotheses, references)


def random_captions(count: int, captions: Sequence[str]) -> list[str]:
    rng = np.random.default_rng(0)
    return [captions[i] for i in rng.integers(len(captions), size=count)]


def narrative_line(narration: Narration) -> dict[str, Any]:
    """A generated narration in the published field layout, with the words' boxes added.

    Every word lasts 0.4 s, as the model predicts no times, and the trace passes its point in the
    middle of that time.
    """
    dataset_id, _, image_id = narration.record.id.rpartition("/")
    caption = narration.generated

    def time(words: float) -> float:
        return round(words * SECONDS_PER_WORD, 3)

    return {
        "dataset_id": dataset_id,
        "image_id": image_id,
        "annotator_id": 0,
        "caption": caption.text,
        "timed_caption": [
            {"utterance": word.text, "start_time": time(i), "end_time": time(i + 1)}
            for i, word in enumerate(caption.words)
        ],
        "traces": [
            [
                {"x": word.point[0], "y": word.point[1], "t": time(i + 0.5)}
                for i, word in enumerate(caption.words)
            ]
        ],
        "voice_recording": "",
        "word_boxes": [list(word.box) for word in caption.words],
        "log_prob": caption.log_prob,
    }
