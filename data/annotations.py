"""What the readers of annotation files share: JSON, images, boxes, masks, the report."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pycocotools import mask as coco_mask

from data.localized_narratives import image_candidates, image_size
from pixelllm.mask_codes import checked_mask
from pixelllm.records import Box, Phrase, Record

Size = tuple[int, int]  # (H, W)
CHUNK = 2**20  # characters that `stream_list` reads at a time
LONGEST_ENTRY = 2**25  # characters; published entries stay far below
FARTHEST = 10  # image sides that a polygon may lie outside
BETWEEN = re.compile(r"[\s,]*")


def load_json(file: Path) -> Any:
    """The content of a JSON file. Raises FileNotFoundError or ValueError naming it."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such annotation file")
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not a JSON file ({error})") from error


def stream_list(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that is one JSON list, one held at a time.

    Yields nothing where the file is no list. Raises as `load_json`.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such annotation file")
    decoder = json.JSONDecoder()
    try:
        with open(file, encoding="utf-8") as stream:
            text, start = stream.read(CHUNK).lstrip(), 1
            if not text.startswith("["):
                return
            while True:
                start = BETWEEN.match(text, start).end()
                try:
                    entry, start = decoder.raw_decode(text, start)
                except json.JSONDecodeError:  # most often only because the chunk ends here
                    if text.startswith("]", start):
                        return
                    more = stream.read(CHUNK)
                    if not more or len(text) - start > LONGEST_ENTRY:
                        raise
                    text, start = text[start:] + more, 0
                else:
                    if not isinstance(entry, dict):
                        raise ValueError(f"{entry!r:.40} is no object")
                    yield entry
    except ValueError as error:  # also what is not UTF-8
        raise ValueError(f"{file}: not a list of JSON objects, or cut short ({error})") from error


def check_entries(place: str, entries: Any, keys: Iterable[str]) -> None:
    """Raise ValueError unless `entries` is a list of objects that have all keys."""
    if not isinstance(entries, list):
        raise ValueError(f"{place} is not a list but {type(entries).__name__}")
    for number, entry in enumerate(entries):
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise ValueError(f"{place}[{number}] has no {', '.join(missing)}")
        for key in keys:
            if key.endswith("id") and isinstance(entry[key], list | dict):
                raise ValueError(f"{place}[{number}]: {key} is not a number but {entry[key]!r:.60}")


def check_coco(file: Path, content: Any) -> dict[str, Any]:
    """The content, if it has the lists of a COCO file."""
    required = {"images": ("id", "file_name"), "annotations": ("id", "image_id")}
    for part, keys in required.items():
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise ValueError(f"{file}: no list {part!r}; is it a file in COCO's layout?")
        check_entries(f"{file}: {part}", content[part], keys)
    for image in content["images"]:
        check_name(image["file_name"], f"{file}: image {image['id']}")
    return content


def add_images(images: dict[Any, dict[str, Any]], file: Path, content: dict[str, Any]) -> None:
    """Add a file's images to those of other files by id. Raises ValueError where ids mean two."""
    for image in content["images"]:
        other = images.setdefault(image["id"], image)["file_name"]
        if image["file_name"] != other:
            both = f"{image['file_name']} here and {other} in a file before"
            raise ValueError(f"{file}: image {image['id']} is {both}; make a table of each")


def by_listed_image(file: Path, content: dict[str, Any]) -> dict[Any, list[dict[str, Any]]]:
    """A COCO file's annotations by image id. Raises ValueError for one of an unlisted image."""
    found = defaultdict(list)
    for annotation in content["annotations"]:
        found[annotation["image_id"]].append(annotation)
    for image_id in found.keys() - {image["id"] for image in content["images"]}:
        number = found[image_id][0]["id"]
        raise ValueError(f"{file}: annotation {number} is of image {image_id}, not listed")
    return found


def check_name(image: Any, place: str) -> str:
    """The file name of an image, if it is one."""
    if not isinstance(image, str) or not image:
        raise ValueError(f"{place}: the image is not a file name but {image!r}")
    return image


def start_report(files: Iterable[Path], folder: Path) -> dict[str, Any]:
    """The counts that `read_record` and `drop` fill. Raises where `folder` is none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--images {folder}: no such folder")
    names = [str(file.resolve()) for file in files]
    return {"files": names, "images": 0, "kept": 0, "phrases": 0, "dropped": {}}


def drop(report: dict[str, Any], reason: str, count: int = 1) -> None:
    """Count what is left out of the table."""
    report["dropped"][reason] = report["dropped"].get(reason, 0) + count


def print_report(convert: Callable[[], dict[str, Any]]) -> None:
    """Run a conversion as a command: its report on stdout, or one line of error."""
    try:
        report = convert()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(json.dumps(report, indent=2))


class Picture(NamedTuple):
    """An image as the annotations describe it."""

    name: str  # in errors
    id: int | str  # in its corpus
    tried: list[Path]  # where it may lie
    entry: dict[str, Any]  # may state its `height` and `width`


def read_record(
    picture: Picture,
    phrases_at: Callable[[Size], Iterable[Phrase]],
    report: dict[str, Any],
    skip_missing: bool,
) -> Record | None:
    """The record of an image, or None where it is dropped; both are counted.

    `phrases_at` gets the size of the file, which boxes and masks are measured in. Raises
    FileNotFoundError or ValueError naming the image.
    """
    report["images"] += 1
    path = next((path for path in picture.tried if path.is_file()), None)
    if path is None and skip_missing:
        drop(report, "missing image")
        return None
    if path is None:
        tried = ", ".join(map(str, dict.fromkeys(picture.tried)))
        remedy = "check --images, or drop such images with --skip-missing"
        raise FileNotFoundError(f"{picture.name}: no file {tried}; {remedy}")
    size = image_size(path)
    stated = (picture.entry.get("height", size[0]), picture.entry.get("width", size[1]))
    if stated != size:
        sizes = f"(H, W) {size}, but the annotations say {stated}"
        raise ValueError(f"{picture.name}: {path} has {sizes}; was it resized?")
    phrases = tuple(phrases_at(size))
    if not phrases:
        drop(report, "image without phrases")
        return None
    report["kept"] += 1
    report["phrases"] += len(phrases)
    return Record(f"{path.parent.name}/{picture.id}", size, phrases, path=str(path.resolve()))


def coco_number(name: str) -> int | None:
    """The image id in a COCO file name of any year, also with the number `refer` appends."""
    found = re.search(r"(?<!\d)(\d{12})(_\d+)?\.(jpg|png)$", name)
    return int(found[1]) if found else None


def image_paths(folder: Path, name: str, source: str = "coco") -> list[Path]:
    """Where an image file of COCO, Visual Genome ("vg") or Flickr30k ("flickr") may lie."""
    number = coco_number(name)
    if source == "vg":
        found = [folder / part / Path(name).name for part in ("", "VG_100K", "VG_100K_2")]
    elif source == "flickr":
        found = image_candidates(folder, "flickr30k", Path(name).stem)
    else:
        found = [] if number is None else image_candidates(folder, "coco", str(number))
    return [folder / name, *found]


def clean_text(text: Any, name: str) -> str:
    """Words with single blanks between them, perhaps none."""
    if not isinstance(text, str):
        raise ValueError(f"{name}: the text is not a string but {text!r}")
    return " ".join(text.split())


def are_numbers(values: Any, count: int) -> bool:
    """Whether it is a list of so many numbers."""
    is_list = isinstance(values, list) and len(values) == count
    return is_list and all(isinstance(value, int | float) for value in values)


def clip_box(box_px: Any, name: str, size: Size) -> Box | None:
    """[x, y, width, height] as xyxy in [0, 1], clipped to the image; None if nothing is left."""
    if not are_numbers(box_px, 4):
        raise ValueError(f"{name}: bbox is not [x, y, width, height] but {box_px!r}")
    x, y, width, height = box_px
    x0, x1 = (min(max(value / size[1], 0.0), 1.0) for value in (x, x + width))
    y0, y1 = (min(max(value / size[0], 0.0), 1.0) for value in (y, y + height))
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def encode_mask(segmentation: Any, name: str, size: Size) -> dict[str, Any] | None:
    """Compressed run lengths of a segmentation in any of COCO's three forms; None without one."""
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        return _encode_polygons(segmentation, name, size)
    if not isinstance(segmentation, dict):
        raise ValueError(f"{name}: segmentation is neither polygons nor {{size, counts}}")
    stated = segmentation.get("size")
    if isinstance(stated, list) and stated != list(size):
        raise ValueError(f"{name}: mask of size {stated} on an image of {size}")
    return checked_mask(segmentation, name)


def _encode_polygons(polygons: list[Any], name: str, size: Size) -> dict[str, Any] | None:
    for polygon in polygons:
        numbers = isinstance(polygon, list) and all(isinstance(x, int | float) for x in polygon)
        if not numbers or len(polygon) % 2:
            raise ValueError(f"{name}: a polygon is not a list of x, y, x, y… but {polygon!r:.60}")
        # pycocotools draws every pixel of a border, however far outside the image it runs
        if not all(abs(x) <= FARTHEST * max(size) for x in polygon):
            raise ValueError(f"{name}: a polygon far outside its image of {size}: {polygon!r:.60}")
    areas = [polygon for polygon in polygons if len(polygon) >= 6]
    if not areas:
        return None
    encoded = coco_mask.merge(coco_mask.frPyObjects(areas, *size))
    return {"size": list(size), "counts": encoded["counts"].decode()}
