"""Predicted boxes in the results format of COCO, which others' programs can score.

With captions they are what evaluations of dense captions read, in pixels of the image as it is;
DenseCap's own in Lua measures in images of 720 pixels on the longer side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pixelllm.evaluation.dense import Detection


def coco_results(
    predictions: Mapping[Any, Sequence[Detection]],
    sizes: Mapping[Any, tuple[int, int]],
    category_id: int = 1,
) -> list[dict[str, Any]]:
    """Entries `image_id`, `category_id`, `bbox`, `score`, and `caption`, `segmentation` if known.

    Args:
        predictions: by the image's id in the annotation file.
        sizes: (H, W) of those images in the pixels of that file.
        category_id: of all detections. `pycocotools` takes entries with captions for captions
            alone: leave them out (`detection._replace(caption=None)`) to score boxes with it.

    Returns:
        JSON values; `bbox` is x, y, width, height in pixels.
    """
    results = []
    for image_id, detections in predictions.items():
        if image_id not in sizes:
            raise ValueError(f"image {image_id!r} has predictions but no size")
        height, width = sizes[image_id]
        for box, score, caption, mask in (Detection(*item) for item in detections):
            x0, y0, x1, y1 = map(float, box)
            entry = {
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height],
                "score": float(score),
                "caption": caption,
                "segmentation": mask,
            }
            results.append({key: value for key, value in entry.items() if value is not None})
    return results


def image_number(record_id: str) -> int | str:
    """The id of an image in its annotation file, from that of its record: a number if it is one."""
    name = record_id.rpartition("/")[2]
    return int(name) if name.isdecimal() else name
