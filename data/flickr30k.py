"""Flickr30k Entities to tables: captions whose phrases have boxes (Plummer et al., IJCV 2017).

    python -m data.flickr30k annotations.zip --split train.txt --images flickr30k-images \
        --out tables/flickr_train

Reads the published archive or its folder: `Sentences/*.txt` with phrases as
`[/EN#chain/type words]` and `Annotations/*.xml` with the boxes of every chain, in pixels from 1
on, borders included. Captions are published as tokens; here punctuation stands where it is
written. Boxes become pieces of the caption, several of the same words where a phrase means several.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from xml.etree import ElementTree

import tyro
from tqdm import tqdm

from data.annotations import (
    Picture,
    Size,
    clip_box,
    coco_number,
    drop,
    image_paths,
    print_report,
    read_record,
    start_report,
)
from pixelllm.records import Box, Phrase, Piece, Record
from pixelllm.tables import write_table

OPENING = re.compile(r"\[/EN#(\d+)(/\S+)?")
TIGHT = re.compile(r"[.,;:!?]|n't|'(s|re|ve|ll|d|m)")  # tokens that no blank comes before


class Span(NamedTuple):
    """Words of a caption, characters half open, and the chain of phrases they belong to."""

    start: int
    end: int
    chain: str


def parse_sentence(line: str, place: str) -> tuple[str, list[Span]]:
    """The caption and its phrases. Raises ValueError naming `place` on unmatched brackets."""
    text, spans, opened = "", [], None
    for token in line.split():
        opening = OPENING.fullmatch(token)
        if opening and opened is None:
            opened = Span(-1, -1, opening[1])
            continue
        if opening:
            raise ValueError(f"{place}: {token} inside the phrase before it; is a ] missing?")
        closes = opened is not None and token.endswith("]")
        word = token[:-1] if closes else token
        if word:
            start = len(text) + (bool(text) and not TIGHT.fullmatch(word))
            text = text.ljust(start) + word
            if opened is not None:
                first = start if opened.start < 0 else opened.start
                opened = opened._replace(start=first, end=len(text))
        if closes:
            spans += [opened] if opened.start >= 0 else []
            opened = None
    if opened is not None:
        raise ValueError(f"{place}: the phrase of chain {opened.chain} has no closing ]")
    return text, spans


class Entities(NamedTuple):
    """An annotation file: the stated image, and boxes in pixels by chain, [x, y, width, height]."""

    image: dict[str, Any]
    boxes: dict[str, list[list[float]]]


def parse_entities(content: bytes, file: str) -> Entities:
    """Read `Annotations/*.xml`. Raises ValueError naming the file and the line or object."""
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:  # says line and column
        raise ValueError(f"{file}: not an XML file ({error})") from error
    boxes = defaultdict(list)
    for number, entry in enumerate(root.iter("object"), start=1):
        chains = [name.text for name in entry.findall("name")]
        corners = entry.find("bndbox")
        if not chains or None in chains:
            raise ValueError(f"{file}: object {number} has no name of a chain")
        if corners is not None:  # otherwise the whole scene, or nothing that can be seen
            names = ("xmin", "ymin", "xmax", "ymax")
            x0, y0, x1, y1 = (_number(corners, n, f"{file}: object {number}") for n in names)
            for chain in chains:
                boxes[chain].append([x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1])
    size = root.find("size")
    if size is None:
        raise ValueError(f"{file}: no size of the image; is it of Flickr30k Entities?")
    image = {side: int(_number(size, side, f"{file}: size")) for side in ("width", "height")}
    return Entities({**image, "file_name": root.findtext("filename", "")}, boxes)


def _number(parent: ElementTree.Element, name: str, place: str) -> float:
    text = parent.findtext(name)
    try:
        return float(text or "")
    except ValueError as error:
        raise ValueError(f"{place}: {name} is not a number but {text!r}") from error


def open_annotations(path: Path) -> Path | zipfile.Path:
    """The folder or archive with both parts. Raises FileNotFoundError or ValueError naming it."""
    try:
        root = zipfile.Path(path) if path.is_file() else path
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: neither a folder nor a whole zip archive ({error})") from error
    if not (root / "Sentences").is_dir() or not (root / "Annotations").is_dir():
        raise FileNotFoundError(f"{path}: no Sentences and Annotations of Flickr30k Entities in it")
    return root


def _read(file: Path | zipfile.Path) -> bytes:
    try:
        return file.read_bytes()
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file}: damaged in its archive ({error})") from error


def image_names(root: Path | zipfile.Path, split: Path | None) -> list[str]:
    """The images of a split, or all. Raises FileNotFoundError or ValueError naming the file."""
    texts = {file.name for file in (root / "Sentences").iterdir()}
    if split is None:
        return sorted(name.removesuffix(".txt") for name in texts if name.endswith(".txt"))
    if not split.is_file():
        raise FileNotFoundError(f"--split {split}: no such file; it lists an image a line")
    names = split.read_text().split()
    for line, name in enumerate(names, start=1):
        if f"{name}.txt" not in texts:
            raise ValueError(f"{split}:{line}: there is no Sentences/{name}.txt")
    return names


def read_records(
    annotations: Path, folder: Path, split: Path | None, report: dict[str, Any], skip_missing: bool
) -> Iterator[Record]:
    """One record per image with its captions; `report` is filled while they are taken.

    Raises FileNotFoundError or ValueError naming the image, or the file and line.
    """
    root = open_annotations(annotations)
    for name in tqdm(image_names(root, split), "images"):
        file = root / "Annotations" / f"{name}.xml"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such annotation file")
        entities = parse_entities(_read(file), str(file))
        sentences = root / "Sentences" / f"{name}.txt"
        image = entities.image["file_name"] or f"{name}.jpg"
        number = coco_number(image)
        picture = Picture(
            str(file),
            name if number is None else number,
            image_paths(folder, image, "flickr"),
            entities.image,
        )
        phrases_at = partial(_phrases, name, sentences, entities, report)
        record = read_record(picture, phrases_at, report, skip_missing)
        if record:
            yield record


def _phrases(
    name: str, file: Path | zipfile.Path, entities: Entities, report: dict[str, Any], size: Size
) -> Iterator[Phrase]:
    try:
        lines = _read(file).decode().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a text in UTF-8 ({error})") from error
    boxes = {
        chain: [clip_box(box, f"{file}: chain {chain}", size) for box in found]
        for chain, found in entities.boxes.items()
    }
    for number, line in enumerate(lines, start=1):
        caption, spans = parse_sentence(line, f"{file}:{number}")
        pieces = tuple(
            Piece(start, end, _center(box), box)
            for start, end, chain in spans
            for box in boxes.get(chain, ())
            if box is not None
        )
        if pieces:
            yield Phrase(f"grounded/{name}/{number}", "grounded", caption, pieces=pieces)
        elif caption:
            drop(report, "caption without boxes")


def _center(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def convert(
    annotations: Path,
    folder: Path,
    out: Path,
    split: Path | None = None,
    skip_missing: bool = False,
) -> dict[str, Any]:
    """Write the table `out`; returns its report. Raises as `read_records`, nothing is written."""
    report = start_report([annotations], folder)
    report["split"] = split and split.name
    write_table(read_records(annotations, folder, split, report, skip_missing), out, report)
    return report


def main(
    annotations: Annotated[Path, tyro.conf.Positional],
    images: Path,
    out: Path,
    split: Path | None = None,
    skip_missing: bool = False,
) -> None:
    """Turn Flickr30k Entities into a table of grounded captions.

    Args:
        annotations: annotations.zip, or the folder with Annotations and Sentences.
        images: folder of the images, or the one that holds flickr30k-images.
        out: table to write; a table of that name is replaced when the new one is complete.
        split: train.txt, val.txt or test.txt, an image a line; all images by default.
        skip_missing: drop and count images whose file is missing.
    """
    print_report(partial(convert, annotations, images, out, split, skip_missing))


if __name__ == "__main__":
    tyro.cli(main)
