"""Predictions as Localized Narratives: other tools for that corpus can read what we write."""

from __future__ import annotations

from typing import Any

from pixelllm.evaluation.narrations import Narration
from pixelllm.generation import Caption

SECONDS_PER_WORD = 0.4  # a usual speaking rate; the model predicts no times


def narrative_line(narration: Narration) -> dict[str, Any]:
    """A generated narration in the published field layout, with the words' boxes added.

    Every word lasts 0.4 s and the trace passes its point in the middle of that time.
    """
    dataset_id, _, image_id = narration.record.id.rpartition("/")
    caption: Caption = narration.generated
    return {
        "dataset_id": dataset_id,
        "image_id": image_id,
        "annotator_id": 0,
        "caption": caption.text,
        "timed_caption": [
            {
                "utterance": word.text,
                "start_time": round(i * SECONDS_PER_WORD, 3),
                "end_time": round((i + 1) * SECONDS_PER_WORD, 3),
            }
            for i, word in enumerate(caption.words)
        ],
        "traces": [
            [
                {
                    "x": word.point[0],
                    "y": word.point[1],
                    "t": round((i + 0.5) * SECONDS_PER_WORD, 3),
                }
                for i, word in enumerate(caption.words)
            ]
        ],
        "voice_recording": "",
        "word_boxes": [list(word.box) for word in caption.words],
        "log_prob": caption.log_prob,
    }
