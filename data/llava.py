"""LLaVA's instruction data to tables: questions about an image and their answers.

    python -m data.llava llava_v1_5_mix665k.json --images llava --out tables/llava

Reads llava_v1_5_mix665k.json and files in its layout, e.g. ShareGPT4V's (Liu et al. 2023). As in
the official release, entries without an image are left out and `<image>` markers are removed. The
turns of a conversation are phrases in its order: PixelLLM's release takes each on its own, and so
does a source unless it is told that they are rounds (`Source.in_turn`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from data.annotations import (
    Picture,
    Size,
    check_entries,
    check_name,
    clean_text,
    coco_number,
    drop,
    image_paths,
    print_report,
    read_record,
    start_report,
    stream_list,
)
from pixelllm.records import Phrase, Record
from pixelllm.tables import write_table

MARKER = "<image>"


def read_records(
    files: list[Path], folder: Path, report: dict[str, Any], skip_missing: bool = False
) -> Iterator[Record]:
    """One record per conversation about an image; `report` is filled while they are taken.

    Raises FileNotFoundError or ValueError naming the entry.
    """
    report["read"] = 0
    for file in files:
        for number, entry in enumerate(stream_list(file)):
            report["read"] += 1
            name = f"{file}: entry {number}"
            check_entries(name, [entry], ("conversations",))
            if not entry.get("image"):
                drop(report, "no image")
                continue
            image = check_name(entry["image"], name)
            coco = coco_number(image)
            image_id = Path(image).stem if coco is None else coco
            picture = Picture(name, image_id, image_paths(folder, image), entry)
            phrases_at = partial(_phrases, name, f"{file.stem}/{number}", entry, report)
            record = read_record(picture, phrases_at, report, skip_missing)
            if record:
                yield record
    if not report["read"]:
        raise ValueError(f"no conversation in {', '.join(map(str, files))}; is it LLaVA's layout?")


def _phrases(
    name: str, number: str, entry: dict[str, Any], report: dict[str, Any], size: Size
) -> Iterator[Phrase]:
    turns = entry["conversations"]
    check_entries(f"{name}: conversations", turns, ("from", "value"))
    speakers = [turn["from"] for turn in turns]
    if speakers != ["human", "gpt"] * (len(turns) // 2):
        came = ", ".join(map(str, speakers))
        raise ValueError(f"{name}: turns are not human, gpt, human, gpt… but {came}")
    texts = [clean_text(turn["value"], name).replace(MARKER, "").strip() for turn in turns]
    for index, (question, answer) in enumerate(zip(texts[::2], texts[1::2], strict=True)):
        if answer:
            yield Phrase(f"question/{number}/{index}", "question", answer, context=question)
        else:
            drop(report, "empty answer")


def convert(
    files: list[Path], folder: Path, out: Path, skip_missing: bool = False
) -> dict[str, Any]:
    """Write the table `out`; returns its report. Raises as `read_records`, nothing is written."""
    report = start_report(files, folder)
    records = read_records(files, folder, report, skip_missing)
    write_table(tqdm(records, "conversations"), out, report)
    return report


def main(
    annotations: Annotated[tuple[Path, ...], tyro.conf.Positional],
    images: Path,
    out: Path,
    skip_missing: bool = False,
) -> None:
    """Turn LLaVA's instruction data into a table of records.

    Args:
        annotations: llava_v1_5_mix665k.json or files in its layout.
        images: folder that the entries' image names start from, with coco/train2017, gqa/images,
            ocr_vqa/images, textvqa/train_images and vg/VG_100K.
        out: table to write; a table of that name is replaced when the new one is complete.
        skip_missing: drop and count conversations whose image is missing.
    """
    print_report(partial(convert, list(annotations), images, out, skip_missing))


if __name__ == "__main__":
    tyro.cli(main)
