"""COCO annotation files to tables: boxes as region phrases, captions as caption phrases.

    python -m data.coco instances_val2017.json --images val2017 --out runs/coco-val \
        --captions captions_val2017.json

Every instance becomes a phrase that asks, at its box, for the name of its category; crowds have
no box of one object and are left out. Boxes, polygons and run lengths are those of the format's
own tools (`pycocotools`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from tqdm import tqdm

from data.annotations import (
    Picture,
    Size,
    check_coco,
    clean_text,
    clip_box,
    drop,
    encode_mask,
    load_json,
    print_report,
    read_record,
    start_report,
)
from pixelllm.records import Phrase, Record
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
        content = check_coco(file, load_json(file))
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


def read_records(
    annotations: Annotations, folder: Path, report: dict[str, Any], skip_missing: bool = False
) -> Iterator[Record]:
    """One record per image with phrases; `report` is filled while they are taken.

    Raises FileNotFoundError or ValueError naming the image or annotation.
    """
    report.update(regions=0, captions=0)
    for image_id, entry in annotations.images.items():
        tried = [folder / entry["file_name"]]
        picture = Picture(f"image {image_id}", image_id, tried, entry)
        phrases_at = partial(_phrases, annotations, image_id, report)
        record = read_record(picture, phrases_at, report, skip_missing)
        if record:
            yield record


def _phrases(
    annotations: Annotations, image_id: int, report: dict[str, Any], size: Size
) -> Iterator[Phrase]:
    for file, annotation in annotations.by_image.get(image_id, ()):
        phrase = _phrase(annotation, file, size, annotations.categories, report)
        if phrase:
            report["captions" if phrase.task == "caption" else "regions"] += 1
            yield phrase


def _phrase(
    annotation: dict[str, Any],
    file: str,
    size: Size,
    categories: dict[int, str],
    report: dict[str, Any],
) -> Phrase | None:
    """The annotation as a phrase, or None where it is dropped."""
    name = f"{file}: annotation {annotation['id']} of image {annotation['image_id']}"
    if "caption" in annotation:
        caption = clean_text(annotation["caption"], name)
        if not caption:
            return drop(report, "empty caption")
        return Phrase(f"caption/{annotation['id']}", "caption", caption)
    if annotation.get("iscrowd"):
        return drop(report, "crowd")
    if annotation.get("category_id") not in categories:
        raise ValueError(f"{name}: category {annotation.get('category_id')} is not in the file")
    box = clip_box(annotation.get("bbox"), name, size)
    if box is None:
        return drop(report, "empty box")
    mask = encode_mask(annotation.get("segmentation"), name, size)
    category = categories[annotation["category_id"]]
    return Phrase(
        f"region/{annotation['id']}", "region", category, prompt_box=box, target_box=box, mask=mask
    )


def convert(
    files: list[Path], folder: Path, out: Path, skip_missing: bool = False
) -> dict[str, Any]:
    """Write the table `out`; returns its report. Raises as `read_records`, nothing is written."""
    report = start_report(files, folder)
    annotations = load_annotations(files)
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
    print_report(partial(convert, files, images, out, skip_missing))


if __name__ == "__main__":
    tyro.cli(main)
