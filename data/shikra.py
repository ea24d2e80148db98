"""Questions whose answers point at what they mention: Shikra-RD to tables (Chen et al. 2023).

    python -m data.shikra GPT4GEN_BoxCoT_train.jsonl --images flickr30k-images --out tables/rd_train

Reads its JSON lines: `<ph_st>`words`<ph_ed>` stand around phrases, and for each of them a list of
numbers says which of the entry's `boxes`, corners in pixels, it means. The answer is the one with
its reasons (`cot_with_ans`). Phrases of the question lose their marks; those of the answer become
pieces, several of the same words where a phrase means several boxes.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from data.annotations import (
    Picture,
    Size,
    are_numbers,
    check_entries,
    check_name,
    clean_text,
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

START, END = "<ph_st>", "<ph_ed>"
KEYS = ("img_path", "question", "cot_with_ans", "boxes", "answer_boxes_seq")
Place = tuple[str, str, dict[str, Any]]  # name in errors, id of the phrase, entry


def parse_marked(text: str, name: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and the characters of its phrases, half open.

    Raises ValueError on unmatched marks.
    """
    plain, spans, opened = "", [], None
    for part in re.split(f"({START}|{END})", text):
        if part in (START, END) and (opened is None) != (part == START):
            raise ValueError(f"{name}: {part} is unmatched: {text!r}")
        if part == START:
            opened = len(plain)
        elif part == END:
            start = len(plain) - len(plain[opened:].lstrip())
            spans.append((start, len(plain.rstrip())))
            opened = None
        else:
            plain += part.lstrip() if plain.endswith(" ") or not plain else part
    if opened is not None:
        raise ValueError(f"{name}: {START} without {END}: {text!r}")
    return plain.rstrip(), spans


def load_entries(files: list[Path]) -> dict[str, list[Place]]:
    """The entries of JSON lines by their image. Raises naming the file and line."""
    by_image: dict[str, list[Place]] = defaultdict(list)
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such annotation file")
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.isspace():
                    continue
                name = f"{file}:{number}"
                try:
                    entry = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{name}: not a line of JSON ({error})") from error
                check_entries(name, [entry], KEYS)
                place = (name, f"pointed/{file.stem}/{number}", entry)
                by_image[check_name(entry["img_path"], name)].append(place)
    if not by_image:
        raise ValueError(f"no question in {', '.join(map(str, files))}; is it Shikra-RD's layout?")
    return by_image


def read_records(
    by_image: dict[str, list[Place]],
    folder: Path,
    report: dict[str, Any],
    skip_missing: bool = False,
) -> Iterator[Record]:
    """One record per image; `report` is filled while they are taken.

    Raises FileNotFoundError or ValueError naming the file and line.
    """
    for image, places in by_image.items():
        tried = [folder / image, *image_paths(folder, Path(image).name, "flickr")]
        number = coco_number(image)
        image_id = Path(image).stem if number is None else number
        picture = Picture(places[0][0], image_id, tried, {})
        record = read_record(picture, partial(_phrases, places, report), report, skip_missing)
        if record:
            yield record


def _phrases(places: list[Place], report: dict[str, Any], size: Size) -> Iterator[Phrase]:
    for name, phrase_id, entry in places:
        question, _ = parse_marked(clean_text(entry["question"], name), name)
        answer, spans = parse_marked(clean_text(entry["cot_with_ans"], name), name)
        if not question or not answer:
            drop(report, "empty question or answer")
            continue
        meant = entry["answer_boxes_seq"]
        whole = isinstance(meant, list) and all(isinstance(numbers, list) for numbers in meant)
        if not whole or len(meant) != len(spans):
            raise ValueError(f"{name}: {len(spans)} phrases, but answer_boxes_seq is {meant!r:.60}")
        pieces = [
            Piece(start, end, None, box)
            for (start, end), numbers in zip(spans, meant, strict=True)
            for box in (_box(entry["boxes"], number, name, size) for number in numbers)
            if box is not None
        ]
        yield Phrase(phrase_id, "pointed", answer, context=question, pieces=tuple(pieces))


def _box(boxes: Any, number: Any, name: str, size: Size) -> Box | None:
    """Box `number` of an entry, xyxy in [0, 1]; None where it is empty."""
    if not isinstance(number, int) or not isinstance(boxes, list) or not 0 <= number < len(boxes):
        raise ValueError(f"{name}: there is no box {number!r}")
    corners = boxes[number]
    if not are_numbers(corners, 4):
        raise ValueError(f"{name}: box {number} is not [x0, y0, x1, y1] but {corners!r:.60}")
    x0, y0, x1, y1 = corners
    return clip_box([x0, y0, x1 - x0, y1 - y0], f"{name}: box {number}", size)


def convert(
    files: list[Path], folder: Path, out: Path, skip_missing: bool = False
) -> dict[str, Any]:
    """Write the table `out`; returns its report. Raises as `read_records`, nothing is written."""
    report = start_report(files, folder)
    by_image = load_entries(files)
    records = read_records(by_image, folder, report, skip_missing)
    write_table(tqdm(records, "images", len(by_image)), out, report)
    return report


def main(
    annotations: Annotated[tuple[Path, ...], tyro.conf.Positional],
    images: Path,
    out: Path,
    skip_missing: bool = False,
) -> None:
    """Turn questions with pointing answers into a table of records.

    Args:
        annotations: JSON lines in the layout of Shikra-RD, one or more files.
        images: folder of the images.
        out: table to write; a table of that name is replaced when the new one is complete.
        skip_missing: drop and count images whose file is missing.
    """
    print_report(partial(convert, list(annotations), images, out, skip_missing))


if __name__ == "__main__":
    tyro.cli(main)
