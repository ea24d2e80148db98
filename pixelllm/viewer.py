"""One self-contained HTML page that plays captions: words light up while the trace is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pixelllm.pages import rounded, write_page
from pixelllm.pictures import open_picture, text_between, word_color, word_times

TRACE_POINTS = 600  # of a reference trace; hands move slowly against 60 points a second


def write_html(
    captions: Sequence[dict[str, Any]], path: Path | str, title: str = "PixelLLM captions"
) -> None:
    """Write captions as one page: a gallery, or the player alone where there is one caption.

    Captions are as described in `pixelllm.pictures`. Further keys, all optional: `title` (a line
    over the caption), `prompt_box` (xyxy, the region that was asked about), `reference` (a
    Localized Narratives record: its `caption` and `traces`). Raises ValueError naming the image
    where a caption breaks the contract; the file appears when it is complete.
    """
    if not captions:
        raise ValueError(f"{path}: there is no caption to show")
    items = ((open_picture(caption), _entry(caption)) for caption in captions)
    write_page("viewer.html", items, len(captions), path, title)


def _entry(caption: dict[str, Any]) -> dict[str, Any]:
    """What the page's script needs to know about one caption."""
    gaps, tail = text_between(caption)
    times = word_times(caption["words"])
    source = caption["image"]
    parts = zip(caption["words"], gaps, times, strict=True)
    words = [
        {
            "text": word["text"],
            "gap": gap,
            "point": rounded(word["point"]),
            "box": rounded(word["box"]),
            "log_prob": _finite(word.get("log_prob")),
            "start": round(start, 3),
            "end": round(end, 3),
            "color": word_color(index, len(times)),
        }
        for index, (word, gap, (start, end)) in enumerate(parts)
    ]
    return {
        "name": Path(source).name if isinstance(source, str | Path) else "",
        "title": caption.get("title", ""),
        "size": list(caption["size_hw"]),
        "text": caption["caption"],
        "words": words,
        "tail": tail,
        "log_prob": _finite(caption.get("log_prob")),
        "prompt_box": rounded(caption.get("prompt_box")),
        "reference": _reference(caption.get("reference")),
    }


def _finite(log_prob: float | None) -> float | None:
    """JSON has no infinity: the log-probability of a token that was ruled out is left out."""
    return log_prob if log_prob is not None and math.isfinite(log_prob) else None


def _reference(record: dict[str, Any] | None) -> dict[str, Any] | None:
    """Text and strokes of a Localized Narratives record, thinned to what the eye can follow."""
    if record is None:
        return None
    strokes = record.get("traces", [])
    step = max(1, sum(map(len, strokes)) // TRACE_POINTS)
    return {
        "text": record["caption"],
        "strokes": [[rounded((p["x"], p["y"])) for p in stroke[::step]] for stroke in strokes],
    }
