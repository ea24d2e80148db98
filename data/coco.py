"""COCO annotation files to tables: boxes as region phrases, captions as caption phrases.

    python -m data.coco instances_val2017.json --images val2017 --out runs/coco-val \
        --captions captions_val2017.json

Every instance becomes a phrase that asks, at its box, for the name of its category; crowds have
no box of one object and are left out. Boxes, polygons and run lengths are those of the format's
own tools (`pycocotools`).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from pycocotools import mask as coco_mask
from tqdm import tqdm

from data.localized_narratives import image_size
from pixelllm.records import Box, Phrase, Record
from pixelllm.tables import write_table


class Annotations(NamedTuple):
    """One or more COCO files, merged by image."""

    images: dict[int, dict[str, Any]]  # entries by id
    by_image: dict[int, list[tuple[str, dict[str, Any]]]]  # (file name, annotation) by image id
    categories: dict[int, str]  # names by id


def load_annotations(files: list[Path]) -> Annotations:
    """Read `instances_*.json` and `captions_*.json`.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong in it.
    """
    images, by_image, categories = {}, defaultdict(list), {}
    for file in files:
        content = _load(file)
        images.update({image["id"]: image for image in content["images"]})
        categories.update({entry["id"]: entry["name"] for entry in content.get("categories", ())})
        for annotation in content["annotations"]:
            by_image[annotation["image_id"]].append((file.name, annotation))
    for image_id, found in by_image.items():
        if image_id not in images:
            file_name, annotation = found[0]
            name = f"{file_name}: annotation {annotation['id']}"
            raise ValueError(f"{name} is of image {image_id}, which no file describes")
    return Annotations(images, by_image, categories)


def _load(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such annotation file")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not a JSON file ({error})") from error
    required = {"images": ("id", "file_name"), "annotations": ("id", "image_id")}
    for part, keys in required.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{file}: no list {part!r}; is it a COCO instances or captions file?")
        for number, entry in enumerate(entries):
            missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if missing:
                raise ValueError(f"{file}: {part}[{number}] has no {', '.join(missing)}")
    return content


def read_records(
    annotations: Annotations, folder: Path, report: dict[str, Any], skip_missing: bool = False
) -> Iterator[Record]:
    """One record per image with phrases; `report` is filled while they are taken.

    Raises FileNotFoundError or ValueError naming the image or annotation.
    """
    report.update(images=0, kept=0, regions=0, captions=0, dropped={})
    for image_id, entry in annotations.images.items():
        report["images"] += 1
        path = folder / entry["file_name"]
        if not path.is_file():
            if skip_missing:
                _count(report, "missing image")
                continue
            remedy = "check --images, or drop such images with --skip-missing"
            raise FileNotFoundError(f"image {image_id}: no file {path}; {remedy}")
        size = _checked_size(entry, path)
        found = [
            _phrase(annotation, file, size, annotations.categories, report)
            for file, annotation in annotations.by_image.get(image_id, ())
        ]
        phrases = tuple(phrase for phrase in found if phrase)
        if not phrases:
            _count(report, "image without annotations")
            continue
        report["kept"] += 1
        yield Record(f"{folder.name}/{image_id}", size, phrases, path=str(path.resolve()))


def _count(report: dict[str, Any], reason: str) -> None:
    report["dropped"][reason] = report["dropped"].get(reason, 0) + 1


def _checked_size(entry: dict[str, Any], path: Path) -> tuple[int, int]:
    """(H, W) of the file, which boxes and masks are measured in."""
    size = image_size(path)
    stated = (entry.get("height", size[0]), entry.get("width", size[1]))
    if stated != size:
        sizes = f"(H, W) {size}, but the annotations say {stated}"
        raise ValueError(f"image {entry['id']}: {path} has {sizes}; was it resized?")
    return size


def _phrase(
    annotation: dict[str, Any],
    file: str,
    size: tuple[int, int],
    categories: dict[int, str],
    report: dict[str, Any],
) -> Phrase | None:
    """The annotation as a phrase, or None where it is dropped."""
    name = f"{file}: annotation {annotation['id']} of image {annotation['image_id']}"
    if "caption" in annotation:
        caption = " ".join(annotation["caption"].split())
        if not caption:
            _count(report, "empty caption")
            return None
        report["captions"] += 1
        return Phrase(f"caption/{annotation['id']}", "caption", caption)
    if annotation.get("iscrowd"):
        _count(report, "crowd")
        return None
    if annotation.get("category_id") not in categories:
        raise ValueError(f"{name}: category {annotation.get('category_id')} is not in the file")
    box = _box(annotation, name, size)
    if box is None:
        _count(report, "empty box")
        return None
    report["regions"] += 1
    mask = _mask(annotation, name, size)
    category = categories[annotation["category_id"]]
    return Phrase(
        f"region/{annotation['id']}", "region", category, prompt_box=box, target_box=box, mask=mask
    )


def _box(annotation: dict[str, Any], name: str, size: tuple[int, int]) -> Box | None:
    """xyxy in [0, 1], clipped to the image; None where nothing is left of it."""
    box_px = annotation.get("bbox")
    if not isinstance(box_px, list) or len(box_px) != 4:
        raise ValueError(f"{name}: bbox is not [x, y, width, height] but {box_px!r}")
    x, y, width, height = box_px
    x0, x1 = (min(max(value / size[1], 0.0), 1.0) for value in (x, x + width))
    y0, y1 = (min(max(value / size[0], 0.0), 1.0) for value in (y, y + height))
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def _mask(annotation: dict[str, Any], name: str, size: tuple[int, int]) -> dict[str, Any] | None:
    """Compressed run lengths of a segmentation in any of COCO's three forms; None without one."""
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        if not polygons:
            return None
        encoded = coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
        return {"size": list(size), "counts": encoded["counts"].decode()}
    if list(segmentation["size"]) != list(size):
        raise ValueError(f"{name}: mask of size {segmentation['size']} on an image of {size}")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        counts = coco_mask.frPyObjects(segmentation, *size)["counts"].decode()
    return {"size": list(size), "counts": counts}


def convert(
    files: list[Path], folder: Path, out: Path, skip_missing: bool = False
) -> dict[str, Any]:
    """Write the table `out`; returns its report. Raises as `read_records`, nothing is written."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--images {folder}: no such folder")
    annotations = load_annotations(files)
    report: dict[str, Any] = {"files": [str(file.resolve()) for file in files]}
    records = read_records(annotations, folder, report, skip_missing)
    write_table(tqdm(records, "images", len(annotations.images)), out, report)
    return report


def main(
    annotations: Annotated[tuple[Path, ...], tyro.conf.Positional],
    images: Path,
    out: Path,
    captions: Path | None = None,
    skip_missing: bool = False,
) -> None:
    """Turn COCO annotation files into a table of records.

    Args:
        annotations: instances_*.json or captions_*.json, one or more.
        images: folder of the images.
        out: table to write; a table of that name is replaced when the new one is complete.
        captions: a captions_*.json of the same images.
        skip_missing: drop and count images whose file is missing.
    """
    files = [*annotations, *([captions] if captions else [])]
    try:
        report = convert(files, images, out, skip_missing)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
