"""COCO annotation files to tables: boxes as region phrases, captions as caption phrases.

    python -m data.coco instances_val2017.json --images val2017 --out runs/coco-val \
        --captions captions_val2017.json

Every instance becomes a phrase that asks, at its box, for the name of its category; crowds have
no box of one object and are left out. With `--expressions`, an instance that is the only one of its
category (or supercategory) in the image is also an expression, that name, to locate. Boxes,
polygons and run lengths are those of the format's own tools (`pycocotools`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from tqdm import tqdm

from data.annotations import (
    Picture,
    Size,
    add_images,
    check_coco,
    check_entries,
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

Naming = Literal["category", "supercategory"]


class Annotations(NamedTuple):
    """One or more COCO files, merged by image."""

    images: dict[int, dict[str, Any]]  # entries by id
    by_image: dict[int, list[tuple[str, dict[str, Any]]]]  # (file name, annotation) by image id
    categories: dict[int, str]  # names by id
    expressions: dict[int, str]  # what its only instance is called; empty if that is not asked for


def load_annotations(files: list[Path], expressions: Naming | None = None) -> Annotations:
    """Read `instances_*.json` and `captions_*.json`.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong in it.
    """
    images, by_image, categories, called = {}, defaultdict(list), {}, {}
    for file in files:
        content = check_coco(file, load_json(file))
        add_images(images, file, content)
        for entry in _categories(content, file):
            if categories.setdefault(entry["id"], entry["name"]) != entry["name"]:
                both = f"{entry['name']!r} here and {categories[entry['id']]!r} in a file before"
                raise ValueError(f"{file}: category {entry['id']} is {both}; make a table of each")
            if expressions:
                called[entry["id"]] = _called(entry, expressions, file)
        for annotation in content["annotations"]:
            if isinstance(annotation.get("category_id"), list | dict):
                name, category = annotation["id"], annotation["category_id"]
                raise ValueError(f"{file.name}: annotation {name}: category {category!r:.60}")
            by_image[annotation["image_id"]].append((file.name, annotation))
    for image_id, found in by_image.items():
        if image_id not in images:
            file_name, annotation = found[0]
            name = f"{file_name}: annotation {annotation['id']}"
            raise ValueError(f"{name} is of image {image_id}, which no file describes")
    return Annotations(images, by_image, categories, called)


def _categories(content: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    """Raises ValueError naming the category that has no id or name."""
    entries = content.get("categories") or []
    check_entries(f"{file}: categories", entries, ("id", "name"))
    for number, entry in enumerate(entries):
        if not isinstance(entry["name"], str):
            raise ValueError(f"{file}: categories[{number}]: no name but {entry['name']!r:.60}")
    return entries


def _called(category: dict[str, Any], expressions: Naming, file: Path) -> str:
    name = category["name"] if expressions == "category" else category.get("supercategory")
    if not name:
        raise ValueError(f"{file}: category {category['name']!r} has no supercategory to call it")
    return name


def read_records(
    annotations: Annotations, folder: Path, report: dict[str, Any], skip_missing: bool = False
) -> Iterator[Record]:
    """One record per image with phrases; `report` is filled while they are taken.

    Raises FileNotFoundError or ValueError naming the image or annotation.
    """
    report.update(regions=0, captions=0, expressions=0)
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
    found = annotations.by_image.get(image_id, ())
    called = [annotations.expressions.get(entry.get("category_id")) for _, entry in found]
    times = Counter(called)  # crowds count
    for name, (file, annotation) in zip(called, found, strict=True):
        phrase = _phrase(annotation, file, size, annotations.categories, report)
        if phrase is None:
            continue
        report["captions" if phrase.task == "caption" else "regions"] += 1
        yield phrase
        if name and times[name] == 1:
            report["expressions"] += 1
            number, shown = annotation["id"], {"target_box": phrase.target_box, "mask": phrase.mask}
            # Not the number alone, which expressions of a corpus of them have.
            yield Phrase(f"referring/region-{number}", "referring", name, context=name, **shown)


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
    number = annotation.get("category_id")
    if number not in categories:
        raise ValueError(f"{name}: category {number} is not in the file")
    box = clip_box(annotation.get("bbox"), name, size)
    if box is None:
        return drop(report, "empty box")
    mask = encode_mask(annotation.get("segmentation"), name, size)
    category = categories[number]
    return Phrase(
        f"region/{annotation['id']}", "region", category, prompt_box=box, target_box=box, mask=mask
    )


def convert(
    files: list[Path],
    folder: Path,
    out: Path,
    skip_missing: bool = False,
    expressions: Naming | None = None,
) -> dict[str, Any]:
    """Write the table `out`; returns its report. Raises as `read_records`, nothing is written."""
    report = start_report(files, folder)
    annotations = load_annotations(files, expressions)
    records = read_records(annotations, folder, report, skip_missing)
    write_table(tqdm(records, "images", len(annotations.images)), out, report)
    return report


def main(
    annotations: Annotated[tuple[Path, ...], tyro.conf.Positional],
    images: Path,
    out: Path,
    captions: Path | None = None,
    skip_missing: bool = False,
    expressions: Naming | None = None,
) -> None:
    """Turn COCO annotation files into a table of records.

    Args:
        annotations: instances_*.json or captions_*.json, one or more.
        images: folder of the images.
        out: table to write; a table of that name is replaced when the new one is complete.
        captions: a captions_*.json of the same images.
        skip_missing: drop and count images whose file is missing.
        expressions: what the only instance of its kind in an image is called, to be located.
    """
    files = [*annotations, *([captions] if captions else [])]
    print_report(partial(convert, files, images, out, skip_missing, expressions))


if __name__ == "__main__":
    tyro.cli(main)
