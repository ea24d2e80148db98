"""One self-contained HTML page of images with their objects: boxes, captions and a score filter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pixelllm.images import open_image
from pixelllm.overlays import object_color
from pixelllm.pages import rounded, write_page


def write_dense_html(
    results: Sequence[dict[str, Any]], path: Path | str, title: str = "PixelLLM objects"
) -> None:
    """Write found objects as one page: a gallery, or one image where there is one.

    Args:
        results: what `pixelllm dense --json` prints: `image`, `size_hw`, and `detections`, each
            with `box` (xyxy in [0, 1]), `caption`, `score` and `detection_score`.
        path: of the page, which appears when it is complete.
        title: plain text.
    """
    if not results:
        raise ValueError(f"{path}: there is no image to show")
    items = ((open_image(result["image"]), _entry(result)) for result in results)
    write_page("dense_page.html", items, len(results), path, title)


def _entry(result: dict[str, Any]) -> dict[str, Any]:
    """What the page's script needs to know about one image."""
    objects = [
        {
            "box": rounded(item["box"]),
            "caption": item["caption"],
            "score": round(item["score"], 5),
            "detection_score": round(item["detection_score"], 5),
            "color": object_color(index),
        }
        for index, item in enumerate(result["detections"])
    ]
    return {
        "name": Path(result["image"]).name,
        "title": "",
        "size": result["size_hw"],
        "text": "; ".join(item["caption"] for item in objects[:3]) or "nothing found",
        "objects": objects,
    }
