"""One self-contained HTML page that plays captions: words light up while the trace is drawn.

The page (viewer.html: markup, style and script) asks the network for nothing and says so in its
content security policy. Images are embedded as JPEG and decoded only when they are looked at.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from pixelllm.files import written_whole
from pixelllm.pictures import (
    fit,
    open_picture,
    text_between,
    word_color,
    word_times,
)

LONGEST, THUMBNAIL = 1024, 480  # pixels of the longer side
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
    template = resources.files("pixelllm").joinpath("viewer.html").read_text(encoding="utf-8")
    head, tail = template.replace("{{title}}", html.escape(title)).split("{{captions}}")
    entries = []
    progress = tqdm(captions, desc="images", unit="image", disable=len(captions) < 20)
    with written_whole(path) as beside, beside.open("w", encoding="utf-8") as file:
        file.write(head)
        for number, caption in enumerate(progress):
            image = open_picture(caption)
            file.write(_embedded(f"image-{number}", image, LONGEST, quality=85))
            if len(captions) > 1:
                file.write(_embedded(f"thumbnail-{number}", image, THUMBNAIL, quality=75))
            entries.append(_entry(caption))
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        # Inside a script element only "<" could end it; JSON allows the escape.
        text = text.replace("<", "\\u003c")
        file.write(f'<script type="application/json" id="captions">{text}</script>\n{tail}')


def _embedded(name: str, image: Image.Image, longest: int, quality: int) -> str:
    """A JPEG data URL in an inert script element, which a browser keeps without decoding it."""
    if max(image.size) > longest:
        image = fit(image, longest)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True, comment="")
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return f'<script type="text/plain" id="{name}">{url}</script>\n'


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
            "point": _rounded(word["point"]),
            "box": _rounded(word["box"]),
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
        "prompt_box": _rounded(caption.get("prompt_box")),
        "reference": _reference(caption.get("reference")),
    }


def _finite(log_prob: float | None) -> float | None:
    """JSON has no infinity: the log-probability of a token that was ruled out is left out."""
    return log_prob if log_prob is not None and math.isfinite(log_prob) else None


def _rounded(place: Sequence[float] | None) -> list[float] | None:
    return None if place is None else [round(float(value), 5) for value in place]


def _reference(record: dict[str, Any] | None) -> dict[str, Any] | None:
    """Text and strokes of a Localized Narratives record, thinned to what the eye can follow."""
    if record is None:
        return None
    strokes = record.get("traces", [])
    step = max(1, sum(map(len, strokes)) // TRACE_POINTS)
    return {
        "text": record["caption"],
        "strokes": [[_rounded((p["x"], p["y"])) for p in stroke[::step]] for stroke in strokes],
    }
